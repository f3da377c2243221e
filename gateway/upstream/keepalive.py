"""TCP keepalive: the system detects peers that vanished and ends their connections."""

from __future__ import annotations

import socket

# The number of keepalive probes: half of the time is silence before the first, the rest is spread over all.
_PROBES = 4


def end_silent_peers(connection: socket.socket, seconds: float, *, unsent: float = 0.0) -> None:
    """Have the system end this connection once its peer has not answered for so many seconds.

    Sent data may stay unacknowledged for `unsent` seconds, if that is longer: this limit also ends a live peer that
    reads nothing (tcp(7), TCP_USER_TIMEOUT). A listener's connections inherit the options.
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
