"""A job of one rank that reads documents and commits; it is killed at any moment, and goes on when started again.

python kill_worker.py RUN: prints DONE and the digest at the end, BAD and why when what it found is not what was there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from store_cases import LAYERS, ids_of, logprobs_of, results_of, state_of

from rwkvmpi.store.commits import InFlight, load_last_commit, remove_unlisted
from rwkvmpi.store.ledger import Ledger
from rwkvmpi.store.progress import Progress
from rwkvmpi.store.run_folder import RunFolder
from rwkvmpi.store.shards import ShardWriter

LENGTHS = [700, 0, 1, 5000, 63, 64, 65, 12_000, 900, 3000]
CHUNK, CHUNKS_PER_COMMIT = 64, 9


def main(path: Path) -> None:
    run = RunFolder(path)
    run.create()
    run.lock.acquire()
    attempt = run.next_attempt()
    commit = load_last_commit(run, discard_bad=True)
    remove_unlisted(run)
    progress = Progress(run, commit) if commit else None
    begun = {entry.doc: entry.position for entry in progress.in_flight} if progress else {}
    for doc, position in begun.items():
        assert progress is not None
        assert sum(piece.count for piece in progress.pieces(doc)) == position, "BAD pieces"
        for layer in range(LAYERS):
            for found, wanted in zip(progress.load_state(doc, layer), state_of(doc, layer, position), strict=True):
                assert np.array_equal(found, wanted), "BAD state"
    ledger = Ledger(run, attempt, "job", len(LENGTHS), progress)
    writer = ShardWriter(run.shards, attempt, 0, limit_bytes=10_000)
    number = chunks = 0

    def close(in_flight: InFlight | None) -> None:
        nonlocal number
        number += 1
        writer.begin_cut(number)
        if in_flight is not None:
            doc, position = in_flight.doc, in_flight.position
            for layer in range(LAYERS):
                writer.add_inflight(doc, position, layer, *state_of(doc, layer, position))
        ledger.apply(0, number, [writer.end_cut(number).result()], in_flight)
        ledger.write()

    left = [doc for doc in range(len(LENGTHS)) if progress is None or not progress.is_done(doc)]
    for doc in sorted(left, key=lambda doc: (doc not in begun, doc)):
        first = begun.get(doc, 0)
        while first < LENGTHS[doc]:
            end = min(first + CHUNK, LENGTHS[doc])
            writer.add_tokens(doc, first, ids_of(doc, first, end - first), logprobs_of(doc, first, end - first))
            first, chunks = end, chunks + 1
            if chunks % CHUNKS_PER_COMMIT == 0 and first % CHUNK == 0 and first < LENGTHS[doc]:
                close(InFlight(doc, first, first, first))
        writer.add_document(doc, LENGTHS[doc], LENGTHS[doc], True)
    close(None)
    digest = results_of(run, ledger.commit())
    run.write_success({"digest": digest})
    run.remove_parts()
    print("DONE", digest, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
