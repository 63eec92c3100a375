"""Ports of 127.0.0.1 for local servers."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Collection

from winnow.errors import JobError

RANGE = range(20_100, 22_700)
"""Below the range that systems take for outgoing connections, and beside Ray's workers (10002-19999)."""


def is_free(*ports: int) -> bool:
    """True when a server could listen on every one of those ports now."""
    return all(map(_is_free, ports))


def find_free_port(*, taken: Collection[int] = (), beside: int = 0) -> int:
    """A free port of ``RANGE``, drawn at random so that two who look at once seldom meet.

    Args:
        taken: ports to leave out.
        beside: the port that many higher must be free too.

    Raises:
        JobError: none is free.
    """
    for _ in range(1000):
        port = random.choice(RANGE)
        if port not in taken and is_free(port, port + beside):
            return port
    raise JobError(f"no free port among {RANGE.start} to {RANGE.stop - 1} on 127.0.0.1; end some servers")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not count
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
