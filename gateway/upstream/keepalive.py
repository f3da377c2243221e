"""Peers that are gone without a word: TCP asks whether they are there, and ends what they do not answer."""

from __future__ import annotations

import socket

# The keepalive's parts: silence before the first probe, between two probes, and how many, of the whole time.
_PROBES = 4


def end_silent_peers(connection: socket.socket, seconds: float, *, unsent: float = 0.0) -> None:
    """Have the system end this connection once its peer has answered nothing for so many seconds.

    What is sent and not acknowledged may be so for `unsent` seconds, if that is longer, as a peer that is there and
    reads nothing is ended by that as well (tcp(7), TCP_USER_TIMEOUT). A listener's connections inherit it.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": seconds / 2,
        "TCP_KEEPINTVL": seconds / 2 / _PROBES,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": 1000 * max(seconds, unsent),
    }
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, option, max(1, round(value)))
