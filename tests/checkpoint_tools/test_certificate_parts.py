"""Parts of the certificate on their own: the closed network, bounds from the command line."""

import subprocess
import sys

import pytest

from checkpoint_tools.certificate.check import Bounds

GUARDED = """
import socket, urllib.request
from checkpoint_tools.certificate.network import NetworkGuard
server = socket.create_server(("127.0.0.1", 0))
guard = NetworkGuard()
socket.create_connection(server.getsockname()).close()
assert not guard.refused
for reach in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: urllib.request.urlopen("http://example.invalid", timeout=1),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 53)),
):
    try:
        reach()
    except OSError as error:
        assert "must not need the network" in str(error), error
    else:
        raise AssertionError("it was let through")
assert guard.refused == ["192.0.2.1", "example.invalid", "192.0.2.1"], guard.refused
"""


def test_the_network_is_off() -> None:
    subprocess.run([sys.executable, "-c", GUARDED], check=True, timeout=60)


def test_bounds_are_parsed_and_told() -> None:
    bounds = Bounds.parse(["kl_nvfp4=0.05", "prompts=8"])
    assert bounds.changed() == {"kl_nvfp4": [2e-2, 0.05], "prompts": [50, 8]}
    for words, message in (
        (["kl_nvfp5=1"], "nearest valid: kl_nvfp4 "),
        (["prompts=1.5"], "a whole number"),
        (["kl_fp8=x"], "is a number"),
        (["kl_fp8=-1"], "the least is 0"),
        (["prompts=7"], "the least is 8"),
    ):
        with pytest.raises(ValueError, match=message):
            Bounds.parse(words)
