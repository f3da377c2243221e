"""Ports on which nothing listens, and nothing else will begin to."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

# Below those that systems give out by themselves: one of these may be given to another test's server a moment later,
# which then answers what was to be refused. Each process begins elsewhere.
_FIRST, _LAST = 20_000, 32_000
_numbers = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """A port of the loopback address on which nothing listens just now."""
    while True:
        port = _FIRST + next(_numbers) % (_LAST - _FIRST)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
