#!/usr/bin/env bash
# Sets everything up in .venv, then runs the checks and all tests. With arguments: only pytest, with these arguments.
#
#     scripts/test.sh
#     scripts/test.sh tests/store -k resume
set -euo pipefail
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up mpi test

if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi

say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
say "tests of one process"
python -m pytest -q -m "not parallel"
say "tests that start ranks"
python -m pytest -q -m parallel
say "all passed"
