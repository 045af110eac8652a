"""Compiles the CUDA kernels as C++ for the host: cuda/emulation instead of CUDA, for tests without a GPU.

    python scripts/_emulated_kernels.py [thread]      prints the library's path

Objects and libraries lie in build/emulated under a sum of everything that went into them, so only what has changed is
compiled again, and several processes may build at once. RWKVMPI_EMULATED_SOURCES=errors,norms leaves out the other
sources, for work on a few of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "cuda"
BUILT = ROOT / "build/emulated"
FLAGS = shlex.split(
    "-std=c++20 -O1 -g1 -fPIC -ffp-contract=off -fno-gnu-unique -fno-strict-aliasing -Wno-unknown-pragmas -x c++"
)
JOBS = min(os.cpu_count() or 1, 8)
KEPT_SECONDS = 14 * 86400  # files that nobody has asked for since are removed


class CompileError(RuntimeError):
    """A source does not compile; the compiler's words."""


def build(sanitizer: str = "", sources: Sequence[Path] | None = None, defines: Sequence[str] = ()) -> Path:
    """The shared library of these sources (all kernels if none are named), for instance with sanitizer='thread'."""
    sources = _kernels() if sources is None else sources
    flags = [*FLAGS, *(f"-D{name}" for name in defines), *([f"-fsanitize={sanitizer}"] if sanitizer else [])]
    objects = [BUILT / f"{source.stem}-{_sum(source, flags)}.o" for source in sources]
    text = " ".join(path.name for path in objects)
    library = BUILT / hashlib.sha256(text.encode()).hexdigest()[:20] / "_cuda_emulated.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would only do the same work twice
        if not library.exists():
            with ThreadPoolExecutor(JOBS) as pool:
                list(pool.map(functools.partial(_compile, flags), sources, objects))
            link = ["-shared", *([f"-fsanitize={sanitizer}"] if sanitizer else []), *map(str, objects)]
            _run([*compiler(), *link], library)
            _remove_old()
    for path in [library.parent, library, *objects]:
        if path.exists():
            os.utime(path)
    return library


def _kernels() -> list[Path]:
    wanted = os.environ.get("RWKVMPI_EMULATED_SOURCES")
    if wanted:
        return [CUDA / f"{name}.cu" for name in sorted(wanted.split(","))]
    return sorted(CUDA.glob("*.cu"))


def compiler() -> list[str]:
    """The C++ compiler's command: g++, or what CXX says."""
    return shlex.split(os.environ.get("CXX", "g++"))


def _compile(flags: list[str], source: Path, target: Path) -> None:
    if not target.exists():
        _run([*compiler(), *flags, f"-I{CUDA}", "-c", str(source)], target)


def _run(command: list[str], target: Path) -> None:
    """Runs a compiler whose output only takes its name when it is complete."""
    temporary = target.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stderr}")
    temporary.replace(target)


def _sum(source: Path, flags: list[str]) -> str:
    """A sum of a source, the headers that it includes, and how it is compiled."""
    total = hashlib.sha256(f"{compiler()} {_version()} {flags}".encode())
    for path in sorted(set(_with_headers(source.resolve(), set()))):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:20]


def _with_headers(path: Path, seen: set[Path]) -> Iterator[Path]:
    if path in seen:
        return
    seen.add(path)
    yield path
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
        for folder in (path.parent, CUDA):
            if (folder / name).exists():
                yield from _with_headers((folder / name).resolve(), seen)
                break


@functools.cache
def _version() -> str:
    return subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _remove_old() -> None:
    oldest = time.time() - KEPT_SECONDS
    for path in [*BUILT.glob("*.o"), *BUILT.glob("*/")]:
        with contextlib.suppress(FileNotFoundError):  # another process may be doing the same
            if path.stat().st_mtime >= oldest:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


if __name__ == "__main__":
    print(build(sys.argv[1] if len(sys.argv) > 1 else ""))
