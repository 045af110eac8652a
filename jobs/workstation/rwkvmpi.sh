#!/bin/bash
# Reads the documents of job.toml on this machine, without Slurm; start it in the project's folder:
#
#     jobs/workstation/rwkvmpi.sh [OPTIONS OF rwkvmpi run]       # Ctrl-C: commit and leave; twice: leave at once
#     nohup jobs/workstation/rwkvmpi.sh >/dev/null 2>&1 &        # stays when you log out; so does one in tmux
#     kill PID                                                   # the script's, which the log names: commit and leave
#
# As a service, which `systemctl --user stop rwkvmpi` tells to commit and leave (`loginctl enable-linger` keeps it when
# you log out):
#
#     systemd-run --user --unit=rwkvmpi --same-dir -p KillMode=mixed -p TimeoutStopSec=10min -p SuccessExitStatus=75 \
#         jobs/workstation/rwkvmpi.sh
#
# Change what says CHANGE_... in job.toml. Settings of the environment: RANKS (1 per 4 processors), JOB (the job file),
# RUN (the run folder), LOG, VENV, DOCTOR (1: examine the machine first), MAX_RESTARTS (0): so many times it goes on by
# itself when it ended early without having been told to, as after --max-time or when a rank died. The same command goes
# on at any time. Exit code: 0 when RUN/SUCCESS is there, 75 when it can go on, another for a mistake.
set -u

HOME_FOLDER=$PWD
VENV=${VENV:-$HOME_FOLDER/.venv}
JOB=${JOB:-$HOME_FOLDER/jobs/workstation/job.toml}
RUN=${RUN:-$HOME_FOLDER/runs/rwkvmpi}
LOG=${LOG:-$RUN.log}
RANKS=${RANKS:-$((($(nproc) + 3) / 4))}

# shellcheck source=/dev/null
source "$VENV/bin/activate" || exit 2
# shellcheck source=jobs/launch.sh
source "$HOME_FOLDER/jobs/launch.sh" || exit 2

mkdir -p "$(dirname "$LOG")" || exit 2
if [ -t 1 ]; then # to the terminal too, as long as it is there
    exec > >(trap '' INT HUP TERM && exec tee -a "$LOG") 2>&1
    SHOWN=$!
    trap 'exec >&- 2>&-; wait $SHOWN' EXIT # the last lines before the prompt
else
    exec >>"$LOG" 2>&1
fi
echo "$(date '+%F %T') process $$: $RANKS ranks, $JOB into $RUN"

SESSION=setsid LAUNCH=mpirun # the terminal's signals are for this script alone
for ((starts = 1; ; starts++)); do
    examine_and_start rwkvmpi run "$JOB" -o "$RUN" "$@"
    if is_done "$RUN"; then
        [ "$CODE" -ne 3 ] || echo "done; some documents failed, see documents/error in $RUN/results.h5"
        exit 0
    fi
    if ! worth_another_start "$RUN"; then
        echo "not done (exit code $CODE)"
        exit "$CODE"
    fi
    if [ -n "$TOLD" ] || [ -e "$RUN/STOP" ] || [ "$starts" -gt "${MAX_RESTARTS:-0}" ]; then
        echo "not done (exit code $CODE); the same command goes on"
        exit 75
    fi
    echo "not done (exit code $CODE); restart $starts of ${MAX_RESTARTS}"
done
