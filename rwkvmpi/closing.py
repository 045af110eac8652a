"""The end of a run on rank 0: results.h5, SUCCESS and the closing summary; or how to go on."""

from __future__ import annotations

import logging
import math
from typing import Any

from rwkvmpi.cluster.logs import duration, quantity
from rwkvmpi.engine import Outcome
from rwkvmpi.grid.coordinator import STOPPED_ON_ERROR
from rwkvmpi.grid.figures import note_speed
from rwkvmpi.grid.transport import Hops
from rwkvmpi.models.state import wkv_shape
from rwkvmpi.ops.cuda import library as cuda
from rwkvmpi.prepare import Preparation, provenance
from rwkvmpi.store.results import open_results, write_results

EXIT_DONE, EXIT_SOME_FAILED, EXIT_STOPPED = 0, 3, 75


def close_run(preparation: Preparation, outcome: Outcome, argv: list[str], library: str, logger: logging.Logger) -> int:
    """Write what is left to write and say how it went; the run's exit code."""
    run = preparation.run
    commit = preparation.ledger.commit()
    if commit.documents_done < len(preparation.index):
        logger.info(
            "stopped by %s: %s of %s documents are done and committed; the same command goes on from here",
            outcome.stop_reason,
            f"{commit.documents_done:,}",
            f"{len(preparation.index):,}",
        )
        run.lock.release()
        return EXIT_SOME_FAILED if outcome.stop_reason == STOPPED_ON_ERROR else EXIT_STOPPED
    ranks = [{"rank": rank, **_place(farewell)} for rank, farewell in sorted(outcome.farewells.items())]
    job, shape = preparation.job, preparation.shape
    digest = write_results(
        run,
        commit,
        preparation.index,
        task=job.task.name,
        model_sha256=preparation.identity["model"],
        tokenizer=preparation.identity["tokenizer"],
        job=job.model_dump(),
        provenance=provenance(argv, library, ranks),
        layers=shape.n_layer,
        width=shape.n_embd,
        wkv_shape=wkv_shape(shape),
        before=(preparation.handed.bytes_before, preparation.handed.tokens_before) if preparation.handed else None,
    )
    failed = commit.documents_failed
    figures = {
        "tokens_per_second": outcome.tokens / max(outcome.seconds, 1e-9),
        "seconds": outcome.seconds,
        "commits": outcome.commits,
        "peak_bytes": [farewell["peak_bytes"] for _, farewell in sorted(outcome.farewells.items())],
        "busy_seconds": [farewell["busy_s"] for _, farewell in sorted(outcome.farewells.items())],
        "hops": [
            {**farewell["hops"], "total_s": farewell["hops_s"]} for _, farewell in sorted(outcome.farewells.items())
        ],
    }
    summary = {"documents": len(preparation.index), "failed": failed, "content_sha256": digest, "figures": figures}
    run.write_success(summary)
    run.remove_parts()
    run.lock.release()
    _note_speed(preparation, outcome)
    _summary(preparation, outcome, failed, logger)
    return EXIT_SOME_FAILED if failed else EXIT_DONE


def _place(farewell: dict[str, Any]) -> dict[str, Any]:
    return {key: farewell[key] for key in ("host", "device", "threads")}


def _note_speed(preparation: Preparation, outcome: Outcome) -> None:
    if cuda.emulating():
        return  # that says nothing about a GPU
    flops = sum(farewell["flops"] for farewell in outcome.farewells.values())
    busy = sum(farewell["busy_s"] for farewell in outcome.farewells.values())
    note_speed(preparation.job.model.device, preparation.job.model.dtype, preparation.job.run.threads, flops, busy)


def _summary(preparation: Preparation, outcome: Outcome, failed: int, logger: logging.Logger) -> None:
    """The closing words: what was read, how fast, what was waited for, where it lies and how to open it."""
    path = preparation.run.results
    say = logger.info
    with open_results(path) as results:
        documents = results.documents
        ok = documents["status"] == 0
        tokens, nbytes = int(documents["tokens"][ok].sum()), int(documents["bytes"][ok].sum())
        nll = float(documents["nll"][ok].sum())
    say("documents    %s%s", f"{len(ok):,}", f", {failed:,} of them failed (see documents/error)" if failed else "")
    say("tokens       %s in %s bytes", f"{tokens:,}", f"{nbytes:,}")
    if preparation.job.task.name == "score" and tokens:
        say("result       %.4f bits per byte, %.4f nats per token", nll / math.log(2) / nbytes, nll / tokens)
    rate = outcome.tokens / max(outcome.seconds, 1e-9)
    say("speed        %s tokens/s over %s, %d commits", quantity(rate), duration(outcome.seconds), outcome.commits)
    say("waits        %s", _longest_waits(outcome))
    if hops := _hops(outcome):
        say("hops         %s", hops)
    peak = max(farewell["peak_bytes"] for farewell in outcome.farewells.values())
    on_gpu = max(farewell["device_bytes"] for farewell in outcome.farewells.values())
    beside = f", {on_gpu / 1e6:,.0f} MB of its GPU" if on_gpu else ""
    say("memory       %s MB in the largest rank%s", f"{peak / 1e6:,.0f}", beside)
    say("results      %s", path)
    if preparation.job.run.trace:
        say("trace        rwkvmpi export %s --to trace", preparation.run.path)
    say("open them    python -c \"import h5py; print(h5py.File('%s')['documents/bits_per_byte'][:])\"", path)
    say("             rwkvmpi export %s --to jsonl", preparation.run.path)


def _hops(outcome: Outcome) -> str:
    """The messages of the stream, and how much of their time lay behind work; '' where there were none."""
    ranks = [farewell for _, farewell in sorted(outcome.farewells.items()) if farewell["hops"]["messages"]]
    if not ranks:
        return ""
    hops = Hops()
    for rank in ranks:
        hops.add(Hops(**rank["hops"]))
    most = max(rank["hops"]["exposed_s"] for rank in ranks)
    # Where no message was waited for from its start, nobody saw how long one takes, and none held a rank up.
    total = hops.total_s
    hidden = f"{1 - hops.exposed_s / total:.1%} of their {total:.2f} s hidden behind work" if total else "all hidden"
    size = f"{hops.messages:,} messages, {quantity(hops.nbytes)}B"
    return f"{size}, {hidden}; a rank waited {most:.2f} s for them at most"


def _longest_waits(outcome: Outcome) -> str:
    waits = [
        (seconds, rank, kind)
        for rank, farewell in outcome.farewells.items()
        for kind, seconds in farewell["waits"].items()
    ]
    longest = [entry for entry in sorted(waits, reverse=True)[:3] if entry[0] > 0.005]
    if not longest:
        return "none worth a word"
    return ", ".join(f"{seconds:.2f} s for {kind} (rank {rank})" for seconds, rank, kind in longest)
