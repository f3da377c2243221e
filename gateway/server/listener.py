"""The listening sockets, and the number of clients that the descriptors allow.

An unusable address is reported as CannotListen. A listener ends without resetting the connections that wait on it.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import sys
from array import array
from collections.abc import Iterator

BACKLOG = 2048
# The system's receive and send buffers of a connection, in bytes; Linux reserves twice as much. By default each unread
# connection takes megabytes. With a few hundred of those Linux drops packets of all connections (tcp(7), tcp_mem). The
# data that thousands of unread streams bring until then is as much work.
_SYSTEM_BUFFERS = ((socket.SO_RCVBUF, 256 * 1024), (socket.SO_SNDBUF, 64 * 1024))

# Descriptors reserved for listeners, the log, files, probes, and refusals of surplus connections.
_KEPT = 64
# Of these, connections on the health and metrics ports, however many clients are connected.
WATCHERS = 16

# A filter on a listening socket sees each packet from the TCP header on. Byte 13 holds the flags: a packet with SYN (2)
# is dropped. The numbers are those of Linux's include/uapi/linux/filter.h.
_SO_ATTACH_FILTER = 26
_NO_SYN = array(
    "B",
    struct.pack("HBBI", 0x30, 0, 0, 13)  # load the byte
    + struct.pack("HBBI", 0x45, 0, 1, 2)  # if it has this bit, go on, else skip one
    + struct.pack("HBBI", 0x06, 0, 0, 0)  # keep nothing
    + struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF),  # keep all
)


class CannotListen(Exception):
    """The address cannot be listened on; the text says why and what to do."""


def listen(host: str, port: int, setting: str = "GATEWAY_PORT") -> socket.socket:
    """A listening socket: clients that connect before the server runs wait in its backlog. Raises CannotListen.

    `setting` names the setting that changes the port.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for option, size in _SYSTEM_BUFFERS:
                listener.setsockopt(socket.SOL_SOCKET, option, size)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise CannotListen(
            f"Cannot listen on {host} port {port} ({error.strerror}): set GATEWAY_HOST and {setting} to an "
            "address of this machine and a free port."
        ) from None
    return listener


def raise_descriptor_limit() -> int:
    """Raise the descriptor limit to the hard limit; return the limit that holds then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # some systems report more than they grant
            return soft
    return hard


def most_connections(descriptors: int) -> int:
    """How many clients so many descriptors allow; each client may also need a connection to an upstream."""
    return max(1, (descriptors - _KEPT) // 2)


def accept_the_last(listener: socket.socket) -> Iterator[socket.socket]:
    """Accept the connections that wait on a listener before it is closed; on Linux it takes no new ones.

    Closing a listener resets waiting connections, and one may arrive between the last accept and the close. So its SYN
    is dropped: the client sends another a second later and finds the port closed, or a new listener. Without that,
    three of twenty runs of the restarts behind nginx (tests/heavy/restarts.py) lost a call or two on a busy machine.
    """
    if sys.platform == "linux":
        address, size = _NO_SYN.buffer_info()
        with contextlib.suppress(OSError):  # a sandbox may not support filters
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", size // 8, address))
    listener.setblocking(False)
    while True:
        try:
            yield listener.accept()[0]
        except ConnectionAbortedError:
            continue  # this client has disconnected
        except OSError:
            return  # none waits, or the descriptors are exhausted
