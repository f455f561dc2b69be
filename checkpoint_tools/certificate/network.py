"""No network in this process: what a release needs must lie in its folder.

An audit hook, which Python code cannot take off again, refuses to look up or reach any host but
this one. Environment variables alone would leave the refusal to each library.
"""

import sys
from typing import Any

_LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0")
_EVENTS = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo")


class NetworkRefusedError(OSError):
    """Something in the certificate's process reached for the network."""


class NetworkGuard:
    """Refuses every connection of this process but to itself, and counts what it refused."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS:
            return
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = address[0] if isinstance(address, tuple) else address
        if isinstance(host, bytes | str) and (isinstance(address, tuple) or "getaddr" in event):
            name = host.decode() if isinstance(host, bytes) else host
            if name.startswith(_LOOPBACK):
                return
            self.refused.append(name)
            raise NetworkRefusedError(f"a release must not need the network, it asked for {name}")
