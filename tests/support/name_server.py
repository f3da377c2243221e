"""A name server on a loopback address: by UDP, and by TCP what is too long for that, as real ones are."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, cast

_A, _AAAA, _OPT = 1, 28, 41
_NO_SUCH_NAME, _FAILED = 3, 2
# What goes into a datagram where the asker does not say that it takes more.
_PLAIN = 512


def _answer(query: bytes, addresses: Mapping[bytes, str | Sequence[str]], ttl: int, most: int | None) -> bytes | None:
    """None for no answer; `most` bytes, and where it is longer a word that it is."""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]])
        at += 1 + query[at]
    end, name = at + 5, b".".join(labels)
    if name.startswith(b"hangs"):
        return None
    if name.startswith(b"fails"):
        return query[:2] + struct.pack("!HHHHH", 0x8180 | _FAILED, 1, 0, 0, 0) + query[12:end]
    if name not in addresses:
        return query[:2] + struct.pack("!HHHHH", 0x8180 | _NO_SUCH_NAME, 1, 0, 0, 0) + query[12:end]
    kind = int.from_bytes(query[at + 1 : at + 3])
    given = addresses[name]
    every = map(ipaddress.ip_address, given.split() if isinstance(given, str) else given)
    found = [one.packed for one in every if kind == (_A if one.version == 4 else _AAAA)]
    records = b"".join(struct.pack("!HHHIH", 0xC00C, kind, 1, ttl, len(one)) + one for one in found)
    head = query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(found), 0, 0)
    if most is None or len(head) + end - 12 + len(records) <= _taken(query, end, most):
        return head + query[12:end] + records
    return query[:2] + struct.pack("!HHHHH", 0x8380, 1, 0, 0, 0) + query[12:end]  # truncated: ask by TCP


def _taken(query: bytes, end: int, most: int) -> int:
    """How long an answer the asker takes (RFC 6891)."""
    if query[end : end + 3] == struct.pack("!BH", 0, _OPT):
        return max(most, int.from_bytes(query[end + 3 : end + 5]))
    return most


@contextlib.asynccontextmanager
async def name_server(
    addresses: Mapping[bytes, str | Sequence[str]], host: str = "127.0.0.1", port: int = 0, ttl: int = 1
) -> AsyncIterator[int]:
    """Answers A and AAAA by these names, others with NXDOMAIN; yields its port. `ttl` is what answers say of their age.

    To names that begin with `hangs` it says nothing, and to those that begin with `fails` SERVFAIL.
    """

    class Datagrams(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            # Not asserted: uvloop's transports are no subclasses of asyncio's.
            self.transport = cast(asyncio.DatagramTransport, transport)

        def datagram_received(self, data: bytes, address: Any) -> None:
            if (answer := _answer(data, addresses, ttl, _PLAIN)) is not None:
                self.transport.sendto(answer, address)

    class Streams(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport, self.data = cast(asyncio.Transport, transport), b""
            opened.append(self.transport)

        def data_received(self, data: bytes) -> None:
            self.data += data
            while len(self.data) >= 2 and len(self.data) >= (end := 2 + int.from_bytes(self.data[:2])):
                query, self.data = self.data[2:end], self.data[end:]
                if (answer := _answer(query, addresses, ttl, None)) is not None:
                    self.transport.write(struct.pack("!H", len(answer)) + answer)

    opened: list[asyncio.Transport] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Streams, host, port)
    bound = server.sockets[0].getsockname()[1]
    transport, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=(host, bound))
    try:
        yield bound
    finally:
        transport.close()
        for one in opened:
            one.abort()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0)  # for the transports to be closed, which is a turn of the loop later
