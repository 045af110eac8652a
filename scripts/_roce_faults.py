#!/usr/bin/env python3
"""Faults of the RoCE laboratory's cable, for its shell (as roce-fault) and for programs that import this.

roce-fault loss 10              of 100 packets, this many do not arrive, either way
roce-fault delay 20             milliseconds, either way
roce-fault hole [v0]            nothing arrives any more (what v0 sends; without a name, either way)
roce-fault down [v1]            the link of this end goes down ...
roce-fault up [v1]              ... and up again
roce-fault mtu 1500 [v1]        this end takes no longer packets
roce-fault mend                 everything as in the beginning
roce-fault counters             packets and errors of both ports

--after SECONDS waits before; --for SECONDS mends afterwards. Both in the foreground: add & in the shell.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ENDS = ("v0", "v1")
TRUNK = ("t0", "t1")  # the cable between the two switches
PORTS = {"v0": "rxe0", "v1": "rxe1"}
ADDRESSES = {"v0": "10.77.0.1", "v1": "10.77.0.2"}
TABLES = {"v0": "100", "v1": "101"}  # where _roce_guest.sh keeps the way to the other end
MTU = 4200
SETTLED_S = 10.0


def loss(percent: float) -> None:
    """Lose this share of the packets, each by chance, either way."""
    _disturb(ENDS, "loss", f"{percent:g}%")


def delay(milliseconds: float) -> None:
    """Hold every packet up."""
    _disturb(ENDS, "delay", f"{milliseconds:g}ms", "limit", "100000")


def hole(*ends: str) -> None:
    """Lose everything that these ends send; both, if none is named. The links stay up."""
    _disturb(ends or ENDS, "loss", "100%")


def down(end: str = "v1") -> None:
    """Take the link of one end down; the port's state follows."""
    _call("ip", "link", "set", end, "down")


def up(end: str = "v1") -> None:
    """Bring it up again, with the routes that the kernel forgot meanwhile."""
    _batch("ip", [f"link set {end} up", *_routes()])


def mtu(nbytes: int, end: str = "v1") -> None:
    """Give one end another MTU, before ranks start: under a queue pair of longer packets Soft-RoCE (Linux 6.1) tries to
    send them for ever, and with one CPU nothing else runs any more."""
    _call("ip", "link", "set", end, "mtu", str(nbytes))


def narrow(nbytes: int) -> None:
    """Let the switches drop longer packets on their way out, which neither end is told."""
    for end in TRUNK:
        mtu(nbytes, end)


def mend() -> None:
    """Everything as in the beginning; returns when both ports are up and have their addresses."""
    _batch("tc", [f"qdisc del dev {end} root" for end in ENDS])
    _batch("ip", [f"link set {end} mtu {MTU} up" for end in (*ENDS, *TRUNK)] + _routes())
    limit = time.monotonic() + SETTLED_S
    while not all(_is_up(port) for port in PORTS.values()):
        if time.monotonic() > limit:
            raise TimeoutError(f"the ports did not come up again within {SETTLED_S:.0f} s")
        time.sleep(0.05)


def counters() -> dict[str, dict[str, int]]:
    """What each port has counted since it was made: rxe0 -> sent_pkts -> 17."""
    folders = {port: Path(f"/sys/class/infiniband/{port}/ports/1/hw_counters") for port in PORTS.values()}
    return {
        port: {path.name: int(path.read_text()) for path in sorted(folder.iterdir()) if path.name != "lifespan"}
        for port, folder in folders.items()
    }


def packets() -> int:
    """Packets that both ports have sent."""
    return sum(port["sent_pkts"] for port in counters().values())


def _disturb(ends: tuple[str, ...], *how: str) -> None:
    for end in ends:
        _call("tc", "qdisc", "replace", "dev", end, "root", "netem", *how)


def _is_up(port: str) -> bool:
    folder = Path(f"/sys/class/infiniband/{port}/ports/1")
    return "ACTIVE" in (folder / "state").read_text() and "ffff:0a4d" in (folder / "gids/1").read_text()


def _routes() -> list[str]:
    return [
        f"route replace {ADDRESSES[there]} dev {here} src {ADDRESSES[here]} table {TABLES[here]}"
        for here, there in (ENDS, ENDS[::-1])
    ]


def _batch(program: str, lines: list[str]) -> None:
    """Several commands in one process, which is a slow thing to start here. One may fail: what it undoes is not there,
    or the other end is down for good."""
    subprocess.run(
        [program, "-force", "-batch", "-"], input="\n".join(lines), text=True, capture_output=True, check=False
    )


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=["loss", "delay", "hole", "down", "up", "mtu", "narrow", "mend", "counters"])
    parser.add_argument("values", nargs="*", metavar="VALUE")
    parser.add_argument("--after", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--for", type=float, default=0.0, metavar="SECONDS", dest="lasting")
    options = parser.parse_args()
    time.sleep(options.after)
    values = options.values
    if options.fault == "counters":
        for port, found in counters().items():
            print(port, " ".join(f"{name}={value}" for name, value in found.items() if value))
        return
    try:
        if options.fault == "loss":
            loss(float(values[0]))
        elif options.fault == "delay":
            delay(float(values[0]))
        elif options.fault == "mtu":
            mtu(int(values[0]), *values[1:])
        elif options.fault == "narrow":
            narrow(int(values[0]))
        else:
            plain: dict[str, Callable[..., None]] = {"hole": hole, "down": down, "up": up, "mend": mend}
            plain[options.fault](*values)
    except (IndexError, ValueError, TypeError):
        parser.error(f"{options.fault} {' '.join(values)}: see --help for its values")
    except RuntimeError as error:
        sys.exit(f"roce-fault: {error}")
    if options.lasting:
        time.sleep(options.lasting)
        mend()


if __name__ == "__main__":
    main()
