"""The sockets that are listened on, and for how many clients there is room.

An address that will not do is told of, and the end of one resets nobody.
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
# What the system holds of a connection, in bytes, of what is received and what is to be sent; Linux takes twice as much
# for it. Left alone it is megabytes of each that is not read: with a few hundred Linux drops packets of all connections
# (tcp(7), tcp_mem), and what thousands of streams that nobody reads bring until then is as much work.
_SYSTEM_BUFFERS = ((socket.SO_RCVBUF, 256 * 1024), (socket.SO_SNDBUF, 64 * 1024))

# Descriptors for listeners, the log, files, probes, and answers to those who are one too many.
_KEPT = 64
# Of these, for who asks how the gateway is on a port for that, however many others are connected.
WATCHERS = 16

# A filter on a listening socket sees what comes for it from the TCP header on, of which byte 13 is the flags: what has
# SYN (2) is dropped. The numbers are those of Linux's include/uapi/linux/filter.h.
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
    """A socket that listens: who connects before the server runs waits for it. Raises CannotListen.

    `setting` is the name that changes the port.
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
    """Take as many descriptors as the system lets us have; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # as where a system says more than it gives
            return soft
    return hard


def most_connections(descriptors: int) -> int:
    """How many clients may be connected with so many, each of whom may need a connection to an upstream, too."""
    return max(1, (descriptors - _KEPT) // 2)


def accept_the_last(listener: socket.socket) -> Iterator[socket.socket]:
    """The connections that wait on a listener that is closed next; on Linux it takes no more.

    Closing resets those that wait, and one may come between the last look and the close: its SYN is dropped, so that
    its client sends another a second later and finds the port closed, or listened on anew. Without that, three of
    twenty runs of the restarts behind nginx (tests/heavy/restarts.py) lost a call or two on a busy machine.
    """
    if sys.platform == "linux":
        address, size = _NO_SYN.buffer_info()
        with contextlib.suppress(OSError):  # where a sandbox has no filters
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", size // 8, address))
    listener.setblocking(False)
    while True:
        try:
            yield listener.accept()[0]
        except ConnectionAbortedError:
            continue  # this one has left
        except OSError:
            return  # none waits, or no more can be opened
