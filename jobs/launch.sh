# shellcheck shell=bash
# Sourced by the batch scripts: starts the ranks, passes signals on, judges the result, queues the job again.
#
# Slurm's signal (--signal=B:USR1@300) reaches the batch script only. Passed on to mpirun or srun as SIGUSR1 it reaches
# every rank: they finish their chunk, commit and leave with code 75. SIGTERM must not be passed on to Open MPI's
# mpirun, which kills the ranks half a second later; so it becomes SIGUSR1 here.

# How the ranks are started: mpirun (any MPI; the default), pmix (srun, Open MPI), pmi2 (srun, MPICH).
launch() {
    local name options=()
    # srun does not take these over from the batch job by itself
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    tell_end_of_job
    case ${LAUNCH:-mpirun} in
    mpirun)
        if mpirun --version 2>/dev/null | grep -q 'Open MPI'; then
            options=(--bind-to none) # the ranks bind themselves to their share of the cores
            for name in "${!UCX_@}" "${!OMPI_MCA_@}" "${!RWKVMPI_@}"; do options+=(-x "$name"); done
        fi
        run_and_wait mpirun -n "$SLURM_NTASKS" "${options[@]}" "$@"
        ;;
    pmix)
        if [ -e "${VIRTUAL_ENV:-}/lib/libmpi.so.40" ]; then # the wheel's mpirun sets this for its library, srun does not
            export OPAL_PREFIX=$VIRTUAL_ENV PMIX_PREFIX=$VIRTUAL_ENV
        fi
        # Slurm asks for modules that not every Open MPI has; set inside the task, where Slurm does not set them again
        run_and_wait srun --mpi=pmix --kill-on-bad-exit=1 env PMIX_SECURITY_MODE=native PMIX_GDS_MODULE=hash "$@"
        ;;
    pmi2) run_and_wait srun --mpi=pmi2 --kill-on-bad-exit=1 "$@" ;;
    *)
        echo "LAUNCH=$LAUNCH is none of mpirun, pmix, pmi2" >&2
        exit 2
        ;;
    esac
}

# Older Slurms do not set SLURM_JOB_END_TIME, by which the ranks stop in time even if no signal reaches them.
tell_end_of_job() {
    local text
    [ -z "${SLURM_JOB_END_TIME:-}" ] && text=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e 2>/dev/null) || return 0
    text=$(date --date "$text" +%s 2>/dev/null) && export SLURM_JOB_END_TIME=$text # NONE, where there is no limit
    return 0
}

pass_on() {
    echo "$(date +%T) told to stop: the ranks commit and leave" >&2
    TOLD=yes
    kill -USR1 "$1" 2>/dev/null
}

# Run a command in the background, so that the traps run at once, and leave its exit code in CODE.
run_and_wait() {
    local pid
    STARTED=$(date +%s) TOLD=
    "$@" &
    pid=$!
    # shellcheck disable=SC2064 # the process id of now is meant
    trap "pass_on $pid" USR1 TERM
    CODE=0
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
    trap - USR1 TERM
}

# RUN/SUCCESS decides, not the exit code: mpirun returns 0 when a node is lost. What is stopped or lost goes on after
# requeueing, with as many nodes as the job has then; what a person stopped (RUN/STOP), or what cannot work, does not.
judge_and_requeue() {
    local run=$1 restarts=${SLURM_RESTART_COUNT:-0}
    if [ -e "$run/SUCCESS" ]; then
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
    echo "not done (exit code $CODE); queueing job $SLURM_JOB_ID again, restart $((restarts + 1))" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
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
