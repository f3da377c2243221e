"""Clients of a Service, each of which streams call after call, and what became of each."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from tests.support.fake_vllm import DONE

PORT = 9000
# Most calls on one connection; seconds for one to be connected, and in which something of an answer must come.
_REUSED = 5
_PATIENCE = 5.0
_SILENCE = 20.0


@dataclass(frozen=True)
class Call:
    """One that has ended: by which pod of the gateway, by whom behind it, when (time.monotonic()), and how."""

    gateway: str
    upstream: str
    sent_at: float
    ended_at: float
    outcome: str


class Callers:
    """They connect as through kube-proxy: a new connection is to one of `addresses`, and stays where it is."""

    def __init__(self, addresses: Callable[[], list[str]]) -> None:
        self.calls: list[Call] = []
        self._addresses = addresses
        self._chance = random.Random(4)
        self._numbers = itertools.count()
        self._ended = asyncio.Event()

    @property
    def outcomes(self) -> Counter[str]:
        """How many ended how."""
        return Counter(call.outcome for call in self.calls)

    @contextlib.asynccontextmanager
    async def calling(self, clients: int, tokens: tuple[int, int]) -> AsyncIterator[None]:
        """So many clients, of answers of so many tokens; at the end each ends its last call."""
        stop = asyncio.Event()
        running = [asyncio.create_task(self._client(stop, tokens)) for _ in range(clients)]
        try:
            yield
            stop.set()
            await asyncio.gather(*running)
        finally:
            for one in running:
                one.cancel()

    async def until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for that, which is looked at when a call has ended."""
        async with asyncio.timeout(seconds):
            while not holds():
                await self._ended.wait()
                self._ended.clear()

    async def _client(self, stop: asyncio.Event, tokens: tuple[int, int]) -> None:
        while not stop.is_set():
            address, began = self._chance.choice(self._addresses()), time.monotonic()
            try:
                async with asyncio.timeout(_PATIENCE):
                    reader, writer = await asyncio.open_connection(address, PORT)
            except (OSError, TimeoutError) as error:
                self._end(Call(address, "", began, time.monotonic(), f"not connected: {error!r}"))
                continue
            try:
                for _ in range(self._chance.randint(1, _REUSED)):
                    if stop.is_set() or not await self._call(address, reader, writer, self._chance.randint(*tokens)):
                        break
            finally:
                writer.transport.abort()

    def _end(self, call: Call) -> None:
        self.calls.append(call)
        self._ended.set()

    async def _call(
        self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: int
    ) -> bool:
        """True if the connection can take another one."""
        sent_at, head, content, why = time.monotonic(), b"", b"", ""
        try:
            writer.write(request(next(self._numbers), tokens))
            async with asyncio.timeout(_SILENCE) as silence:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"chunked" in head:
                    while size := int(await reader.readuntil(b"\r\n"), 16):
                        content += (await reader.readexactly(size + 2))[:-2]
                        silence.reschedule(asyncio.get_running_loop().time() + _SILENCE)
                    await reader.readexactly(2)
                else:
                    content = await reader.readexactly(int(_header(head, b"content-length")))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            why = f"{type(error).__name__} after {len(content)} bytes"
        upstream = _header(head, b"x-gateway-upstream").decode()
        self._end(Call(address, upstream, sent_at, time.monotonic(), why or outcome_of(head, content)))
        return not why and _header(head, b"connection") != b"close"


def request(number: int, tokens: int) -> bytes:
    """A streamed call for so many tokens; prompts begin differently, so that each goes its own way."""
    content = {
        "model": "demo-model",
        "messages": [{"role": "user", "content": f"{number}: What is vLLM?"}],
        "stream": True,
        "max_tokens": tokens,
        "ignore_eos": True,
    }
    body = json.dumps(content).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def outcome_of(head: bytes, content: bytes) -> str:
    """`answered`, or what is wrong: a stream has its model's own end, or it is not whole."""
    if head[9:12] != b"200":
        return f"refused: {head[9:12].decode()} {content.decode()}"
    if error := re.search(rb'data: {"error".*"code":"(\w+)"', content):
        return f"error event: {error[1].decode()}"
    whole = content.endswith(DONE) and b'"finish_reason":"length"' in content
    return "answered" if whole else f"cut: {content[-99:]!r}"


def _header(head: bytes, name: bytes) -> bytes:
    found = re.search(rb"\r\n%b: ([^\r]*)" % name, head, re.IGNORECASE)
    return found[1] if found else b""
