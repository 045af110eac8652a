# shellcheck shell=bash
# Sourced by submit.sh, rwkvmpi.sbatch and merge.sbatch, which must agree.

# The corpus is cut into so many parts of about the same size, one element of the array each. Take some times more than
# run at once, so that none is waited for alone; a part needs minutes at least to be worth its start, and Slurm allows
# so many elements as `scontrol show config | grep MaxArraySize` says, less one. It cannot change while parts are there.
SHARDS=${SHARDS:-16}

# At most so many at once; empty: as many as the queue lets run.
AT_ONCE=${AT_ONCE:-}

# The parts' run folders lie here, as part-00001 and so on, and the whole as `all`.
RUN=${RUN:-$HOME_FOLDER/runs/array}

part() { printf '%s/part-%05d' "$RUN" "$((10#$1))"; }
