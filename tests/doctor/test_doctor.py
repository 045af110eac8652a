"""The doctor finds what is wrong, mends only what is safe, and falls over nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rwkvmpi
from rwkvmpi.cluster import affinity, pinning
from rwkvmpi.doctor import diagnosis, machine_checks, number_checks, thread_checks
from rwkvmpi.doctor.diagnosis import Finding
from rwkvmpi.errors import UserError

PACKAGE = Path(rwkvmpi.__file__).parents[1]


def statuses(findings) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


def test_a_missing_folder_is_created_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    (finding,) = machine_checks.run_folder(folder)
    assert finding.status == "fail"
    assert not folder.exists()
    mended = diagnosis.mend(finding)
    assert (mended.status, mended.fixed) == ("ok", True)
    assert statuses(machine_checks.run_folder(folder))["folder"] != "fail"
    assert list(folder.iterdir()) == []


def test_a_fix_that_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = machine_checks.run_folder(tmp_path / "file" / "below")
    mended = diagnosis.mend(finding)
    assert mended.status == "fail"
    assert "--fix failed: [Errno 20]" in mended.value
    (finding,) = machine_checks.run_folder(tmp_path / "file")
    assert (finding.status, finding.fix) == ("fail", None)


def test_a_check_that_falls_over_is_a_finding() -> None:
    def mistaken():
        yield Finding("first", "ok", "fine")
        raise UserError("the file x is missing; name another")

    def broken():
        raise ZeroDivisionError("oh")

    assert [f.value for f in diagnosis.examine("a", mistaken)] == ["fine", "the file x is missing; name another"]
    (finding,) = diagnosis.examine("b", broken)
    assert finding.status == "fail"
    assert "ZeroDivisionError: oh" in finding.value


def test_more_threads_than_cores_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (finding,) = machine_checks.processor()
    assert finding.status == "ok"
    assert f"cores in the mask ({affinity.shown(os.sched_getaffinity(0))} of " in finding.value
    assert "quota" in finding.value
    assert "no word of Slurm; 1 rank on this node, threads per rank: 1" in finding.value
    assert statuses(thread_checks.of_this_process()) == {"threads": "ok"}
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count() * 2))
    (finding,) = machine_checks.processor()
    assert finding.status == "warn"
    assert "SLURM_CPUS_PER_TASK=7" in finding.value
    assert "unset OMP_NUM_THREADS" in finding.remedy
    (finding,) = thread_checks.of_this_process()
    assert finding.status == "warn"
    assert f"1 rank with {os.cpu_count() * 2} threads in all on " in finding.value
    assert "threads are not bound" in finding.value


def test_the_doctor_asks_the_threads_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    core = affinity.core_groups(sorted(os.sched_getaffinity(0)))[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RWKVMPI_PIN_THREADS", "1")
    (finding,) = thread_checks.of_this_process()
    assert (finding.status, finding.value) == ("ok", f"threads on cores {affinity.shown(core)}")
    monkeypatch.setattr(pinning, "_set", lambda cores: None)  # as where the kernel does not obey
    (finding,) = thread_checks.of_this_process()
    assert finding.value == f"threads on cores {affinity.shown(os.sched_getaffinity(0))}"


def test_a_wrong_operator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkvmpi import ops

    right = ops.wkv6
    monkeypatch.setattr(ops, "wkv6", lambda *a: tuple(x * (1 + 1e-4) for x in right(*a)))
    (finding,) = number_checks.operators()
    assert finding.status == "fail"
    assert "wkv6 (" in finding.value
    assert "wkv7" not in finding.value


def test_a_matrix_product_that_depends_on_the_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkvmpi import ops

    right = ops.product

    def fickle(x, weight):  # the last rows end in other bits, as if a tile for few rows summed in another order
        y = right(x, weight)
        y[-64:] *= 1 + 1e-6
        return y

    monkeypatch.setattr(number_checks, "MATRICES", ((192, 256),))
    assert statuses(number_checks.matrix_rows()) == {"matrix products": "ok"}
    monkeypatch.setattr(ops, "product", fickle)
    (finding,) = number_checks.matrix_rows()
    assert finding.status == "fail"
    assert "float32" in finding.value


def test_model_and_tokenizer(tmp_path: Path) -> None:
    assert statuses(number_checks.model_and_tokenizer("bundled", "auto")) == {"model": "ok", "tokenizer": "ok"}
    assert statuses(number_checks.model_and_tokenizer("bundled", "world")) == {"model": "ok", "tokenizer": "fail"}
    (tmp_path / "m.pth").write_bytes(b"PK\x03\x04 not a model")
    assert statuses(number_checks.model_and_tokenizer(str(tmp_path / "m.pth"), "auto")) == {"model": "fail"}


@pytest.mark.parallel
def test_the_command_with_a_broken_mpirun(tmp_path: Path) -> None:
    """The whole report as JSON, with an mpirun that starts two programs which do not know of each other."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(
        "#!/bin/sh\nshift 2\nexport PMI_SIZE=2 MPI_LOCALNRANKS=2\n"
        'PMI_RANK=1 "$@" & PMI_RANK=0 "$@"\ncode=$?\nwait\nexit $code\n'
    )
    mpirun.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "rwkvmpi", "doctor", "--json", "--folder", str(tmp_path), "--model", "bundled"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, cwd=PACKAGE, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert [name for name, finding in findings.items() if finding["status"] == "fail"] == ["mpi"]
    assert "started 2 ranks, but the world of" in findings["mpi"]["value"]
    assert "RWKV-7" in findings["model"]["value"]
