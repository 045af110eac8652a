"""Two ranks of mpirun that measure raw verbs with whatever ib_write_lat and ib_write_bw they find."""

import json

from mpi4py import MPI

from rwkvmpi.bench import perftest
from rwkvmpi.cluster import rdma


def port(local_rank: int, gpu: str) -> rdma.Port:
    """What Soft-RoCE shows."""
    gid = rdma.Gid(1, f"0000:0000:0000:0000:0000:ffff:0a4d:000{local_rank + 1}", "RoCE v2", f"v{local_rank}")
    return rdma.Port(f"rxe{local_rank}", 1, "ACTIVE", "Ethernet", 2.5, 4096, f"v{local_rank}", -1, "", (gid,))


rdma.ports = lambda: [port(0, ""), port(1, "")]
rdma.port_of_rank = port
comm = MPI.COMM_WORLD
found = perftest.measure(comm, {"64 B": 64, "1 MiB": 1 << 20}, comm.rank)
if comm.rank == 0:
    print(json.dumps(found))
