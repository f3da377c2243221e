"""What a hostile client does: `python -m tests.heavy.abuse.attackers NAME PORT SECONDS`, bounded in count and time.

On loopback alone. Each prints what it was answered, by status, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import resource
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import click
import orjson
import uvloop

KEY = "hostile-4f7d0c9a2b6e81d35a"
MIB = 1 << 20
CHAT = "/v1/chat/completions"
# Of another model server than the honest client's, as that one is not to be what it waits for.
MODEL = "other"


class Target:
    """Where to, and until when."""

    def __init__(self, port: int, seconds: float) -> None:
        self.answers: Counter[str] = Counter()
        self.receives = 1 << 16
        self._port = port
        self._until = time.monotonic() + seconds

    @property
    def lasts(self) -> bool:
        return time.monotonic() < self._until

    async def rest(self) -> None:
        """Until the end."""
        await asyncio.sleep(max(0, self._until - time.monotonic()))

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receives)
        # It is another machine's memory that a hostile client's sending takes.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=self.receives)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def asks(self, requests: Iterator[bytes], pause: float = 0.0, *, reads: bool = True) -> None:
        """One request after the other, on a new connection where the last was closed."""
        while self.lasts:
            try:
                await self._asks(requests, pause, reads=reads)
            except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                self.answers["closed"] += 1
                await asyncio.sleep(0.01)

    async def _asks(self, requests: Iterator[bytes], pause: float, *, reads: bool) -> None:
        async with self.connection() as (reader, writer):
            while self.lasts:
                writer.write(next(requests))
                if not reads:
                    await self.rest()
                await writer.drain()
                self.answers[await _status(reader)] += 1
                await asyncio.sleep(pause)

    async def many(
        self, count: int, requests: Callable[[int], Iterator[bytes]], *, reads: bool = True, at_once: int = 50
    ) -> None:
        """So many connections, of which so many begin in each twentieth of a second."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(self.asks(requests(number), reads=reads))
                if number % at_once == at_once - 1:
                    await asyncio.sleep(0.05)


async def _status(reader: asyncio.StreamReader) -> str:
    """That of an answer, which is read to its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    if length := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
        left = int(length[1])
        while left:
            piece = await reader.read(min(left, 1 << 16))
            if not piece:
                raise ConnectionResetError
            left -= len(piece)
    else:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
        await reader.readexactly(2)
    return head[9:12].decode()


def post(body: bytes, path: str = CHAT, more: str = "", *, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    kind = "" if "content-type" in more else "content-type: application/json\r\n"
    lines = f"POST {path} HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {KEY}\r\n{kind}{more}"
    lines += f"content-length: {length}"
    return lines.encode() + b"\r\n\r\n" + body


def call(text: str = "Hi", **fields: object) -> bytes:
    return orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}], **fields})


def forever(*requests: bytes) -> Iterator[bytes]:
    return itertools.cycle(requests)


def filled(before: bytes, one: bytes, after: bytes, size: int = 15 * MIB) -> bytes:
    return before + one * ((size - len(before)) // len(one)) + one.rstrip(b",") + after


# What a body of 15 MiB can be made of.
SHAPES = {
    "text": (CHAT, filled(b'{"model":"other","messages":[{"role":"user","content":"', b"word ", b'"}]}')),
    "arrays": (CHAT, filled(b'{"model":"other","messages":[{"role":"user","content":[', b"[],", b"]}]}")),
    "parts": (CHAT, filled(b'{"model":"other","messages":[{"role":"user","content":[', b'{"type":"text"},', b"]}]}")),
    "numbers": (CHAT, filled(b'{"model":"other","messages":[],"stop":[', b"1,", b"]}")),
    "tokens": ("/v1/embeddings", filled(b'{"model":"other","input":[', b"[0],", b"]}")),
    "documents": (CHAT, filled(b'{"data":{"user_prompt":"q","reranked_docs":[', b'{"text":"a"},', b"]}}")),
    "fields": (CHAT, filled(b'{"messages":{"user":"q"},"logit_bias":[', b"[],", b"]}")),
    "generate": ("/generate", filled(b'{"prompt":"q","stop":[', b"[],", b"]}")),
    "escapes": (CHAT, filled(b'{"model":"other","messages":[{"role":"user","content":"', b"\\u0041", b'"}]}')),
    "quotes": (CHAT, filled(b'{"model":"other","messages":[{"role":"user","content":"', b'\\",', b'"}]}')),
    "keys": (CHAT, filled(b'{"model":"other","messages":[],"a":{"b":1', b',"b":1', b"}}")),
}


async def bodies(target: Target) -> None:
    """15 MiB of JSON in eleven shapes, one body after the other."""
    await target.asks(forever(*(post(body, path) for path, body in SHAPES.values())), pause=0.1)


async def heads(target: Target) -> None:
    """5,120 calls of which a head and one byte come."""
    await target.many(5120, lambda _: forever(post(b"{", length=1000)), reads=False)


async def uploads(target: Target) -> None:
    """1,000 uploads of which a head and one byte come."""
    more = "content-type: multipart/form-data; boundary=b\r\n"
    await target.many(1000, lambda _: forever(post(b"-", "/v1/audio/transcriptions", more, length=10**6)), reads=False)


async def large(target: Target) -> None:
    """256 calls of 16 MiB at a time, answered after two seconds."""
    body = call("hold:2000", user="x" * (16 * MIB - 200))
    await target.many(256, lambda _: forever(post(body)))


async def dripped(target: Target) -> None:
    """256 calls of 16 MiB of which 200 KiB come in each second."""

    async def drip() -> None:
        while target.lasts:
            with contextlib.suppress(OSError):
                async with target.connection() as (_, writer):
                    writer.write(post(b'{"a":"', length=16 * MIB))
                    while target.lasts and not writer.transport.is_closing():
                        writer.write(b"x" * 200 * 1024)
                        await writer.drain()
                        await asyncio.sleep(1)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(256):
            tasks.create_task(drip())
            await asyncio.sleep(0.002)


async def unread(target: Target) -> None:
    """4,096 streams that nobody reads."""
    target.receives = 4096
    await target.many(4096, lambda _: forever(post(call("flood", stream=True))), reads=False, at_once=27)


async def chunks(target: Target) -> None:
    """Bodies in chunks of two bytes."""
    head = post(b"", more="transfer-encoding: chunked\r\n").replace(b"content-length: 0\r\n", b"")
    piece = b"2\r\n  \r\n" * 8192

    async def send() -> None:
        while target.lasts:
            with contextlib.suppress(OSError):
                async with target.connection() as (_, writer):
                    writer.write(head)
                    while target.lasts and not writer.transport.is_closing():
                        writer.write(piece)
                        await writer.drain()
                        await asyncio.sleep(0.02)

    await asyncio.gather(*(send() for _ in range(8)))


async def descriptors(target: Target) -> None:
    """2,000 connections, to a gateway that may open 1,024 descriptors."""
    await target.many(2000, lambda _: forever(b"GET /health HTTP/1.1\r\n"), reads=False)


async def turns(target: Target) -> None:
    """72 callers where eight calls run at a time."""
    await target.many(72, lambda _: forever(post(call("hold:50"))))


async def queue(target: Target) -> None:
    """1,000 callers, each of a model of its own that nobody knows, where eight calls run at a time."""
    await target.many(1000, lambda number: forever(post(call("hold:50", model=f"unknown-{number}"))))


async def bounds(target: Target) -> None:
    """Fields that would go past their bounds by another type, or in another place."""
    completion = {"model": MODEL, "prompt": ["a"] * 100_000}
    batch = {"model": MODEL, "messages": [[{"role": "user", "content": "a"}] * 1000] * 100}
    calls = (
        post(call(n="200")),
        post(call(max_tokens="100000")),
        post(call(stream="true")),
        post(call(kv_transfer_params={"remote_host": "192.0.2.1"})),
        post(orjson.dumps(completion | {"n": 128}), "/v1/completions"),
        post(orjson.dumps({"model": MODEL, "input": ["a"] * 5000}), "/v1/embeddings"),
        post(orjson.dumps(batch), f"{CHAT}/batch"),
    )
    await target.asks(forever(*calls), pause=0.005)


async def health(target: Target) -> None:
    """A health check of anyone, again and again, where 99 upstreams of 100 are dead."""
    ask = b"GET /v1/health_check HTTP/1.1\r\nhost: x\r\n\r\n"
    await asyncio.gather(*(target.asks(forever(ask), pause=0.005) for _ in range(4)))


async def generate(target: Target) -> None:
    """`/generate` of two MiB for a hundred tokens, whose events would repeat the prompt."""
    body = orjson.dumps({"prompt": "x" * (2 * MIB), "max_tokens": 100, "stream": True})
    await target.asks(forever(post(body, "/generate")), pause=0.02)


async def headers(target: Target) -> None:
    """60 KB of headers, ninety of one name, of nobody's."""
    lines = "".join(f"x-forwarded-for: 192.0.2.{number}\r\n" for number in range(90))
    ask = f"GET /v1/models HTTP/1.1\r\nhost: x\r\naccept: {'a' * 50_000}\r\n{lines}\r\n".encode()
    await asyncio.gather(*(target.asks(forever(ask), pause=0.01) for _ in range(4)))


async def disk(target: Target) -> None:
    """Calls of which each has a line in a log whose disk is full."""
    await asyncio.gather(*(target.asks(forever(post(call())), pause=0.01) for _ in range(16)))


async def idle(target: Target) -> None:
    """6,000 connections on which nothing comes."""
    await target.many(6000, lambda _: forever(b""), reads=False)


ATTACKS: dict[str, Callable[[Target], Awaitable[None]]] = {
    attack.__name__: attack
    for attack in (
        bodies, heads, uploads, large, dripped, unread, chunks, descriptors, turns, queue, bounds, health, generate,
        headers, disk, idle,
    )
}  # fmt: skip


async def main(name: str, port: int, seconds: float) -> None:
    target = Target(port, seconds)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(ATTACKS[name](target), seconds + 1)
    click.echo(orjson.dumps(target.answers))


if __name__ == "__main__":
    os.nice(10)  # lest its own work be what the honest client waits for
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
