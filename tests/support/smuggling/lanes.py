"""A gateway and the strict upstream behind it, on each way in, all on one loop; what comes of bytes that are sent.

One loop for all of it, as a case is over in half a millisecond then, and a thread's turn takes longer. The sockets are
real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import uvloop

from gateway.app import create_app
from gateway.config.secrets import read_secrets
from gateway.config.settings import Settings, names_of
from gateway.observability.logs import LineWriter
from gateway.server.listener import listen
from gateway.server.uvicorn_server import create_server
from tests.support.smuggling.cases import Case
from tests.support.smuggling.upstream import Got, Upstream

T = TypeVar("T")

# The last request on a connection that is still open: what comes back shows that both sides agree where it begins.
LAST = b"GET /health HTTP/1.1\r\nHost: gateway\r\nX-Request-Id: the-last-one\r\nConnection: close\r\n\r\n"


class Client(asyncio.Protocol):
    """A bare connection, and all that came back on it."""

    def __init__(self) -> None:
        self.got = b""
        self.closed = False
        self._changed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, data: bytes) -> None:
        """These bytes, if anybody takes them."""
        if not self.closed:
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self.got += data
        self._changed.set()

    def eof_received(self) -> None:
        self.closed = True
        self._changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._changed.set()

    async def rest(self, quiet: float) -> None:
        """Until it is closed, or nothing has come for so many seconds."""
        with contextlib.suppress(TimeoutError):
            while not self.closed:
                self._changed.clear()
                await asyncio.wait_for(self._changed.wait(), quiet)

    async def until(self, count: int, seconds: float = 5.0) -> None:
        """Until so many answers are there, or it is closed, or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.closed and len(answers(self.got)) < count:
                    self._changed.clear()
                    await self._changed.wait()


async def connect(port: int) -> Client:
    """To a port of this machine."""
    _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return client


def answers(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """The whole answers in `data`: status, head and body."""
    found = []
    while data:
        head, blank, rest = data.partition(b"\r\n\r\n")
        first = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        assert first, f"no answer: {data[:200]!r}"
        status = int(first[1])
        if not blank:
            break
        length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
        if status < 200 or status in (204, 304):
            size = 0
        elif length:
            size = int(length[1])
        else:
            assert b"\r\ntransfer-encoding: chunked" in head.lower(), head
            end = rest.find(b"0\r\n\r\n")
            size = end + 5 if end >= 0 else len(rest) + 1
        if len(rest) < size:
            break
        found.append((status, head, rest[:size]))
        data = rest[size:]
    return found


@dataclass(frozen=True)
class Seen:
    """What came of a case: the bytes that came back, whether the connection closed, what went upstream."""

    back: bytes
    closed: bool
    got: list[Got]

    @property
    def statuses(self) -> tuple[int, ...]:
        """Of the answers."""
        return tuple(status for status, _, _ in answers(self.back))

    @property
    def told(self) -> tuple[bytes, bool, list[Any]]:
        """All of it, but for what differs from one time to the next."""
        back = re.sub(rb"date: [^\r]+", b"date: D", self.back)
        back = re.sub(rb"[0-9a-f]{32}", b"ID", back)
        return back, self.closed, [got.sent for got in self.got]


class Way:
    """One gateway, one upstream."""

    def __init__(self, shortcut: bool, log: LineWriter | None = None, **settings: Any) -> None:
        self.name = "shortcut" if shortcut else "app"
        self.upstream = Upstream()
        self._settings = {"shortcut": shortcut, "probe_interval": 60, **settings}
        self._log = log

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Way]:
        """It is up, and its upstream has been probed."""
        listener = listen("127.0.0.1", 0)
        self.port: int = listener.getsockname()[1]
        given = {"upstreams": (await self.upstream.start(),), "port": 0, "drain_timeout": 1, **self._settings}
        settings = Settings(**{names_of(field)[0]: value for field, value in given.items()})
        secrets = read_secrets(settings)
        server = self._server = create_server(settings, secrets, create_app(settings, secrets, self._log))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            assert (
                await self.ask(b"GET /v1/health_check HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            ).statuses == (200,)
            yield self
        finally:
            server.should_exit = True
            await serving
            self.upstream.stop()

    @property
    def handled(self) -> int:
        """How many requests it has answered; what is no HTTP is none."""
        return self._server.server_state.total_requests

    async def ask(self, *writes: bytes, quiet: float = 5.0, between: float = 0.02, first: bytes = b"") -> Seen:
        """Send these, each once nothing has come for a moment; wait until nothing has come for longer.

        `first` is a call that has its answer before.
        """
        self.upstream.got.clear()
        client = await connect(self.port)
        if first:
            client.send(first)
            await client.until(1)
        for number, write in enumerate(writes):
            if number and between:
                await client.rest(between)
            elif number:
                await asyncio.sleep(0)  # the gateway's turn to read
            client.send(write)
        await client.rest(quiet)
        if len(answers(client.got)) < len(self.upstream.got):
            # A machine that is slow is not one that says nothing.
            await client.until(len(self.upstream.got))
            await client.rest(quiet)
        seen = Seen(client.got, client.closed, self.upstream.got[:])
        client.transport.abort()
        return seen

    async def play(self, case: Case) -> Seen:
        """Send what a case says, and one more request where that is to have its own answer, which is left out."""
        self.upstream.got.clear()
        client = await connect(self.port)
        for number, write in enumerate(case.writes):
            if number:
                await client.rest(0.02)
            client.send(write)
        await client.until(len(case.statuses))
        was_closed = True
        if case.closed:
            await client.rest(5.0)
            was_closed = client.closed
        elif case.waits:
            await client.rest(0.1)
            was_closed = client.closed
        else:
            before = len(client.got)
            client.send(LAST)
            await client.rest(5.0)
            last = answers(client.got[before:])
            was_closed = len(last) != 1 or b"x-request-id: the-last-one" not in last[0][1]
            if not was_closed:
                client.got = client.got[:before]
        seen = Seen(client.got, was_closed, self.upstream.got[:])
        client.transport.abort()
        return seen


class Both:
    """Both ways in, on a loop in a thread of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ways: tuple[Way, Way]) -> None:
        self._loop = loop
        self.ways = ways

    def run(self, work: Callable[[Way], Coroutine[Any, Any, T]]) -> list[T]:
        """The same work on each way, at once; it fails where something went upstream that should not have."""

        async def each() -> list[T]:
            return await asyncio.gather(*map(work, self.ways))

        done = asyncio.run_coroutine_threadsafe(each(), self._loop).result(60)
        faults = [fault for way in self.ways for fault in way.upstream.faults]
        for way in self.ways:
            way.upstream.faults.clear()
        assert faults == []
        return done


@contextlib.contextmanager
def both(**settings: Any) -> Iterator[Both]:
    """A gateway on each way in, with these settings."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="lanes")
    thread.start()
    ways = Way(shortcut=True, **settings), Way(shortcut=False, **settings)
    opened = contextlib.AsyncExitStack()

    async def start() -> None:
        for way in ways:
            await opened.enter_async_context(way.running())

    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result(20)
        yield Both(loop, ways)
    finally:
        asyncio.run_coroutine_threadsafe(opened.aclose(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
