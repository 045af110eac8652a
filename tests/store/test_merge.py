"""merge: what all parts hold together is what one job would have written, or it is refused with a reason."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from click.testing import CliRunner
from corpus_parts import CUTS, all_parts, part_run

from rwkvmpi.cli import group
from rwkvmpi.errors import UserError
from rwkvmpi.store import merge as merging
from rwkvmpi.store.files import dump_json, read_json, sha256_file, write_durably
from rwkvmpi.store.identity import read_identity, write_identity
from rwkvmpi.store.inspect import check
from rwkvmpi.store.merge import merge
from rwkvmpi.store.results import content_digest, open_results
from rwkvmpi.store.run_folder import RunFolder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `whole` and a folder `parts`, of the task score, for copies."""
    folder = tmp_path_factory.mktemp("made")
    part_run(folder / "whole")
    all_parts(folder / "parts")
    return folder


@pytest.fixture
def parts(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "parts", tmp_path / "parts")


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("task", ["score", "embed", "read"])
@pytest.mark.parametrize("blocks", ["large", "small"])
def test_the_merged_results_are_those_of_one_job(
    task: str, blocks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "small":
        monkeypatch.setattr(merging, "_BLOCK_BYTES", 7000)
        monkeypatch.setattr(merging, "_STRINGS", 2)
    whole = part_run(tmp_path / "whole", 0, task, before=task != "embed")
    runs = all_parts(tmp_path / "parts", task, before=task != "embed")
    untouched = everything_in(tmp_path / "parts")
    done = merge([tmp_path / "parts"], tmp_path / "all")
    assert (done.parts, done.documents, done.failed, done.anew) == (4, 8, 2, True)
    merged = RunFolder(tmp_path / "all")
    assert content_digest(merged.results) == content_digest(whole.results) == done.content_sha256
    assert check(merged.path) == []
    assert read_identity(merged) == read_identity(whole)
    assert everything_in(tmp_path / "parts") == untouched
    with h5py.File(merged.results) as found, h5py.File(whole.results) as wanted:
        for group_name in ("documents", {"score": "tokens", "embed": "embeddings", "read": "states"}[task]):
            for name in wanted[group_name]:
                one, other = found[f"{group_name}/{name}"], wanted[f"{group_name}/{name}"]
                assert (one.chunks, one.dtype, one.fletcher32) == (other.chunks, other.dtype, other.fletcher32)
                assert one.compression == other.compression
        assert h5py.check_enum_dtype(found["documents/status"].dtype) == {"ok": 0, "failed": 1}
    with open_results(merged.path) as results:
        assert results.job["input"]["shard"] == ""
        assert (results.job["grid"]["stages"], results.job["grid"]["ring"]) == (0, 2)  # parts had 1 and 2 stages
        told = json.loads(results.provenance["parts"])
    assert [part["content_sha256"] for part in told] == [content_digest(run.results) for run in runs]
    assert [part["shard"] for part in told] == [[number, 4] for number in range(1, 5)]


def test_the_same_command_again_says_that_it_is_done(parts: Path, made: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> str:
        done = CliRunner().invoke(group, ["merge", *map(str, arguments)])
        assert done.exit_code == 3, done.output  # two documents failed
        return done.output

    out = parts / "all"
    assert "8 documents, 2 of them failed, merged from 4 parts" in call(parts, "-o", out)
    before = everything_in(out)
    assert "nothing to do" in call(parts, "-o", out)
    assert "nothing to do" in call(*sorted(parts.iterdir(), reverse=True), "-o", out)
    assert everything_in(out) == before
    (out / "results.h5").unlink()
    assert "merged from" in call(parts, "-o", out)
    assert "merged from" in call(parts, "-o", out, "--force")
    assert content_digest(out / "results.h5") == content_digest(made / "whole" / "results.h5")
    shutil.copytree(made / "whole", tmp_path / "other")
    assert "merged from" in call(*(parts.glob("part-*")), tmp_path / "other", "-o", tmp_path / "more")


def test_a_single_run_without_shard_is_all_of_one_part(made: Path, tmp_path: Path) -> None:
    merge([made / "whole"], tmp_path / "all")
    assert content_digest(tmp_path / "all" / "results.h5") == content_digest(made / "whole" / "results.h5")


def change_identity(run: Path, **changed: object) -> None:
    write_identity(RunFolder(run), {**(read_identity(RunFolder(run)) or {}), **changed})


def rewrite(run: Path, column: str, row: int, value: object) -> None:
    """Another value, and a SUCCESS that vouches for the file."""
    with h5py.File(run / "results.h5", "r+") as file:
        file[column][row] = value
    said = read_json(run / "SUCCESS") or {}
    write_durably(run / "SUCCESS", dump_json({**said, "results_sha256": sha256_file(run / "results.h5")}))


def flip(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.seek(-100, os.SEEK_END)
        byte = opened.read(1)
        opened.seek(-100, os.SEEK_END)
        opened.write(bytes([byte[0] ^ 1]))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: [shutil.rmtree(p / f"part-0{n}") for n in (1, 2, 4)],
                r"parts 1-2,4 of 4 are missing; read them \(--shard 1/4 -o .*part-01\) or name"),
    "unfinished": (lambda p: (p / "part-03" / "SUCCESS").unlink(), r"part-03 \(part 3 of 4\): not finished; the comm"),
    "begun": (lambda p: (p / "part-03" / "identity.json").unlink(), r"part-03: has not come so far as to say what it"),
    "twice": (lambda p: shutil.copytree(p / "part-02", p / "copy"), r"copy and .*part-02: are both part 2 of 4; give"),
    "other n": (lambda p: change_identity(p / "part-02", shard=[2, 5]), "part-02: is one of 5 parts, but .*part-01 is"),
    "other setting": (lambda p: change_identity(p / "part-04", chunk=512),
                      "part-04: does not belong to .*part-01, which was started with chunk = 1024, and this one with "
                      "512"),
    "other input": (lambda p: change_identity(p / "part-02", input=[["in/a.txt", 5, "00"]]),
                    "part-02: does not belong to .*part-01, .* other input: the input file in/a.txt has changed"),
    "gap": (lambda p: change_identity(p / "part-03", documents=[4, 4, 8]),
            r"part-03: begins after 4 of 8 documents, but .*part-02 ends after 3 of 8"),
    "more": (lambda p: change_identity(p / "part-03", documents=[3, 4, 9]), r"part-03: begins after 3 of 9 documents"),
    "end": (lambda p: change_identity(p / "part-04", documents=[4, 7, 8]), r"-04: is the last part, and ends after 7"),
    "whole run": (lambda p: change_identity(p / "part-02", shard=None, documents=None, chunk=512),
                  "part-02: was not started with --shard, and .*part-01 was"),
    "damaged": (lambda p: flip(p / "part-04" / "results.h5"), r"part-04.*: its SHA-256 differs from the one"),
    "changed": (lambda p: rewrite(p / "part-04", "documents/nll", 0, 1.5), r"part-04.*: its values have dig"),
    "swapped": (lambda p: [shutil.copy(p / "part-03" / name, p / "part-04") for name in ("results.h5", "SUCCESS")],
                r"part-04/results.h5: holds other results than the part's identity.json tells of"),
    "no results": (lambda p: (p / "part-01" / "results.h5").unlink(), "part-01.*: is missing although the"),
    "bad success": (lambda p: (p / "part-01" / "SUCCESS").write_bytes(b"{"), "part-01/SUCCESS: is damaged"),
    "no runs": (lambda p: [shutil.rmtree(run) for run in p.iterdir()], "holds no run of rwkvmpi; give run f"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_belong_together_is_refused(what: str, parts: Path, tmp_path: Path) -> None:
    breaks, sentence = BROKEN[what]
    breaks(parts)
    with pytest.raises(UserError, match=sentence):
        merge([parts], tmp_path / "all")
    assert not (tmp_path / "all" / "results.h5").exists()
    if what != "changed":  # that is seen while the values are copied
        assert not (tmp_path / "all").exists()


def test_out_is_never_taken_from_another_run(parts: Path, made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made / "whole", tmp_path / "other")
    change_identity(other, chunk=512)
    own = shutil.copytree(made / "whole", tmp_path / "own")
    begun = shutil.copytree(made / "whole", tmp_path / "begun")
    (begun / "SUCCESS").unlink()
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "n.txt").write_text("mine")
    for out, sentence in (
        (parts / "part-02", "is one of the runs to be merged; give the whole a folder of its own"),
        (other, "holds another run, which was started with chunk = 512, and these parts with 1024; give another"),
        (own, "holds a finished run that was not merged; give another folder with -o, or --force"),
        (begun, "holds a run that was not merged and is not finished"),
        (notes, "is not empty and holds no run of rwkvmpi"),
        (parts, "is not empty and holds no run of rwkvmpi"),
        (notes / "n.txt", "is a file, not a folder"),
    ):
        before = everything_in(out)
        with pytest.raises(UserError, match=sentence):
            merge(sorted(parts.iterdir()), out)
        assert everything_in(out) == before
    with pytest.raises(UserError, match="is one of the runs to be merged"):
        merge(sorted(parts.iterdir()), parts / "part-02", force=True)
    merge([parts], other, force=True)
    assert content_digest(other / "results.h5") == content_digest(made / "whole" / "results.h5")
    said = read_json(other / "SUCCESS") or {}
    said["parts"][1]["content_sha256"] = "00"
    write_durably(other / "SUCCESS", dump_json(said))
    with pytest.raises(UserError, match="was merged from other results of these parts"):
        merge([parts], other)


def in_a_child(work: Callable[[], object]) -> int:
    """Do it in a process of its own; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except UserError as error:
            os.write(2, str(error).encode())
            os._exit(2)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_killed_before_any_step_the_same_command_does_it(parts: Path, made: Path, tmp_path: Path) -> None:
    """The child kills itself with -9 before its n-th fsync or rename, for every n."""
    digest, killed = content_digest(made / "whole" / "results.h5"), 0

    def dying(out: Path, steps: int) -> None:
        for name in ("fsync", "replace"):
            real = getattr(os, name)

            def step(*arguments: object, real: Callable[..., object] = real) -> object:
                nonlocal steps
                steps -= 1
                if steps == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            setattr(os, name, step)
        merge([parts], out)

    for steps in range(1, 60):
        out = tmp_path / f"all{steps}"
        if in_a_child(lambda out=out, steps=steps: dying(out, steps)) == 0:  # type: ignore[misc]
            break
        killed += 1
        merge([parts], out)
        assert content_digest(out / "results.h5") == digest
        assert check(out) == []
        assert [path for path in out.rglob("*.tmp") if not path.name.startswith("lock")] == []
    assert killed > 10


def test_a_full_disk_is_one_sentence(parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        merge([parts], tmp_path / "all")

    assert os.waitstatus_to_exitcode(in_a_child(limited)) == 2
    assert "free some space or raise the quota, then the same command goes on" in capfd.readouterr().err
    assert not (tmp_path / "all" / "results.h5").exists()
    assert merge([parts], tmp_path / "all").documents == CUTS[-1]
