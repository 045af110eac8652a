#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the kernels for this machine's GPU, compares each with float64 on
# fresh random input, lets compute-sanitizer watch them, reads whole models with them, and measures. Ten minutes.
#
#     scripts/gpu_check.sh                 everything, with the Python of .venv if there is one, else python3
#     scripts/gpu_check.sh --out FOLDER    JSON files go there (default: build/gpu-check)
#     scripts/gpu_check.sh --quick         no sanitizer, only the 0.1B model
#     scripts/gpu_check.sh --seconds 900   more time for the measurements (default: 300)
#     scripts/gpu_check.sh --peers         also what other programs reach, as far as they are installed
#
# Needs nvcc and a torch with CUDA in that Python. Nothing is installed and nothing outside the folder is changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=build/gpu-check quick=0 peers=0 seconds=300
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out=$2 && shift 2 ;;
        --seconds) seconds=$2 && shift 2 ;;
        --quick) quick=1 && shift ;;
        --peers) peers=1 && shift ;;
        *)
            echo "gpu_check.sh: $1 is not an option; see the head of the script" >&2
            exit 2
            ;;
    esac
done

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
wrong=0

say() { printf '==> %s (%s s)\n' "$*" "$SECONDS"; }
check() { "$@" || { wrong=1 && echo "WRONG: $*"; }; }

capability=$($python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
    echo "gpu_check.sh: $python has no torch that sees a GPU; give it one, or look at: rwkvmpi doctor" >&2
    exit 2
}
case "$capability" in 90 | 100) capability+=a ;; esac

say "building for sm_$capability"
RWKVMPI_CUDA=1 RWKVMPI_CUDA_ARCHITECTURES=$capability $python setup.py -q build_ext --inplace

say "every kernel against float64"
check $python scripts/_gpu_values.py --json >"$out/values.json"
$python - "$out/values.json" <<'END'
import json, sys

found = json.load(open(sys.argv[1]))
worst = {}
for row in found["results"]:
    key = row["name"], row["dtype"]
    worst[key] = max(worst.get(key, (0, 0)), (row["error"], row["limit"]))
for (name, dtype), (error, limit) in worst.items():
    print(f"{name:32} {dtype:9} {error:9.2e} of {limit:.0e}{'' if error <= limit else '   WRONG'}")
END

if [ "$quick" = 0 ]; then
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
    if [ -n "$sanitizer" ]; then
        for tool in memcheck racecheck; do
            say "compute-sanitizer $tool"
            check "$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes all \
                $python scripts/_gpu_values.py --small >"$out/$tool.log"
            tail -3 "$out/$tool.log"
        done
    else
        echo "compute-sanitizer was not found: left out"
    fi
fi

say "whole models"
check $python scripts/_gpu_models.py --json "$out/models.json"

say "speed"
sizes=0.1B,1.5B,7.2B
[ "$quick" = 1 ] && sizes=0.1B
check $python scripts/_gpu_speed.py --sizes "$sizes" --seconds "$seconds" --json "$out/speed.json"

if [ "$peers" = 1 ]; then
    say "other programs"
    check $python scripts/_gpu_peers.py --json "$out/peers.json"
fi
say "done: $([ $wrong = 0 ] && echo 'all right' || echo 'SOMETHING IS WRONG, see above')"
exit $wrong
