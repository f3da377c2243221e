"""DNS as a cluster has it: the name of a headless Service has the addresses of its pods."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import cast

DOMAIN = "default.svc.cluster.local"
# Seconds for which an answer is good, as CoreDNS's are by default; of a refusal, too.
TTL = 5
RESOLV = "nameserver {server}\nsearch {domain} svc.cluster.local cluster.local\noptions ndots:5\n"
_A, _SOA, _IN, _NO_SUCH_NAME = 1, 6, 1, 3


class Names(asyncio.DatagramProtocol):
    """Answers by what `addresses` says of a Service: its addresses, None where there is no such Service."""

    def __init__(self, addresses: Callable[[str], list[str] | None]) -> None:
        self._addresses = addresses
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can answer."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer one question."""
        assert self._transport is not None
        self._transport.sendto(self._answer(data), addr)

    def _answer(self, query: bytes) -> bytes:
        labels, at = [], 12
        while size := query[at]:
            labels.append(query[at + 1 : at + 1 + size].decode())
            at += 1 + size
        question = query[12 : at + 5]
        (kind,) = struct.unpack_from("!H", query, at + 1)
        name = ".".join(labels).lower()
        inside = name.endswith(f".{DOMAIN}")
        found = self._addresses(name.removesuffix(f".{DOMAIN}")) if inside else None
        # Each name of an answer is a pointer at the question's.
        records = [
            struct.pack("!HHHIH", 0xC00C, _A, _IN, TTL, 4) + socket.inet_aton(address)
            for address in (found or [])
            if kind == _A
        ]
        ours = struct.pack("!HHHIHHHIIIII", 0xC00C, _SOA, _IN, TTL, 24, 0xC00C, 0xC00C, 1, 1, 1, 1, TTL)
        flags = 0x8580 | (_NO_SUCH_NAME if found is None else 0)
        head = query[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0 if records else 1, 0)
        return head + question + (b"".join(records) or ours)
