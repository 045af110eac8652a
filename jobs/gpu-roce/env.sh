# shellcheck shell=bash
# The fabric's settings for Open MPI with UCX, and for the verbs transport, over RoCE v2. Sourced by rwkvmpi.sbatch;
# launch.sh passes the variables to all ranks. On a node of the cluster this writes such a file with what it finds:
#
#     rwkvmpi doctor --emit env > jobs/gpu-roce/env.sh

# MPI takes the RDMA ports, and refuses to start rather than fall back to TCP without a word. Leave it out to have
# transport = "auto" use verbs between nodes.
export OMPI_MCA_pml=ucx

# Reliable connections with what they need to connect, and shared memory inside a node. Add cuda_copy and cuda_ipc where
# this UCX has them: a run tries in a child process whether a GPU's memory can be sent, and uses the host's where not.
export UCX_TLS=rc,sm,self

# The ports to use, as `rwkvmpi doctor --fabric` or ibdev2netdev lists them, for instance mlx5_0:1,mlx5_1:1. Each rank
# takes the one next to its GPU. Without this line a slow port, for storage perhaps, may be among them.
export UCX_NET_DEVICES=CHANGE_DEVICES

# The GID of type RoCE v2 whose address is the port's own (`rwkvmpi doctor --fabric`, show_gids); 0 is usually the
# link-local one, which no router passes on. Leave it out where ports differ: MPI and verbs then look for it themselves.
export UCX_IB_GID_INDEX=CHANGE_GID_INDEX

# Lossless fabric (PFC): the traffic class leads to the priority that switches never drop, DSCP * 4 + 2; the 2 lets them
# mark packets for ECN. 106 is DSCP 26, priority 3 in the usual table; `mlnx_qos -i INTERFACE` shows this node's.
# Lossy fabric: the class that the site gives to RDMA, else leave it out. In a wrong class RDMA works until the network
# is busy, and then crawls.
export UCX_IB_TRAFFIC_CLASS=CHANGE_TRAFFIC_CLASS

# UCX's default of 7 means for ever: a dead link would hang the job instead of ending it. Lossless: 4. Lossy: 6, the
# most that ends, since a repetition may get lost as well.
export UCX_RC_VERBS_RETRY_COUNT=4 UCX_RC_MLX5_RETRY_COUNT=4 UCX_DC_MLX5_RETRY_COUNT=4

# The verbs transport follows UCX_NET_DEVICES, UCX_IB_GID_INDEX and UCX_IB_TRAFFIC_CLASS. Where it shall differ: one
# port for all ranks, or a list that goes by the rank's number on its node; the GID index; the traffic class.
# export RWKVMPI_RDMA_PORTS=mlx5_0:1,mlx5_1:1 RWKVMPI_RDMA_GID_INDEX=3 RWKVMPI_RDMA_TRAFFIC_CLASS=106

# A GPU's memory is never given to MPI, whatever the trial finds; for a site where even that does harm.
# export RWKVMPI_DEVICE_MPI=0

# RDMA needs locked memory. Slurm may pass on the login node's small limit: see PropagateResourceLimitsExcept=MEMLOCK.
ulimit -S -l "$(ulimit -H -l)"
if [ "$(ulimit -l)" != unlimited ]; then
    echo "warning: only $(ulimit -l) KiB may be locked on $(hostname); RDMA may fail to start" >&2
fi
