# shellcheck shell=bash
# Sourced by the job scripts: starts the ranks, passes signals on, judges the result, queues the job again.
#
# Slurm's signal (--signal=B:USR1@300) reaches the batch script only. Passed on to mpirun or srun as SIGUSR1 it reaches
# every rank: they finish their chunk, commit and leave with code 75. SIGTERM must not be passed on to Open MPI's
# mpirun, which kills the ranks half a second later; so it becomes SIGUSR1 here.

# Start the ranks of a batch job: LAUNCH says how.
launch() {
    export SLURM_EXPORT_ENV=ALL # sbatch --export=NONE would have srun, and with it mpirun, start ranks with nothing
    count_tasks
    RANKS=$SLURM_NTASKS
    tell_end_of_job
    examine_and_start "$@"
}

# DOCTOR=1 has the nodes examined first, by ranks that are started the same way.
examine_and_start() {
    local folder
    if [ "${DOCTOR:-0}" != 0 ]; then
        folder=$(dirname "${RUN:-.}") && mkdir -p "$folder" || exit 2
        start_ranks rwkvmpi doctor --all-ranks --folder "$folder"
        if [ -n "$TOLD" ]; then
            CODE=75
            return
        fi
        if [ "$CODE" -ne 0 ]; then
            echo "nothing was read (exit code $CODE of doctor, see above); DOCTOR=0 skips it" >&2
            exit "$CODE"
        fi
    fi
    start_ranks "$@"
}

# mpirun (any MPI; the default), pmix (srun, Open MPI), pmi2 (srun, MPICH).
start_ranks() {
    case ${LAUNCH:-mpirun} in
    mpirun) with_mpirun "$@" ;;
    pmix)
        if [ -e "${VIRTUAL_ENV:-}/lib/libmpi.so.40" ]; then # as the wheel's mpirun sets it, srun does not
            export OPAL_PREFIX=$VIRTUAL_ENV PMIX_PREFIX=$VIRTUAL_ENV
        fi
        # Slurm asks for modules that not every Open MPI has; set inside the task, where Slurm does not set them again
        with_srun --mpi=pmix env PMIX_SECURITY_MODE=native PMIX_GDS_MODULE=hash "$@"
        ;;
    pmi2) with_srun --mpi=pmi2 "$@" ;;
    *)
        echo "LAUNCH=$LAUNCH is none of mpirun, pmix, pmi2" >&2
        exit 2
        ;;
    esac
}

with_srun() {
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from the batch job by itself
    run_and_wait srun --kill-on-bad-exit=1 "$@"
}

# mpirun starts one process of its own per node with srun, and all ranks of the node live in what that one gets: the
# whole of the job's cores there, unless these variables tell srun to give it a single task's. SESSION=setsid keeps the
# terminal's Ctrl-C from it.
with_mpirun() {
    local name options=()
    if mpirun --version 2>/dev/null | grep -q 'Open MPI'; then
        options=(--bind-to none) # the ranks bind themselves to their share of the cores
        for name in "${!UCX_@}" "${!OMPI_MCA_@}" "${!RWKVMPI_@}"; do options+=(-x "$name"); done
    fi
    # shellcheck disable=SC2086 # nothing or one word
    run_and_wait ${SESSION:-} env -u SRUN_CPUS_PER_TASK -u SLURM_CPUS_PER_TASK \
        mpirun -n "$RANKS" "${options[@]}" "$@"
}

# A job that got other nodes while it waited still has the number of tasks that it was submitted with, and srun goes by
# it. SLURM_TASKS_PER_NODE, as 2(x3),1, is that of the nodes it has now.
count_tasks() {
    local part count=0
    for part in $(tr , ' ' <<<"${SLURM_TASKS_PER_NODE:-}"); do
        [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]] || return 0
        count=$((count + BASH_REMATCH[1] * ${BASH_REMATCH[3]:-1}))
    done
    [ "$count" -eq 0 ] || export SLURM_NTASKS=$count SLURM_NPROCS=$count
}

# Older Slurms do not set SLURM_JOB_END_TIME, by which the ranks stop in time even if no signal reaches them; what is
# there may be that of a job from which this one was submitted.
tell_end_of_job() {
    local text
    text=$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs "$(this_job)" --format %e 2>/dev/null)
    [ -n "$text" ] || return 0
    text=$(date --date "$text" +%s 2>/dev/null) || text= # NONE, where there is no limit
    export SLURM_JOB_END_TIME=$text
}

# An element of an array by its array and index: the number of one of them is also that of the whole array.
this_job() { echo "${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"; }

# A signal while no ranks run must not end this script, which has to judge, or to queue the job again.
remember() {
    echo "$(date +%T) told to stop" >&2
    TOLD=yes
}
TOLD=
trap remember USR1 TERM HUP INT

pass_on() {
    if [ "$2$TOLD" = INTyes ]; then
        echo "$(date +%T) Ctrl-C again: the ranks leave at once; the last commit stands" >&2
        kill -TERM "$1" 2>/dev/null
        return
    fi
    echo "$(date +%T) told to stop: the ranks commit and leave" >&2
    TOLD=yes
    kill -USR1 "$1" 2>/dev/null
}

# Run a command in the background, so that the traps run at once, and leave its exit code in CODE.
run_and_wait() {
    local pid name
    STARTED=$(date +%s) CODE=75
    [ -z "$TOLD" ] || return 0
    "$@" &
    pid=$!
    # shellcheck disable=SC2064 # the process id of now is meant
    for name in USR1 TERM HUP INT; do trap "pass_on $pid $name" "$name"; done
    [ -z "$TOLD" ] || kill -USR1 "$pid" 2>/dev/null # told just before
    while true; do
        wait "$pid"
        CODE=$?
        kill -0 "$pid" 2>/dev/null || break # else a signal ended the wait, not the command
    done
    if [ "$CODE" -gt 128 ]; then # perhaps still the signal's: the shell keeps the command's own code
        local again=0
        wait "$pid" 2>/dev/null || again=$?
        [ "$again" -eq 127 ] || CODE=$again
    fi
    trap remember USR1 TERM HUP INT
}

# RUN/SUCCESS decides, not the exit code: mpirun returns 0 when a node is lost. What is stopped or lost goes on after
# requeueing, with as many nodes as the job has then; what a person stopped (RUN/STOP, scancel), or what cannot work,
# does not. Ends the script: with 0 only for results of this job, so that afterok is right.
judge_and_requeue() {
    local run=$1 restarts=${SLURM_RESTART_COUNT:-0}
    if is_done "$run"; then
        [ "$CODE" -ne 3 ] || echo "done; some documents failed, see documents/error in $run/results.h5" >&2
        exit 0
    fi
    if [ -e "$run/STOP" ] || ! worth_another_start "$run"; then
        echo "not done (exit code $CODE); submit the same job again to go on" >&2
        [ "$CODE" -ne 0 ] || CODE=1
        exit "$CODE"
    fi
    if [ "$restarts" -ge "${MAX_RESTARTS:-50}" ]; then
        echo "not done after $restarts restarts; submit the same job again to go on" >&2
        exit 75
    fi
    if is_cancelled; then
        echo "Slurm ends this job (exit code $CODE); cancelled, it goes on when it is submitted again" >&2
        exit 75
    fi
    echo "not done (exit code $CODE); queueing job $(this_job) again, restart $((restarts + 1))" >&2
    for _ in 1 2 3; do # Slurm's controller may be away for a moment, as after the loss of a node
        scontrol requeue "$(this_job)" && exit 75
        sleep "${REQUEUE_PAUSE:-20}"
    done
    echo "Slurm does not queue it again; submit the same job again to go on" >&2
    exit 75
}

# SUCCESS may be an earlier job's, while this one was refused (exit code 2) or did not even start.
is_done() {
    [ -e "$1/SUCCESS" ] || return 1
    case $CODE in
    0 | 3) return 0 ;;
    2) return 1 ;;
    esac
    [ -n "$(find "$1/SUCCESS" -newermt "@$STARTED" 2>/dev/null)" ] # what came after it, as MPI's end, does not count
}

# Stopped in good order, or a lost node under mpirun; else a signal may have come before the ranks could hear it, or
# srun says how a rank fared whose neighbour's node was lost. A crash is tried again if this start came to a commit:
# what crashes at the same place every time comes to none.
worth_another_start() {
    case $CODE in
    0 | 75) return 0 ;;
    2) return 1 ;;
    esac
    [ -n "$TOLD" ] || [ -n "$(find "$1/commits" -name '*.json' -newermt "@$STARTED" -print -quit 2>/dev/null)" ]
}

# Slurm would queue a cancelled job again as readily. While it ends a job, that job's state is COMPLETING, whatever the
# reason; time that ran out before the ranks could stop is one to go on.
is_cancelled() {
    local words
    words=$(scontrol --oneliner show job "$(this_job)" 2>/dev/null) || return 1
    [[ $words =~ JobState=(COMPLETING|CANCELLED)\  && ! $words =~ \ Reason=TimeLimit\  ]]
}
