#!/usr/bin/env bash
# The tests of tests/roce, in the RoCE laboratory, against the results of this machine without it.
#
#     scripts/roce_tests.sh                    all of them, a quarter of an hour; -e uml is the better engine for that
#     scripts/roce_tests.sh --short            the few that scripts/test.sh runs: ports, parcels, a black hole; no scores
#     scripts/roce_tests.sh -e uml -k hole     -e and -t are the laboratory's, the rest is pytest's
#
# Exit code: pytest's; 126 where the laboratory cannot be had, 124 and 125 as in roce_lab.sh. Needs .venv (scripts/test.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

lab=(-t 3000) short=
if [ "${1:-}" = --short ]; then
    short=1
    shift
fi
while [ $# -gt 1 ] && { [ "$1" = -e ] || [ "$1" = -t ]; }; do
    lab+=("$1" "$2") # the later one counts
    shift 2
done
python=${VENV:-$PWD/.venv}/bin/python

# The kernels for all processors, since an emulated one may have less than this one: same kernels, same bits.
export PYTHONPATH=$PWD RWKVMPI_ISA=portable OMP_NUM_THREADS=1

scripts/roce_lab.sh "${lab[@]}" -p # says why, where it cannot be had
if [ -n "$short" ]; then
    exec scripts/roce_lab.sh "${lab[@]}" -- "$python" -m pytest -q -p no:cacheprovider tests/roce -m "not thorough" "$@"
fi
reference=$(mktemp -d)
trap 'rm -rf "$reference"' EXIT
"$python" tests/roce/reference.py "$reference" >/dev/null 2>&1 || {
    echo "roce_tests: one rank could not score here; try: $python tests/roce/reference.py FOLDER" >&2
    exit 1
}
export RWKVMPI_ROCE_REFERENCE=$reference
scripts/roce_lab.sh "${lab[@]}" -- "$python" -m pytest -q -p no:cacheprovider tests/roce "$@"
