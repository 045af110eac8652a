#!/bin/bash
# Reads a large corpus in parts, each an element of a job array, and then puts their results together; start it in the
# project's folder, on a login node:
#
#     jobs/array/submit.sh [OPTIONS OF rwkvmpi run]
#     rwkvmpi status runs/array                          # which parts are done, run, wait or have failed
#
# Change what says CHANGE_... in rwkvmpi.sbatch, merge.sbatch and job.toml, and the number of parts in settings.sh.
# SBATCH_OPTIONS has more options of sbatch for the parts, as SBATCH_OPTIONS="--qos=long --ntasks-per-node=4".
# After a failure the same command again submits the parts that are not done, and the merge. One part alone:
#
#     sbatch --array=7 jobs/array/rwkvmpi.sbatch [OPTIONS OF rwkvmpi run]
set -eu

HOME_FOLDER=$PWD
# shellcheck source=jobs/array/settings.sh
source "$HOME_FOLDER/jobs/array/settings.sh"
export SHARDS RUN

todo=()
for ((shard = 1; shard <= SHARDS; shard++)); do
    [ -e "$(part $shard)/SUCCESS" ] || todo+=("$shard")
done

after=()
if [ ${#todo[@]} -eq 0 ]; then
    echo "all $SHARDS parts in $RUN are done"
else
    if [ ${#todo[@]} -eq "$SHARDS" ]; then elements=1-$SHARDS; else elements=$(IFS=, && echo "${todo[*]}"); fi
    # shellcheck disable=SC2086 # options are words
    array=$(sbatch --parsable --array="$elements${AT_ONCE:+%$AT_ONCE}" ${SBATCH_OPTIONS:-} \
        jobs/array/rwkvmpi.sbatch "$@")
    array=${array%;*} # the cluster's name, where there are several
    echo "array $array: parts $elements of $SHARDS into $RUN"
    # a part that fails for good makes the merge impossible: Slurm then cancels it instead of keeping it for ever
    after=(--dependency="afterok:$array" --kill-on-invalid-dep=yes)
fi
merge=$(sbatch --parsable "${after[@]}" jobs/array/merge.sbatch)
echo "merge ${merge%;*}${after:+: when all of them have succeeded}, into $RUN/all"
