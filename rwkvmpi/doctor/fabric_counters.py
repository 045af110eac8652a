"""What a port's driver counts, put into four heaps: lost and sent again, bad frames, pauses (PFC), congestion (ECN).

Every driver has names of its own (mlx5, bnxt_re, irdma, rxe, ...), so the heaps go by patterns. Ethernet's own counts,
PFC among them, are the network interface's; they are asked for as `ethtool -S` does.
"""

from __future__ import annotations

import array
import fcntl
import re
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from rwkvmpi.cluster.rdma import SYS, Port, counters

LOST = re.compile(
    r"out_of_seq|packet_seq_err|implied_nak_seq|rcvd_seq_err|seq_err_nak|local_ack_timeout|duplicate_request"
    r"|completer_retry|adp_retrans|retransmit|RetransSegs|oos_drop|retry_exceeded|retry_rnr_exceeded|retries_exceeded"
    r"|port_xmit_discards|discards_phy|prio\d+_discards|discard_pkts|buffer_overrun"
)
BAD_FRAMES = re.compile(r"port_rcv_errors|symbol_err|icrc_encap|crc_errors?_phy|link_integrity_err|link_error_recovery")
PAUSES = re.compile(r"prio(\d+)_pause$")
CONGESTION = re.compile(r"ecn_mark|ECNMrkd|cnp_(sent|handled|pkts)|cnp(Sent|Handled)$")
PACKETS = re.compile(r"^(port_(xmit|rcv)_packets|(sent|rcvd)_pkts|[rt]x_pkts|ip[46](In|Out)Pkts)$")
TOLERATED, FEW = 1e-6, 3  # of the packets, and at least so many: a switch that was restarted once is no fault

_ETHTOOL, _STRING_COUNTS, _STRINGS, _VALUES = 0x8946, 0x37, 0x1B, 0x1D  # the ioctl and three of its commands
_STATISTICS, _NAME_BYTES, _MOST = 1, 32, 20_000
_DCB_LIMIT_S = 5


class Heaps(NamedTuple):
    """The counts that are not zero, by heap."""

    lost: dict[str, int]
    bad_frames: dict[str, int]
    pauses: dict[str, int]
    congestion: dict[str, int]
    packets: int

    @property
    def worth_a_warning(self) -> bool:
        """More was lost or damaged than chance explains."""
        return sum(self.lost.values()) + sum(self.bad_frames.values()) > max(FEW, TOLERATED * self.packets)


def read(port: Port, root: Path = SYS) -> dict[str, int]:
    """All counts of a port and of its network interface, by the drivers' names."""
    ours = counters(port, root)
    return ours if root != SYS else interface_counters(port.interface) | ours


def heaps(counts: dict[str, int]) -> Heaps:
    """Sort counts into heaps; names that fit none are left out."""

    def heap(pattern: re.Pattern[str]) -> dict[str, int]:
        return {name: value for name, value in counts.items() if value > 0 and pattern.search(name)}

    packets = sum(value for name, value in counts.items() if PACKETS.search(name))
    return Heaps(heap(LOST), heap(BAD_FRAMES), heap(PAUSES), heap(CONGESTION), packets)


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What was counted between two readings."""
    return {name: value - before.get(name, 0) for name, value in after.items()}


def listed(counts: dict[str, int]) -> str:
    """The counts in a line, the largest first."""
    return ", ".join(f"{name} {value:,}" for name, value in sorted(counts.items(), key=lambda item: -item[1]))


def paused_priorities(counts: dict[str, int]) -> list[int]:
    """Priorities on which PFC has paused somebody."""
    return sorted({int(match[1]) for name, value in counts.items() if value and (match := PAUSES.search(name))})


def pfc_priorities(interface: str) -> list[int] | None:
    """Priorities with PFC as the interface has it set; None where nobody can tell (no tool `dcb`, no such driver)."""
    program = shutil.which("dcb")
    if not interface or program is None:
        return None
    try:
        done = subprocess.run(
            [program, "pfc", "show", "dev", interface], capture_output=True, text=True, timeout=_DCB_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    line = re.search(r"prio-pfc((?: +\d:o(?:n|ff))+)", done.stdout)
    return [int(number) for number in re.findall(r"(\d):on", line[1])] if line else None


def interface_counters(interface: str) -> dict[str, int]:
    """What a network interface's driver counts, as `ethtool -S` shows it; {} where it shows nothing."""
    if not interface:
        return {}
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            return _ethtool(handle, interface)
    except OSError:
        return {}


def _ethtool(handle: socket.socket, interface: str) -> dict[str, int]:
    def ask(question: bytes, room: int) -> bytes:
        buffer = array.array("B", question.ljust(room, b"\0"))
        request = struct.pack("16sQ", interface.encode()[:15], buffer.buffer_info()[0])
        fcntl.ioctl(handle, _ETHTOOL, request)
        return buffer.tobytes()

    answer = ask(struct.pack("=IIQ", _STRING_COUNTS, 0, 1 << _STATISTICS), 20)
    count = struct.unpack_from("=I", answer, 16)[0] if struct.unpack_from("=Q", answer, 8)[0] else 0
    if not 0 < count <= _MOST:
        return {}
    names = ask(struct.pack("=III", _STRINGS, _STATISTICS, count), 12 + _NAME_BYTES * count)
    values = ask(struct.pack("=II", _VALUES, count), 8 + 8 * count)
    found = {}
    for number in range(count):
        start = 12 + _NAME_BYTES * number
        name = names[start : start + _NAME_BYTES].split(b"\0")[0].decode("ascii", errors="replace").strip()
        found[name] = struct.unpack_from("=Q", values, 8 + 8 * number)[0]
    return found
