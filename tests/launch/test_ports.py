"""The port where ranks meet: nobody listens there, and no client is given it in the meantime."""

import socket
from pathlib import Path

import pytest

from launch import ports


def test_a_port_is_below_those_of_clients() -> None:
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first_of_clients <= ports.FIRST:
        pytest.skip(f"clients are given ports from {first_of_clients} on")
    assert first_of_clients > ports.LAST
    found = {ports.free_port() for _ in range(20)}
    assert all(ports.FIRST <= port <= ports.LAST for port in found)
    assert len(found) > 10


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    port = ports.free_port()
    monkeypatch.setattr(ports, "FIRST", port)
    monkeypatch.setattr(ports, "LAST", port)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        with pytest.raises(OSError, match="is in use on this node"):
            ports.free_port()
    assert ports.free_port() == port
