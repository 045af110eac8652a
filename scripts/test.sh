#!/usr/bin/env bash
# Sets everything up in .venv, then runs the checks and all tests. With arguments: only pytest, with these arguments.
#
#     scripts/test.sh
#     scripts/test.sh tests/store -k resume
#     scripts/test.sh -m thorough              the CUDA kernels compiled for all GPUs and under sanitizers; the run of
#                                              all compiles them for one (RWKVMPI_CUDA_ARCHITECTURES names others)
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up mpi test

if [ "$*" = "-m thorough" ]; then
    say "the kernels for all GPUs"
    RWKVMPI_CUDA=auto python setup.py --quiet build_ext --inplace
    python -m pytest -q tests/cuda/test_build.py
    exec python -m pytest -m thorough
elif [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi

say "the kernels for GPUs, in the background"
mkdir -p build
RWKVMPI_CUDA=auto RWKVMPI_CUDA_ARCHITECTURES=${RWKVMPI_CUDA_ARCHITECTURES:-90a} nice -n 19 python setup.py --quiet build_ext --inplace >build/cuda.log 2>&1 &
kernels=$!
trap 'kill $kernels 2>/dev/null || true' EXIT
say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
say "tests of one process"
cores=$(nproc)
python -m pytest -q -n "$((cores < 8 ? cores : 8))" -m "not parallel and not thorough" --ignore tests/cuda/test_build.py
say "the kernels for GPUs"
wait $kernels || true
tail -n 20 build/cuda.log
python -m pytest -q tests/cuda/test_build.py
say "tests that start ranks"
python -m pytest -q -n 2 -m "parallel and not thorough" # two at a time: ranks wait as much as they compute
say "jobs in the Slurm laboratory, in the background" # they wait more than they work
python scripts/slurm_scenarios.py --short >build/slurm.log 2>&1 &
jobs=$!
trap 'kill $jobs 2>/dev/null || true' EXIT
say "RDMA in the RoCE laboratory"
scripts/roce_tests.sh --short -e qemu -t 300 || { code=$? && [ "$code" = 126 ]; } || exit "$code" # 126: it cannot be had here
say "jobs in the Slurm laboratory"
code=0
wait $jobs || code=$?
tail -n 20 build/slurm.log
[ "$code" = 0 ] || [ "$code" = 126 ] || exit "$code"
say "all passed"
