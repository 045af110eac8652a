# shellcheck shell=bash
# The fabric's settings for Open MPI with UCX over RoCE v2. Sourced by rwkvmpi.sbatch; mpirun passes them to all ranks.

export OMPI_MCA_pml=ucx # refuse to start rather than fall back to TCP without a word

# The ports to use, as `rwkvmpi doctor` or ibdev2netdev lists them, for instance mlx5_0:1,mlx5_1:1
export UCX_NET_DEVICES=CHANGE_DEVICES

# rc with what it needs to connect, and shared memory inside a node. Messages pass through host memory; add cuda_copy
# and cuda_ipc only where sending from device memory has been seen to work: a wrong setting crashes.
export UCX_TLS=rc,sm,self

# The GID of type RoCE v2 whose address is the port's (`show_gids`); 0 is usually the link-local one and wrong.
export UCX_IB_GID_INDEX=CHANGE_GID_INDEX

# The traffic class that the site's switches treat as lossless, DSCP * 4; 106 is a common choice.
export UCX_IB_TRAFFIC_CLASS=CHANGE_TRAFFIC_CLASS

# UCX's default of 7 means for ever: a dead link would hang the job instead of ending it.
export UCX_RC_VERBS_RETRY_COUNT=4 UCX_RC_MLX5_RETRY_COUNT=4 UCX_DC_MLX5_RETRY_COUNT=4

# RDMA needs locked memory. Slurm may pass on the login node's small limit: see PropagateResourceLimitsExcept=MEMLOCK.
ulimit -S -l "$(ulimit -H -l)"
if [ "$(ulimit -l)" != unlimited ]; then
    echo "warning: only $(ulimit -l) KiB may be locked on $(hostname); RDMA may fail to start" >&2
fi
