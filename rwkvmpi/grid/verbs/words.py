"""What the numbers that verbs give for a failure mean, and what helps."""

from __future__ import annotations

import errno
import os

_LINK = "look whether its node, the link and the switch are up (`rwkvmpi doctor --fabric`, `rdma link`)"
_OWN = "look whether this port is up (`rdma link`, `ip link`) and at `dmesg`"
PROGRAM = "look at `dmesg` and the ports' error counters (`rwkvmpi doctor --fabric`), or use --transport mpi"

# ibv_wc_status: (what happened, remedy)
_STATUS = {
    1: ("sent more than its receive could hold", PROGRAM),
    2: ("cannot be sent to: this port refused the operation, as it does when its link is down", _OWN),
    4: ("cannot be sent to: memory of this rank is not registered", PROGRAM),
    5: ("cannot be reached any more: the connection has failed", _LINK),
    8: ("wrote where it was not allowed to", PROGRAM),
    9: ("refused a message as malformed", PROGRAM),
    10: ("refused a message: its memory is not registered any more; its process may have ended", _LINK),
    11: ("could not take a message: its port reported an error of its own", _LINK),
    12: (
        "did not answer, however often a message was repeated: it or the way to it is gone",
        "look whether its node, the link and the switch are up and pass packets of full size (`rwkvmpi doctor "
        "--fabric`, `rdma link`, the MTU of `ip link`)",
    ),
    13: ("has no receive posted, however often a message was repeated", PROGRAM),
    19: ("cannot be reached: this port reported a fatal error", _OWN),
    21: ("cannot be reached: this port reported an error", _OWN),
}


def of_status(status: int, vendor: int = 0) -> tuple[str, str]:
    """(what the neighbour did or cannot, remedy) for the status of a completion that failed."""
    what, remedy = _STATUS.get(status, ("cannot be reached: the port reported an error", _OWN))
    return f"{what} (completion status {status}{f', vendor error {vendor:#x}' if vendor else ''})", remedy


def of_connecting(number: int) -> str:
    """Why a queue pair could not be connected with a neighbour's, by errno, with the remedy."""
    if number == errno.ETIMEDOUT:
        return "its address does not answer (errno 110); see that it can be reached (ping), and the GID index is right"
    if number in (errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH):
        return (
            f"there is no way to its address ({_named(number)}); see that the link is up and routed (ip route, ip link)"
        )
    if number == errno.EINVAL:
        return "the driver refused the addresses (errno 22); set RWKVMPI_RDMA_GID_INDEX to an entry of RoCE v2 on both"
    if number == errno.ENODEV:
        return "the port's network interface is gone (errno 19); see `rdma link`"
    return f"the driver refused ({_named(number)}); see `dmesg`"


def of_opening(device: str, number: int) -> str:
    """Why a device could not be opened, by errno, with the remedy."""
    if number in (errno.EACCES, errno.EPERM):
        return (
            f"no permission to use the RDMA device {device}; /dev/infiniband/uverbs* must be readable and writable "
            "for you (udev rules of rdma-core, or --device /dev/infiniband in a container)"
        )
    if number == errno.ENOENT:
        return f"the RDMA device {device} cannot be opened: /dev/infiniband/uverbs* is missing; modprobe ib_uverbs"
    return f"the RDMA device {device} cannot be opened ({_named(number)}); see `dmesg` and `ibv_devinfo`"


def of_refusal(port: str, what: str, limit: str, number: int) -> str:
    """Why the port does not give or take `what`, by errno, with the remedy. `limit` is that of locked memory."""
    if number in (errno.ENOMEM, errno.EAGAIN, errno.EPERM):
        return (
            f"{port} refuses {what} ({_named(number)}); the limit of locked memory is {limit}: `ulimit -l unlimited` "
            "(memlock in /etc/security/limits.d, PropagateResourceLimitsExcept=MEMLOCK in Slurm)"
        )
    return f"{port} refuses {what} ({_named(number)}); see `dmesg`"


def _named(number: int) -> str:
    return f"errno {number}: {os.strerror(number)}"
