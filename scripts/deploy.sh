#!/usr/bin/env bash
# Sets rwkvmpi up on the nodes of a hostfile, over ssh, and tries it there. Plain Debian or Ubuntu nodes will do.
#
#     scripts/deploy.sh HOSTFILE [OPTIONS] [-- OPTIONS OF SSH]
#
# HOSTFILE is mpirun's: a host per line, perhaps `slots=N`; # begins a comment. What is done on each node: what is
# missing is installed with apt (as root, or with a sudo that asks nothing), the project is copied, a virtual
# environment is made and found at every login, the operators are compiled for all kinds of processors, model and
# tokenizer are copied; all that is copied is verified by SHA-256. Then `rwkvmpi doctor` runs on each, ssh between the
# nodes is tried, and mpirun across them. Every change is said. The same command again goes on where it was
# interrupted, and changes nothing where nothing is to be changed; nothing that it did not make is overwritten.
#
#     --user NAME            work as this account, which is made if need be (root or sudo without a question)
#     --prefix DIR           where to install; without it ~/rwkvmpi of the account
#     --shared               DIR is on a file system that all nodes see (that is tested): installed once, for all
#     --model FILE           a model to copy to DIR/models, or `bundled`; --model-sha256 HEX: what FILE must have
#     --tokenizer FILE       a tokenizer to copy there, or world, bytes
#     --extra NAME           an extra of the package, may be repeated; `mpi` unless told; `none`: the site's own MPI
#     --ssh-keys             give the account a key, and let the nodes know each other: mpirun needs that
#     --no-mpirun            Slurm starts the ranks: neither ssh between the nodes nor mpirun is tried
#     --dry-run              look, and say what would be done
#     --jobs N               so many nodes at a time (16)
#
# Without the internet:
#
#     --wheels DIR           install from these files only; with the Python of the nodes they are fetched elsewhere by
#                            pip download -d DIR torch==2.13.0 'setuptools>=77' '.[mpi]'
#     --packages-of PYTHON   a Python on the nodes whose packages are used instead of being installed: a module of the
#                            site with torch, another environment; with --offline nothing else may be fetched
#     --python PYTHON        the Python on the nodes to make the environment with
#     --operators copy       no compiler on the nodes: copy the operators as they were compiled here
#
# SSH_OPTIONS holds options of ssh, too; hosts that need other names, users or keys belong into ~/.ssh/config.
# Exit code: 0; 1: something failed on a node, the others were done all the same; 2: nothing was begun.
#
# shellcheck disable=SC2034,SC2317 # much is read and called by _deploy_hosts.sh
set -Eeuo pipefail

SCRIPT=$(readlink -f "${BASH_SOURCE[0]}")
# shellcheck source=scripts/_deploy_hosts.sh
source "$(dirname "$SCRIPT")/_deploy_hosts.sh"

ACCOUNT='' PREFIX='' MODE=each OPERATORS=build EXTRAS='' PYTHON='' PACKAGES='' OFFLINE=0 DRY=0
MODEL='' MODEL_SUM='' TOKENIZER=auto WHEELS='' KEYS=0 MPIRUN=1 JOBS=16 HOSTFILE=''
HOSTS=() SSH=() FILES=()
declare -A SUMS=()

read_options() {
    local extras=()
    while [ $# -gt 0 ]; do
        case $1 in
            --user | --prefix | --model | --model-sha256 | --tokenizer | --extra | --jobs | --wheels | --packages-of | --python | --operators)
                [ $# -ge 2 ] || refuse "$1 needs a value" ;;&
            --user) ACCOUNT=$2 && shift ;;
            --prefix) PREFIX=$2 && shift ;;
            --shared) MODE=shared ;;
            --model) MODEL=$2 && shift ;;
            --model-sha256) MODEL_SUM=${2,,} && shift ;;
            --tokenizer) TOKENIZER=$2 && shift ;;
            --extra) extras+=("$2") && shift ;;
            --ssh-keys) KEYS=1 ;;
            --no-mpirun) MPIRUN=0 ;;
            --dry-run) DRY=1 ;;
            --jobs) JOBS=$2 && shift ;;
            --wheels) WHEELS=$2 OFFLINE=1 && shift ;;
            --packages-of) PACKAGES=$2 && shift ;;
            --offline) OFFLINE=1 ;;
            --python) PYTHON=$2 && shift ;;
            --operators) OPERATORS=$2 && shift ;;
            -h | --help) sed -n '2,/^# shellcheck/{/^# shell/!s/^# \{0,1\}//p}' "$SCRIPT" && exit 0 ;;
            --) shift && SSH=("$@") && break ;;
            -*) refuse "no option $1; see $0 --help" ;;
            *) [ -z "$HOSTFILE" ] || refuse "one hostfile, not $HOSTFILE and $1" && HOSTFILE=$1 ;;
        esac
        shift
    done
    [ -n "$HOSTFILE" ] || refuse "which hostfile? see $0 --help"
    [ ${#extras[@]} -gt 0 ] || extras=(mpi)
    EXTRAS=${extras[*]}
    [ "$EXTRAS" != none ] || EXTRAS=''
    check_options
}

check_options() {
    [[ $JOBS =~ ^[1-9][0-9]*$ ]] || refuse "--jobs $JOBS: a number"
    [[ $ACCOUNT =~ ^([a-z_][a-z0-9_-]*)?$ ]] || refuse "--user $ACCOUNT: small letters, digits, - and _"
    [[ $PREFIX =~ ^[A-Za-z0-9._/+-]*$ ]] || refuse "--prefix $PREFIX: letters, digits and ._/+- only"
    [ "$MODE" = each ] || [[ $PREFIX == /* ]] || refuse "--shared needs --prefix with the path that all nodes have in common"
    case $OPERATORS in build | copy) ;; *) refuse "--operators $OPERATORS: build or copy" ;; esac
    [ "$OPERATORS" = build ] || [ -e "$ROOT/rwkvmpi/ops/_cpu_portable.so" ] ||
        refuse "no operators are compiled here yet: $ROOT/scripts/quickstart.sh"
    [ -z "$MODEL_SUM" ] || [ -f "$MODEL" ] || refuse "--model-sha256 needs --model FILE"
    [ "$MODEL" = bundled ] || add_file --model "$MODEL"
    case $TOKENIZER in auto | world | bytes) ;; *) add_file --tokenizer "$TOKENIZER" ;; esac
    [ -z "$MODEL_SUM" ] || [ "$MODEL_SUM" = "${SUMS[$MODEL]}" ] ||
        refuse "--model $MODEL has sha256 ${SUMS[$MODEL]}, not $MODEL_SUM"
    [ -z "$WHEELS" ] || for file in "$WHEELS"/*.whl; do add_file --wheels "$file"; done
}

# A file to copy to the nodes, and its sum.
add_file() {
    [ -n "$2" ] || return 0
    [ -f "$2" ] || refuse "$1 $2: no such file"
    FILES+=("$2")
    SUMS[$2]=$(sum_of "$2")
}

# --- what is done on a host; each ends early, with code 1, where something failed

look() {
    ask "$1" check || return 1
    [ "$OPERATORS" = build ] || [ "$(fact "$1" arch)" = "$(uname -m)" ] ||
        fail "$1" "is $(fact "$1" arch), and the operators of this machine are for $(uname -m): leave --operators copy out"
}

set_up_host() {
    place_project "$1" && place_wheels "$1" && ask "$1" set_up_package && set_up_account "$1"
}

set_up_account() { ask "$1" login && on "$1" hostfile <"$WORK/hostfile" && place_models "$1"; }

place_project() {
    ask "$1" project_state "$PROJECT_SUM" || return 1
    [ "$(fact "$1" project)" != wanted ] || on "$1" receive_project "$PROJECT_SUM" <"$WORK/project.tar"
}

place_wheels() {
    local file
    for file in "${FILES[@]}"; do
        [[ $file != *.whl ]] || place_file "$1" "$file" "wheels/$(basename "$file")" || return 1
    done
}

place_models() {
    local file
    for file in "${FILES[@]}"; do
        [[ $file == *.whl ]] || place_file "$1" "$file" "models/$(basename "$file")" || return 1
    done
}

# place_file HOST FILE TARGET: if it is not there, what is missing of it.
place_file() {
    local size have
    size=$(stat -Lc %s "$2")
    rm -f "$WORK/$1.fact.have"
    ask "$1" file_state "$3" "${SUMS[$2]}" "$size" || return 1
    have=$(fact "$1" have)
    [ -z "$have" ] || tail -c "+$((have + 1))" "$2" | on "$1" receive_file "$3" "${SUMS[$2]}" "$size"
}

examine() {
    local model=$MODEL tokenizer=$TOKENIZER
    [ ! -f "$model" ] || model=models/$(basename "$model")
    [ ! -f "$tokenizer" ] || tokenizer=models/$(basename "$tokenizer")
    ask "$1" doctor "$model" "$tokenizer" "$1" && touch "$WORK/$1.examined"
}

# --- all hosts

see_together() {
    local first=${GOOD[0]} token=$$-$RANDOM host
    [ "$DRY" = 0 ] || return 0
    if ! ask "$first" write_token "$token"; then
        fail_all "no file could be written on $first"
        return
    fi
    look_for_token() { ask "$1" see_token "$token" "$first"; }
    everywhere look_for_token
    ask "$first" remove_token "$token" || true
    for host in "${GOOD[@]}"; do
        [ "$(fact "$host" arch)" = "$(fact "$first" arch)" ] ||
            fail "$host" "is $(fact "$host" arch), $first is $(fact "$first" arch): one installation does not serve both"
    done
}

exchange_keys() {
    local host
    give_keys() { ask "$1" own_keys "$1"; }
    everywhere give_keys
    for host in "${GOOD[@]}"; do cat "$WORK/$host.fact.sshd" 2>/dev/null || true; done >"$WORK/trust"
    echo >>"$WORK/trust"
    for host in "${GOOD[@]}"; do cat "$WORK/$host.fact.account" 2>/dev/null || true; done | sort -u >>"$WORK/trust"
    take_keys() { on "$1" trust <"$WORK/trust"; }
    everywhere take_keys
}

# All pairs of few hosts; of many, the first with all (mpirun starts there) and each with the next.
reach_others() {
    local host others=() next=0
    for host in "${GOOD[@]}"; do
        if [ "$host" = "$1" ]; then next=1 && continue; fi
        [ ${#GOOD[@]} -gt 16 ] && [ "$1" != "${GOOD[0]}" ] && [ "$next" = 0 ] || others+=("$host")
        next=0
    done
    ask "$1" reach "${others[@]}"
}

main() {
    read_options "$@"
    read_hostfile
    prepare
    everywhere look
    if [ ${#GOOD[@]} -gt 0 ] && [ "$MODE" = shared ]; then
        see_together
        refresh
        [ ${#GOOD[@]} = 0 ] || set_up_host "${GOOD[0]}" || fail_all "the installation on ${GOOD[0]} failed"
        everywhere set_up_account
    else
        everywhere set_up_host
    fi
    everywhere examine
    if [ $MPIRUN = 1 ] && [ ${#GOOD[@]} -gt 1 ]; then
        [ $KEYS = 0 ] || exchange_keys
        [ $DRY = 1 ] || everywhere reach_others
        [ ${#GOOD[@]} -lt 2 ] || ask "${GOOD[0]}" across "${GOOD[@]}" || fail "${GOOD[0]}"
    fi
    table
}

main "$@"; exit # on one line: the file may be changed meanwhile
