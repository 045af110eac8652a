#!/bin/bash
# In the laboratory: roce-mpirun PROGRAM... starts two ranks, rank 0 on port rxe0 and rank 1 on rxe1, as on two nodes.
#
# MPI takes reliable-connection verbs and no other way, so that a message of MPI is a message of RoCE. With
# ROCE_MPI=local it takes shared memory, so that nothing is on the cable but what the program itself sends by verbs.
# The mpirun is the one beside PROGRAM, if there is one.

beside=$(dirname "$1")/mpirun
[ -x "$beside" ] || beside=mpirun
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
common=(--bind-to none --map-by :oversubscribe --mca osc ^ucx)
if [ "${ROCE_MPI:-roce}" = local ]; then
    common+=(--mca pml ob1 --mca btl self,sm)
else
    # ud_verbs only introduces the ranks to each other; its check of addresses is wrong for Soft-RoCE, whose packets
    # carry no such header. Long messages go by RDMA WRITE: a READ waits out a retransmission now and then. Soft-RoCE
    # takes a retry count of 7 as "for ever": a dead link would never be reported; with 6 UCX gives up after a quarter
    # of a minute, with an abort that says little, so a --deadline below that gives the better sentence.
    export UCX_TLS=${UCX_TLS:-rc_verbs,ud_verbs:aux,self} UCX_UD_VERBS_ETH_DGID_CHECK=n UCX_WARN_UNUSED_ENV_VARS=n
    export UCX_RNDV_SCHEME=${UCX_RNDV_SCHEME:-put_zcopy} UCX_RC_VERBS_RETRY_COUNT=${UCX_RC_VERBS_RETRY_COUNT:-6}
    common+=(--mca pml ucx --mca pml_ucx_tls any --mca pml_ucx_devices any --mca btl self)
fi
exec "$beside" "${common[@]}" -n 1 -x UCX_NET_DEVICES=rxe0:1 -x RWKVMPI_RDMA_PORTS=rxe0:1 "$@" : \
    -n 1 -x UCX_NET_DEVICES=rxe1:1 -x RWKVMPI_RDMA_PORTS=rxe1:1 "$@"
