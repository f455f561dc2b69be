"""A port at which the ranks of one attempt meet.

Chosen here and bound by rank 0 many seconds later, once it has loaded its packages. A port that
the kernel hands out (`bind` to 0) may go to any client program in between; one below that range is
taken only by a program that asks for it by number.
"""

import random
import socket

FIRST, LAST = 20000, 31999
"""Below 32768, where Linux begins to hand out ports to clients."""
_TRIES = 100


def free_port() -> int:
    """A port that nobody listens on at any address of this machine.

    Drawn at random, so that jobs that start together on one node do not take the same.

    Raises:
        OSError: of 100 ports each was in use.
    """
    draw = random.SystemRandom()
    for _ in range(_TRIES):
        port = draw.randint(FIRST, LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"of {_TRIES} ports between {FIRST} and {LAST} each is in use on this node")
