#!/bin/bash
# Three jobs, each when the one before has succeeded: reads documents and keeps their states; scores what they have
# grown by, going on from there; exports the scores as JSON lines. Start it in the project's folder, on a login node:
#
#     jobs/chain/submit.sh [OPTIONS OF rwkvmpi run]      # for both readings, for instance --ring 8
#
# Change what says CHANGE_... in rwkvmpi.sbatch, export.sbatch, read.toml and score.toml. A link that fails takes those
# behind it with it: Slurm cancels them, since what they wait for can never come. The same command again goes on; what
# is done already ends at once. Another chain beside it: RUN=runs/other jobs/chain/submit.sh. SBATCH_OPTIONS has more
# options of sbatch for both readings, as SBATCH_OPTIONS="--qos=long --nodes=4".
set -eu

HOME_FOLDER=$PWD
export RUN=${RUN:-$HOME_FOLDER/runs/chain}

# submit NAME JOB_BEFORE SCRIPT [ARGUMENTS]: a link of the chain; its number is left in NUMBER.
submit() {
    local name=$1 before=$2 after=()
    shift 2
    [ -z "$before" ] || after=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
    NUMBER=$(sbatch --parsable --job-name="rwkvmpi-$name" "${after[@]}" "$@")
    NUMBER=${NUMBER%;*} # the cluster's name, where there are several
    echo "$name $NUMBER${before:+: when $before has succeeded}"
}

# shellcheck disable=SC2086 # options are words
TASK="read" submit read "" ${SBATCH_OPTIONS:-} jobs/chain/rwkvmpi.sbatch "$@"
# shellcheck disable=SC2086
TASK="score" submit score "$NUMBER" ${SBATCH_OPTIONS:-} jobs/chain/rwkvmpi.sbatch --from "$RUN/read" "$@"
submit export "$NUMBER" jobs/chain/export.sbatch
echo "results: $RUN/scores.jsonl"
