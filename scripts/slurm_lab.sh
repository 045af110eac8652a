#!/usr/bin/env bash
# A real Slurm of several nodes on this one machine, in a folder of its own, for tests and for trying job scripts.
#
#     scripts/slurm_lab.sh up [-n NODES] [-c CPUS]                    start it; prints the SLURM_CONF to export
#     scripts/slurm_lab.sh status                                     nodes and queue; exit code 1 when it is not up
#     scripts/slurm_lab.sh lose NODE                                  kill -9 of the node's slurmd and of its processes
#     scripts/slurm_lab.sh mend NODE                                  start its slurmd again
#     scripts/slurm_lab.sh down                                       end jobs and daemons, remove the folder
#     scripts/slurm_lab.sh run [-n NODES] [-c CPUS] -- COMMAND ...    up, COMMAND with SLURM_CONF set, down
#
# One slurmctld, a munged of its own and NODES slurmd (4 unless told) run under the user who asks, without systemd,
# cgroups or a database. Every node has CPUS processors (16 unless told) and 8 GPUs, which are promised, not there.
# SLURM_LAB names the folder (build/slurm-lab unless told): two folders are two laboratories side by side, on ports of
# their own. The partition `batch` is the default; jobs in `urgent` take its nodes away, and what they displace is told
# by its --signal, gets some seconds to commit, and is queued again. What takes Slurm minutes takes seconds here: see
# the settings below.
#
# Exit code of run: that of COMMAND; 125: the laboratory itself failed; 126: it cannot be had here, and why.
# Slurm comes from Debian's or Ubuntu's packages; installing them takes root or a sudo that asks nothing, once.
set -Eeuo pipefail

SCRIPT=$(readlink -f "${BASH_SOURCE[0]}")
ROOT=$(dirname "$(dirname "$SCRIPT")")
LAB=$(readlink -m "${SLURM_LAB:-$ROOT/build/slurm-lab}")
CONF=$LAB/slurm.conf
NODES=4 CPUS=16
PACKAGES=(slurmctld slurmd slurm-client munge libpmix-dev)
PATH=$PATH:/usr/sbin:/sbin

say() { printf 'slurm_lab: %s\n' "$*" >&2; }
failed() { say "$*" && exit 125; }
cannot() { say "cannot be had here: $*" && exit 126; }
usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$SCRIPT" >&2 && exit 125; }

# --- the packages

have_slurm() {
    local program
    for program in slurmctld slurmd sbatch srun munged; do command -v "$program" >/dev/null || return 1; done
    # srun --mpi=pmix asks for this name, which only the package for developers has
    ! command -v dpkg >/dev/null || compgen -G '/usr/lib/*/libpmix.so' >/dev/null ||
        compgen -G '/usr/lib/*/pmix2/lib/libpmix.so' >/dev/null
}

get_slurm() {
    have_slurm && return
    local sudo=() policy=/usr/sbin/policy-rc.d made=''
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0)
    command -v apt-get >/dev/null || cannot "neither Slurm nor apt-get is there; use Debian 12 or newer, or Ubuntu"
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || cannot "Slurm is not installed, and only root may: apt-get install ${PACKAGES[*]}"
        sudo=(sudo -n)
    fi
    say "installing ${PACKAGES[*]} with apt"
    if [ ! -e "$policy" ]; then # the packages must not start services of the machine
        made=$policy
        printf '#!/bin/sh\nexit 101\n' | "${sudo[@]}" tee "$policy" >/dev/null
        "${sudo[@]}" chmod 755 "$policy"
    fi
    "${sudo[@]}" "${apt[@]}" update >/dev/null || true # an index that is out of reach need not be the one that counts
    "${sudo[@]}" "${apt[@]}" install --yes --no-install-recommends "${PACKAGES[@]}" >/dev/null || true
    [ -z "$made" ] || "${sudo[@]}" rm -f "$made"
    have_slurm || cannot "apt could not install ${PACKAGES[*]}; see above"
}

# --- settings

# So many free ports in a row, below those that the kernel gives to outgoing connections.
free_ports() {
    local count=$1 used first port
    used=" $(awk 'FNR > 1 { sub(".*:", "", $2); printf "%s ", $2 }' /proc/net/tcp /proc/net/tcp6 2>/dev/null)"
    for _ in {1..200}; do
        first=$((10000 + (RANDOM % 4000) * 5))
        for ((port = first; port < first + count; port++)); do
            [[ $used != *" $(printf %04X "$port") "* ]] || continue 2
        done
        echo "$first"
        return
    done
    return 1
}

write_settings() {
    local port=$1 host node
    host=$(hostname -s)
    cat <<END
ClusterName=laboratory
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
# a job queued again waits until the credentials of its last start have expired: 2 minutes unless told
AuthInfo=socket=$LAB/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
TmpFS=$LAB/tmp/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/%n.log
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobs.log
TaskProlog=$LAB/task_prolog
# neither systemd nor cgroups, several nodes on one machine, more processors than there are
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
PropagateResourceLimitsExcept=MEMLOCK
GresTypes=gpu
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# everything soon
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=5
OverTimeLimit=0
MinJobAge=3600
CompleteWait=0
InactiveLimit=0
# who is displaced hears it as it hears of the end of its time
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
END
    for ((node = 1; node <= NODES; node++)); do
        echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=$CPUS Gres=gpu:8 State=UNKNOWN"
    done
    echo "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=20"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF"
}

# --- up, status, down

is_laboratory() { [ -e "$LAB/.laboratory" ]; }
is_up() { is_laboratory && SLURM_CONF=$CONF timeout 10 scontrol ping 2>/dev/null | grep -q ' UP$'; }

# Every step of up and down has the folder for itself; the daemons must not inherit the lock.
locked() {
    local code=0
    exec 9<"$SCRIPT"
    flock 9
    "$@" || code=$?
    exec 9<&-
    return "$code"
}

up() {
    [[ $NODES =~ ^[1-9][0-9]?$ && $CPUS =~ ^[1-9][0-9]*$ ]] ||
        failed "-n $NODES -c $CPUS: 1 to 99 nodes of at least 1 CPU"
    [ "${#LAB}" -le 70 ] || failed "$LAB is too long a path for the sockets in it; name a shorter one in SLURM_LAB"
    [[ $LAB =~ ^[A-Za-z0-9._/-]+$ ]] ||
        failed "$LAB has signs that Slurm's settings cannot hold; name another folder in SLURM_LAB"
    if is_up; then
        say "is up already in $LAB; end it with: SLURM_LAB=$LAB $SCRIPT down"
        return 1
    fi
    get_slurm
    sweep # what a crash may have left
    [ ! -e "$LAB" ] || [ -z "$(ls -A "$LAB")" ] || failed "$LAB holds other files; name another folder in SLURM_LAB"
    trap sweep EXIT # a Ctrl-C from here on
    for _ in 1 2 3; do # another program may take a port in between
        if start; then
            trap - EXIT
            return 0
        fi
        tail -n 5 "$LAB"/log/*.log >&2
        sweep
    done
    failed "did not start; the last lines of its logs are above"
}

start() {
    local port node
    port=$(free_ports $((NODES + 1))) || failed "no $((NODES + 1)) free ports in a row between 10000 and 30000"
    mkdir -p "$LAB"/{log,run,spool,state} || return 1
    touch "$LAB/.laboratory"
    chmod 755 "$LAB" # munged's conditions for the folder of its socket
    (umask 077 && head -c 1024 /dev/urandom >"$LAB/munge.key")
    write_settings "$port" >"$CONF" || return 1
    # GPUs for Slurm to count: any files will do
    mkdir "$LAB/gpu" && touch "$LAB"/gpu/nvidia{0..7} || return 1
    echo "Name=gpu File=$LAB/gpu/nvidia[0-7]" >"$LAB/gres.conf"
    # newer ones use cgroups for more than tracking processes, and know this word
    [[ $(slurmd -V) =~ \ (2[4-9]|[3-9][0-9]|23\.11) ]] && echo CgroupPlugin=disabled >"$LAB/cgroup.conf"
    # every node has a folder for temporary files, as if it were a machine
    # shellcheck disable=SC2016 # slurmd's variable
    printf '#!/bin/sh\necho "export TMPDIR=%q/tmp/$SLURMD_NODENAME"\n' "$LAB" >"$LAB/task_prolog"
    chmod 755 "$LAB/task_prolog"
    daemon munged --force --key-file "$LAB/munge.key" --socket "$LAB/munge.socket" --pid-file "$LAB/run/munged.pid" \
        --log-file "$LAB/log/munged.log" --seed-file "$LAB/munge.seed" || return 1
    daemon slurmctld -c || return 1
    for ((node = 1; node <= NODES; node++)); do
        mkdir -p "$LAB/spool/n$node" "$LAB/tmp/n$node"
        start_node "n$node" || return 1
    done
    for _ in {1..150}; do
        [ "$(SLURM_CONF=$CONF timeout 10 sinfo -h -p batch -o '%T %D' 2>/dev/null)" != "idle $NODES" ] || return 0
        sleep 0.1
    done
    return 1
}

# The variable tells its processes from other nodes'.
start_node() { SLURM_LAB_NODE=$1 daemon slurmd -c -N "$1"; }

# A daemon of this laboratory: the variable tells whose it is, as long as it lives.
daemon() {
    env -u SLURM_JOB_ID SLURM_CONF="$CONF" SLURM_LAB_DAEMON="$LAB" "$@" 9<&- </dev/null >>"$LAB/log/start.log" 2>&1
}

status() {
    if ! is_up; then
        say "is not up in $LAB"
        return 1
    fi
    export SLURM_CONF=$CONF
    sinfo
    squeue
    echo "export SLURM_CONF=$CONF"
}

down() {
    is_laboratory || return 0
    local jobs deadline=$((SECONDS + 10))
    while is_up && [ $SECONDS -lt $deadline ]; do # again and again: a job may just be coming
        jobs=$(SLURM_CONF=$CONF timeout 10 squeue -h -o %A || true)
        [ -n "$jobs$(job_processes)" ] || break
        # shellcheck disable=SC2086 # one word per job
        [ -z "$jobs" ] || SLURM_CONF=$CONF timeout 10 scancel $jobs 2>/dev/null || true
        sleep 0.2
    done
    sweep
}

# Process ids of this laboratory: its daemons, and what was started in its jobs.
# slurmstepd hides its environment, but keeps its node's log open.
daemons() {
    marked "SLURM_LAB_DAEMON=$LAB"
    logging '*'
}
logging() { find /proc/[0-9]*/fd -lname "$LAB/log/$1.log" -printf '%h\n' 2>/dev/null | cut -d/ -f3 | sort -u || true; }
job_processes() { marked "SLURM_CONF=$CONF" 'SLURM_JOB_ID=[0-9].*'; }

# The processes whose environments have all these lines.
marked() {
    local line files=(/proc/[0-9]*/environ)
    for line; do
        mapfile -t files < <(grep -lzx -e "$line" "${files[@]}" 2>/dev/null)
        [ ${#files[@]} -gt 0 ] || return 0
    done
    printf '%s\n' "${files[@]}" | cut -d/ -f3
}

# What a machine does that loses its power.
lose() {
    local processes
    [ -d "$LAB/spool/$1" ] || failed "no node $1 in $LAB"
    processes=$(
        marked "SLURM_LAB_DAEMON=$LAB" "SLURM_LAB_NODE=$1"
        logging "$1"
        marked "SLURM_CONF=$CONF" "SLURMD_NODENAME=$1"
    )
    # shellcheck disable=SC2086 # one word per process
    kill -KILL $processes 2>/dev/null || true
}

mend() {
    [ -d "$LAB/spool/$1" ] || failed "no node $1 in $LAB"
    [ -z "$(marked "SLURM_LAB_DAEMON=$LAB" "SLURM_LAB_NODE=$1")" ] || return 0
    find "$LAB/tmp/$1" -mindepth 1 -delete # as a machine that starts does
    start_node "$1" || failed "slurmd of $1 does not start"
}

# End whatever is left, with TERM and then with KILL, and remove the folder if it is a laboratory's.
sweep() {
    local signal
    for signal in TERM TERM KILL KILL; do
        # shellcheck disable=SC2046 # one word per process
        kill -s "$signal" $(daemons) $(job_processes) 2>/dev/null || break
        for _ in {1..20}; do
            [ -n "$(daemons)$(job_processes)" ] || break
            sleep 0.1
        done
    done
    ! is_laboratory || rm -rf --one-file-system "$LAB"
}

# --- run

run() {
    locked up || exit 125
    # kill -9 of this script must leave nothing either; not a child, for which bash might wait instead of COMMAND
    local guard
    guard=$(setsid "$SCRIPT" _when_gone $$ </dev/null >/dev/null 2>&1 & echo $!)
    # shellcheck disable=SC2064 # the process id of now is meant
    trap "kill -- -$guard 2>/dev/null || true; locked down" EXIT
    trap '' INT # COMMAND hears Ctrl-C itself
    local command code=0
    exec 3<&0 # in the background, so that a signal is heard at once, but with the terminal's input and Ctrl-C
    SLURM_CONF=$CONF SLURM_LAB=$LAB env --default-signal=INT,QUIT "$@" <&3 3<&- &
    command=$!
    trap 'kill -TERM $command 2>/dev/null || true' TERM HUP
    while true; do
        code=0
        wait "$command" || code=$?
        kill -0 "$command" 2>/dev/null || break # else a signal ended the wait, not the command
    done
    if [ "$code" -gt 128 ]; then # perhaps still the signal's: the shell keeps the command's own code
        local again=0
        wait "$command" 2>/dev/null || again=$?
        [ "$again" -eq 127 ] || code=$again
    fi
    return "$code"
}

verb=${1:-}
[ $# -eq 0 ] || shift
while getopts ":n:c:" option; do
    case $option in
        n) NODES=$OPTARG ;;
        c) CPUS=$OPTARG ;;
        *) usage ;;
    esac
done
shift $((OPTIND - 1))
case $verb,$# in
    up,0) locked up || true; status ;;
    status,0) status ;;
    down,0) locked down ;;
    lose,1) lose "$1" ;;
    mend,1) mend "$1" ;;
    run,0) usage ;;
    run,*) run "$@" ;;
    _when_gone,1) tail --pid="$1" -s 0.2 -f /dev/null; locked down ;;
    *) usage ;;
esac
