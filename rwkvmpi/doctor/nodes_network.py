"""Whether every node can resolve and reach the host of rank 0, as live telemetry has to."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from typing import Any

LIMIT_S = 3.0


class Door:
    """A port of this host that takes connections and drops them, for as long as the context is open."""

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0))
        threading.Thread(target=self._serve, name="doctor's door", daemon=True).start()

    @property
    def address(self) -> dict[str, Any]:
        """What another node needs: host name, addresses, port."""
        return {"host": socket.gethostname(), "addresses": addresses(), "port": self._server.getsockname()[1]}

    def close(self) -> None:
        """Take no more."""
        self._server.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                self._server.accept()[0].close()


def addresses() -> list[str]:
    """This host's IPv4 addresses that other hosts may know."""
    import psutil

    found = [one.address for told in psutil.net_if_addrs().values() for one in told if one.family == socket.AF_INET]
    return [text for text in found if not _only_here(text)]


def reach(door: dict[str, Any]) -> dict[str, str]:
    """{"name": "" or why the host cannot be reached by its name, "address": the first address that works}."""
    host, port = door["host"], door["port"]
    why = ""
    try:
        known = {entry[4][0] for entry in socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)}
    except OSError as error:
        why = f"the name cannot be resolved ({error.strerror})"
    else:
        if socket.gethostname() != host and all(_only_here(str(text)) for text in known):
            why = f"the name means {', '.join(map(str, sorted(known)))} here, which is this machine itself"
        elif trouble := _connect(host, port):
            why = f"no connection ({trouble})"
    if not why:
        return {"name": "", "address": ""}
    return {"name": why, "address": next((text for text in door["addresses"] if not _connect(text, port)), "")}


def _connect(host: str, port: int) -> str:
    """Why no connection can be made; '' where it can."""
    try:
        socket.create_connection((host, port), LIMIT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _only_here(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return address.is_loopback or address.is_link_local
