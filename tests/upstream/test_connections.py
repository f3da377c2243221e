"""Upstream connections on real loopback sockets, with a recorder in place of the exchange."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, cast

import aiodns
import httpx
import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.pool.upstream_pool import Upstream
from gateway.relay.interfaces import Connection
from gateway.upstream import connections
from gateway.upstream.connection import HEADER_BYTES, UpstreamConnection
from gateway.upstream.connections import IDLE_FOR, ConnectionLimits, ConnectionPool
from gateway.upstream.resolver import Resolver
from gateway.wire.heads import AnswerHead, Header, answer_head
from tests.support.examples import examples
from tests.support.ports import free_port

REQUEST = b"GET /v1/models HTTP/1.1\r\nhost: upstream\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
# Of the operating system's patience, not of the test's speed: what is waited for always comes.
PATIENCE = 10
LIMITS: dict[str, Any] = {"connect_timeout": PATIENCE, "max_age": math.inf, "max_requests": 10**6, "keepalive": 120}


class Caller:
    """In an exchange's place: notes what it is told, and asks for nothing but what the test says."""

    def __init__(self, *, release: bool = True) -> None:
        self.connection: Connection | None = None
        self.status = 0
        self.headers: list[Header] = []
        self.length: bytes | None = None
        self.pieces: list[bytes] = []
        self.chunks: list[bytes] = []
        self.ended = ""
        self.answered: bool | None = None
        self.timed_out: float | None = None
        self._release = release
        self._changed = asyncio.Event()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def upstream_connected(self, connection: Connection) -> None:
        assert self.connection is None
        self.connection = connection
        self._changed.set()

    def upstream_unreachable(self, why: str, *, timed_out: float | None = None) -> None:
        self._end(f"unreachable: {why}")
        self.timed_out = timed_out

    def upstream_head(self, head: AnswerHead, length: bytes | None) -> None:
        assert not self.status, "a second head"
        assert not self.ended
        self.status, self.headers, self.length = head.status, head.headers, length
        self._changed.set()

    def upstream_body(self, data: bytes) -> None:
        assert self.status, "a body before the head"
        assert data, "an empty read"
        assert not self.ended
        self.pieces.append(data)
        self._changed.set()

    def upstream_chunk(self, chunk: bytes, size: int) -> None:
        piece = chunk[-size - 2 : -2]
        assert chunk == b"%x\r\n%b\r\n" % (len(piece), piece), "no chunk"
        assert piece.endswith(b"\n\n"), "no event"
        self.chunks.append(chunk)
        self.upstream_body(piece)

    def upstream_end(self) -> None:
        assert self.status, "an end before the head"
        self._end("end")
        if self._release:
            assert self.connection is not None
            self.connection.release()

    def upstream_answer(self, head: AnswerHead, content: bytes) -> None:
        self.upstream_head(head, b"%d" % len(content))
        if content:
            self.upstream_body(content)
        self.upstream_end()

    def upstream_lost(self, why: str, *, answered: bool) -> None:
        self._end(f"lost: {why}")
        self.answered = answered

    def upstream_paused(self) -> None:
        """Of interest to uploads alone."""

    def upstream_resumed(self) -> None:
        """The same."""

    def crashed(self, error: BaseException) -> None:
        self._end(f"crashed: {error!r}")

    def _end(self, how: str) -> None:
        assert not self.ended, f"{how} after {self.ended}"
        self.ended = how
        self._changed.set()

    async def until(self, ready: Callable[[Caller], object]) -> None:
        """Wait until what it was told makes `ready` true."""
        async with asyncio.timeout(PATIENCE):
            while not ready(self):
                self._changed.clear()
                await self._changed.wait()

    async def end(self) -> str:
        """How it ended."""
        await self.until(lambda caller: caller.ended)
        return self.ended


class Peer:
    """The upstream's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def hears(self, data: bytes) -> None:
        """Wait for these bytes and no others."""
        async with asyncio.timeout(PATIENCE):
            assert await self._reader.readexactly(len(data)) == data

    async def is_closed(self) -> None:
        """Wait until the gateway has closed; nothing may come before."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(ConnectionResetError):
                assert await self._reader.read() == b""

    def says(self, data: bytes) -> None:
        self._writer.write(data)

    def closes(self) -> None:
        self._writer.close()

    def resets(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()


class Names:
    """A lookup that knows these names alone."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = {name.replace("_", "-"): found for name, found in addresses.items()}

    async def find(self, host: str, family: int) -> list[str]:
        if (found := self.addresses.get(host)) is None:
            raise aiodns.error.DNSError(aiodns.error.ARES_ENOTFOUND, "Domain name not found")
        return found

    async def close(self) -> None: ...


def a_pool(**limits: Any) -> ConnectionPool:
    return ConnectionPool(ConnectionLimits(**LIMITS | limits), Resolver(Names()))


class Pool(ConnectionPool):
    """The pool, which also tells when it forgets a connection."""

    def __init__(self, names: Names, **limits: Any) -> None:
        super().__init__(ConnectionLimits(**LIMITS | limits), Resolver(names))
        self.forgotten = asyncio.Event()

    def forget(self, connection: UpstreamConnection) -> None:
        super().forget(connection)
        self.forgotten.set()


class Net:
    """A listening upstream and the pool of connections to it, in one loop."""

    def __init__(self, pool: Pool, upstream: Upstream, accepted: asyncio.Queue[Peer]) -> None:
        self.pool, self.upstream, self._accepted = pool, upstream, accepted

    async def accept(self) -> Peer:
        """The upstream's end of the next connection."""
        async with asyncio.timeout(PATIENCE):
            return await self._accepted.get()

    def connect(self, *, fresh: bool = False, release: bool = True) -> Caller:
        """Somebody wants a connection."""
        caller = Caller(release=release)
        self.pool.connect(self.upstream, caller, fresh=fresh)
        return caller

    async def call(self, *, fresh: bool = False, release: bool = True) -> tuple[Caller, Peer]:
        """A request on a new connection, as it has reached the upstream."""
        caller = self.connect(fresh=fresh, release=release)
        peer = await self.accept()
        await send(caller, peer)
        return caller, peer

    async def idle(self) -> tuple[UpstreamConnection, Peer]:
        """A connection that has served once and is idle."""
        caller, peer = await self.call(fresh=True)
        peer.says(OK)
        assert await caller.end() == "end"
        return cast(UpstreamConnection, caller.connection), peer

    async def forgets(self) -> None:
        """Wait until the pool has forgotten an idle connection for what its upstream did, not for its age."""
        async with asyncio.timeout(PATIENCE):
            await self.pool.forgotten.wait()

    def all_idle(self) -> list[UpstreamConnection]:
        """The pool's idle connections, oldest first."""
        return list(self.pool._idle.get(self.upstream, ()))


async def send(caller: Caller, peer: Peer) -> None:
    """Send the request, and see it arrive."""
    await caller.until(lambda caller: caller.connection)
    assert caller.connection is not None
    caller.connection.send(REQUEST)
    await peer.hears(REQUEST)


@contextlib.asynccontextmanager
async def net(
    names: Names | None = None, *, host: str = "127.0.0.1", port: int = 0, **limits: Any
) -> AsyncIterator[Net]:
    """A network that leaves nothing open: uvloop waits for ever for what is, where its warning is an error."""
    accepted: asyncio.Queue[Peer] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        accepted.put_nowait(Peer(reader, writer))

    server = await asyncio.start_server(accept, host, port)
    port = server.sockets[0].getsockname()[1]
    pool = Pool(names or Names(), **limits)
    try:
        yield Net(pool, Upstream.from_url(f"http://{host}:{port}"), accepted)
    finally:
        await pool.close()
        server.close()
        for writer in writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine in a loop of either kind."""

    def run(work: Coroutine[Any, Any, None]) -> None:
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(work)

    return run


# Framing


@dataclass(frozen=True)
class Answer:
    """What an upstream sends; what is heard of it; whether the end is a close, and the connection fit for reuse."""

    sent: bytes
    status: int = 200
    body: bytes = b"hi"
    closes: bool = False
    kept: bool = True


ANSWERS = {
    "content-length": Answer(OK),
    "an empty body": Answer(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", body=b""),
    "no reason phrase": Answer(b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\nhi"),
    "repeated headers": Answer(b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 2\r\n\r\nhi"),
    "chunked": Answer(CHUNKED + b"1\r\nh\r\n1\r\ni\r\n0\r\n\r\n"),
    "a chunk extension": Answer(CHUNKED + b"2;a=b\r\nhi\r\n0\r\n\r\n"),
    "trailers": Answer(CHUNKED + b"2\r\nhi\r\n0\r\nx-trailer: 1\r\nx-more: 2\r\n\r\n"),
    "100 first": Answer(b"HTTP/1.1 100 Continue\r\n\r\n" + OK),
    "103 first": Answer(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK),
    "two 1xx first": Answer(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nx-a: 1\r\n\r\n" + OK),
    "204": Answer(b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "304 with a length": Answer(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n", 304, b""),
    "an error": Answer(b"HTTP/1.1 503 Busy\r\nretry-after: 3\r\ncontent-length: 2\r\n\r\nno", 503, b"no"),
    "connection: close": Answer(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi", kept=False),
    "chunked and close": Answer(CHUNKED[:-2] + b"connection: close\r\n\r\n2\r\nhi\r\n0\r\n\r\n", kept=False),
    "until close": Answer(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nhi", closes=True, kept=False),
    "until close, empty": Answer(b"HTTP/1.1 200 OK\r\n\r\n", body=b"", closes=True, kept=False),
    "HTTP/1.0": Answer(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi", kept=False),
    "HTTP/1.0 until close": Answer(b"HTTP/1.0 200 OK\r\n\r\nhi", closes=True, kept=False),
    "HTTP/1.0 keep-alive": Answer(b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nhi"),
    "upgrade offered": Answer(b"HTTP/1.1 200 OK\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nhi"),
    "an obsolete line end after": Answer(OK + b"\r\n"),
}
answers = pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())


@answers
def test_an_answer_is_heard_as_it_is_framed(answer: Answer, run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            peer.says(answer.sent)
            if answer.closes:
                peer.closes()
            assert await caller.end() == "end"
            assert (caller.status, caller.body) == (answer.status, answer.body)
            assert len(there.all_idle()) == answer.kept
            if not answer.kept and not answer.closes:
                await peer.is_closed()

    run(work())


@answers
def test_an_answer_reads_as_httpx_reads_it(answer: Answer, run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            await answer_whole(peer, answer)
            await caller.end()
            with_httpx = asyncio.create_task(by_httpx(there.upstream))
            await answer_whole(await there.accept(), answer)
            response, body = await with_httpx
            assert (caller.status, caller.body) == (response.status_code, body)
            raw = [(name.lower(), value) for name, value in response.headers.raw]
            head, length = answer_head(response.status_code, raw)
            assert (caller.headers, caller.length) == (head.headers, length)

    run(work())


async def answer_whole(peer: Peer, answer: Answer) -> None:
    peer.says(answer.sent)
    if answer.closes:
        peer.closes()


async def by_httpx(upstream: Upstream) -> tuple[httpx.Response, bytes]:
    """The same answer as the oracle hears it."""
    async with (
        httpx.AsyncClient(trust_env=False, verify=False, timeout=PATIENCE) as client,
        client.stream("GET", upstream.url + "/v1/models") as response,
    ):
        return response, b"".join([piece async for piece in response.aiter_raw()])


TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(lambda name: f"x-{name}".encode())
VALUE = st.text([chr(code) for code in range(33, 127)], min_size=1, max_size=20).map(str.encode)


@st.composite
def well_formed(draw: st.DrawFn) -> Answer:
    """Any answer that a server may send."""
    status = draw(st.sampled_from([200, 201, 400, 404, 500, 503]))
    pieces = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=4))
    headers = draw(st.lists(st.tuples(TOKEN, VALUE), max_size=4))
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    body = b"".join(pieces)
    sent = b"".join(b"HTTP/1.1 103 Early\r\nx-early: 1\r\n\r\n" for _ in range(draw(st.integers(0, 2))))
    if framing == "length":
        headers.append((b"content-length", b"%d" % len(body)))
    elif framing == "chunked":
        headers.append((b"transfer-encoding", b"chunked"))
        body_sent = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n"
        body_sent += b"x-trailer: 1\r\n\r\n" if draw(st.booleans()) else b"\r\n"
    sent += b"HTTP/1.1 %d Status\r\n" % status + b"".join(b"%b: %b\r\n" % header for header in headers) + b"\r\n"
    sent += body_sent if framing == "chunked" else body
    return Answer(sent, status, body, closes=framing == "close", kept=framing != "close")


@settings(max_examples=40)
@given(well_formed())
def test_any_well_formed_answer_reads_as_httpx_reads_it(answer: Answer) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            await answer_whole(peer, answer)
            assert await caller.end() == "end"
            with_httpx = asyncio.create_task(by_httpx(there.upstream))
            await answer_whole(await there.accept(), answer)
            response, body = await with_httpx
            assert (caller.status, caller.body) == (response.status_code, body) == (answer.status, answer.body)
            raw = [(name.lower(), value) for name, value in response.headers.raw]
            head, length = answer_head(response.status_code, raw)
            assert (caller.headers, caller.length) == (head.headers, length)

    asyncio.run(work())


class Wire(asyncio.Transport):
    """A socket that is not there, so that each read is exactly what the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = False

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


async def heard_in(reads: list[bytes], *, closes: bool, after: bytes = b"") -> tuple[Caller, int]:
    """What a caller hears where these are the reads, and how many connections are idle after it.

    `after` is the answer that the connection brought before.
    """
    pool, upstream = a_pool(), Upstream.from_url("http://upstream")
    connection, caller = UpstreamConnection(pool, upstream, "192.0.2.1", math.inf, 1000), Caller()
    connection.connection_made(Wire())
    if after:
        before = Caller()
        connection.exchange = before
        before.upstream_connected(connection)
        connection.data_received(after)
        assert before.ended == "end"
        assert pool._idle[upstream].pop() is connection
    connection.exchange = caller
    caller.upstream_connected(connection)
    for read in reads:
        if caller.ended:
            break
        connection.data_received(read)
    if closes and not caller.ended:
        connection.connection_lost(None)
    kept = len(pool._idle.get(upstream, ()))
    await pool.close()
    return caller, kept


@examples(300)
@given(answer=well_formed() | st.sampled_from(list(ANSWERS.values())), data=st.data())
def test_any_split_of_an_answer_is_heard_alike(answer: Answer, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(answer.sent))))
    edges = sorted({0, *cuts, len(answer.sent)})
    reads = [answer.sent[start:stop] for start, stop in itertools.pairwise(edges)]

    async def work() -> None:
        whole, _ = await heard_in([answer.sent], closes=answer.closes)
        split, _ = await heard_in(reads, closes=answer.closes)
        assert (split.ended, split.status, split.headers) == ("end", whole.status, whole.headers)
        assert split.body == whole.body == answer.body

    asyncio.run(work())


EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" tok"},"logprobs":null,"finish_reason":null}]}\n\n'
# Some that look like a chunk of a chunk, or like its end.
BODIES = st.sampled_from(
    [EVENT, EVENT[:-1], EVENT * 9, b"\n\n", b"5\r\nhel\n\n\r\n", b"4\r\n\n\n\r\n", b"\r\n", b"0\r\n\r\n"]
)
CHUNK_HEADS = st.sampled_from([b"%x\r\n", b"%X\r\n", b"0%x\r\n", b"%x;a=b\r\n"])


@examples(300)
@given(chunks=st.lists(st.tuples(CHUNK_HEADS, BODIES), max_size=12), data=st.data())
def test_chunks_are_heard_alike_however_they_come(chunks: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    framed = [CHUNKED, *(head % len(body) + body + b"\r\n" for head, body in chunks), b"0\r\n\r\n"]
    sent = b"".join(framed)
    # Most of the reads are whole chunks.
    ends = list(itertools.accumulate(map(len, framed)))
    cuts = data.draw(st.lists(st.sampled_from(ends) | st.integers(0, len(sent)), min_size=len(ends)))
    reads = [sent[start:stop] for start, stop in itertools.pairwise(sorted({0, *cuts, len(sent)}))]
    caller, kept = asyncio.run(heard_in(reads, closes=False))
    assert (caller.ended, caller.body, kept) == ("end", b"".join(body for _, body in chunks), 1)


def test_an_event_that_is_one_chunk_and_one_read_goes_on_as_it_came() -> None:
    chunk = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
    done = b"e\r\ndata: [DONE]\n\n\r\n"
    caller, kept = asyncio.run(heard_in([CHUNKED + chunk, chunk, chunk, done, b"0\r\n\r\n"], closes=False))
    assert (caller.chunks, kept) == ([chunk, chunk, done], 1)
    assert caller.body == EVENT * 3 + b"data: [DONE]\n\n"


LOOKS_LIKE_ONE = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


@pytest.mark.parametrize(
    "reads",
    [
        # Its head has come, or a part of it; then comes something in it that looks like a chunk.
        [b"200\r\n", LOOKS_LIKE_ONE, b"x" * (512 - len(LOOKS_LIKE_ONE)) + b"\r\n"],
        [b"200\r\nx", LOOKS_LIKE_ONE, b"x" * (511 - len(LOOKS_LIKE_ONE)) + b"\r\n"],
        [b"1", b"c\r\n0123456789\n\n\r\n", b"x" * (28 - 14) + b"\r\n"],
        [b"200\r", b"\n" + LOOKS_LIKE_ONE, b"x" * (512 - len(LOOKS_LIKE_ONE)) + b"\r\n"],
    ],
)
def test_what_comes_inside_a_chunk_is_not_taken_for_one(reads: list[bytes]) -> None:
    before = [CHUNKED + LOOKS_LIKE_ONE[:-1], LOOKS_LIKE_ONE[-1:] + reads[0], *reads[1:]]
    for first in ([CHUNKED + LOOKS_LIKE_ONE + reads[0], *reads[1:]], before):
        whole, _ = asyncio.run(heard_in([b"".join(first), b"0\r\n\r\n"], closes=False))
        caller, _ = asyncio.run(heard_in([*first, b"0\r\n\r\n"], closes=False))
        assert (caller.ended, caller.body, caller.chunks) == (whole.ended, whole.body, []) == ("end", whole.body, [])


ALIKE = [
    b"HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello world",
    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi!",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\ncontent-length: -2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nhi",
    b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nhi",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n123456789",
]


# One test for each first answer: as tests of their own, the 2,048 cases would cost more than what they test.
@pytest.mark.parametrize("first", [name for name, answer in ANSWERS.items() if answer.kept])
def test_an_answer_is_heard_alike_whatever_came_before_on_the_connection(first: str) -> None:
    async def heard_again(second: bytes, cut: int) -> None:
        reads = [read for read in (second[:cut], second[cut:]) if read]
        fresh, kept = await heard_in(reads, closes=True)
        again, kept_again = await heard_in(reads, closes=True, after=ANSWERS[first].sent)
        assert (vars_of(again), kept_again) == (vars_of(fresh), kept), f"after {first}: {reads}"

    for second in [*ALIKE, *(answer.sent for answer in ANSWERS.values())]:
        for cut in (0, 1, -1, -3):
            asyncio.run(heard_again(second, cut))


def vars_of(caller: Caller) -> dict[str, object]:
    return {name: getattr(caller, name) for name in ("status", "headers", "length", "pieces", "ended", "answered")}


@pytest.mark.parametrize("reads", [[OK], [OK[:1], OK[1:]], [bytes([byte]) for byte in OK]])
def test_what_one_read_brought_of_a_body_is_one_piece(reads: list[bytes]) -> None:
    many = CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in b"streams") + b"0\r\n\r\n"
    assert asyncio.run(heard_in([many], closes=False))[0].pieces == [b"streams"]
    assert asyncio.run(heard_in(reads, closes=False))[0].body == b"hi"


def test_a_read_without_a_body_is_not_a_piece_of_it() -> None:
    reads = [CHUNKED, b"2", b"\r\n", b"hi", b"\r\n", b"0\r", b"\n\r\n"]
    assert asyncio.run(heard_in(reads, closes=False))[0].pieces == [b"hi"]


# Answers that are none

MANY_HEADERS = b"HTTP/1.1 200 OK\r\n" + (b"x-a: " + b"b" * 1000 + b"\r\n") * 70
TOO_MUCH = b"a" * (2 * HEADER_BYTES)
ENDLESS = {
    "header value": b"HTTP/1.1 200 OK\r\nx-a: " + TOO_MUCH,
    "header name": b"HTTP/1.1 200 OK\r\n" + TOO_MUCH,
    "reason phrase": b"HTTP/1.1 200 " + TOO_MUCH,
    "trailer": CHUNKED + b"0\r\nx-a: " + TOO_MUCH,
}
BROKEN = {
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n",
    "many headers": MANY_HEADERS,
    "many trailers": CHUNKED + b"0\r\n" + MANY_HEADERS[17:],
    "a protocol nobody asked for": b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nPRI",
    "a length and chunks": CHUNKED[:-2] + b"content-length: 2\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nhi",
    "a folded header": b"HTTP/1.1 200 OK\r\nx-a: 1\r\n 2\r\ncontent-length: 2\r\n\r\nhi",
    "a broken chunk": CHUNKED + b"2\r\nhi\r\nzz\r\n",
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN.keys())
def test_an_answer_that_is_none_is_a_loss_and_closes(sent: bytes, run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            peer.says(sent)
            assert (await caller.end()).startswith("lost: it")
            assert caller.answered is True
            assert there.all_idle() == []
            await peer.is_closed()

    run(work())


@pytest.mark.parametrize("sent", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_head_without_an_end_is_not_collected_for_ever(sent: bytes) -> None:
    reads = [sent[at : at + 1000] for at in range(0, len(sent), 1000)]
    caller, kept = asyncio.run(heard_in(reads, closes=False))
    assert caller.ended.startswith("lost: its headers are larger")
    assert kept == 0


@pytest.mark.parametrize(
    "second",
    [b"HTTP/1.1 500 No\r\ncontent-length: 3\r\n\r\nbye", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 5", b"garbage"],
)
def test_a_second_answer_in_one_read_is_not_taken_for_the_first(second: bytes) -> None:
    caller, kept = asyncio.run(heard_in([OK + second], closes=False))
    assert (caller.ended, caller.status, caller.length, caller.body) == ("end", 200, b"2", b"hi")
    assert kept == 0


@pytest.mark.parametrize("status", [b"000", b"099", b"600", b"999"])
def test_a_status_that_does_not_exist_is_a_loss(status: bytes) -> None:
    caller, _ = asyncio.run(heard_in([OK.replace(b"200", status)], closes=False))
    assert (caller.ended[:5], caller.status) == ("lost:", 0)


@pytest.mark.parametrize(
    ("said", "answered"), [(b"", False), (b"H", True), (b"HTTP/1.1 100 Continue\r\n\r\n", True), (OK[:-1], True)]
)
@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_a_loss_says_whether_a_byte_had_come(said: bytes, answered: bool, ending: str, run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            peer.says(said)
            if said == OK[:-1]:
                await caller.until(lambda caller: caller.body)
                getattr(peer, ending)()
                expected = {"closes": "lost: it closed the connection", "resets": "lost: it reset the connection"}
                assert await caller.end() == expected[ending]
            else:
                peer.closes()
                assert await caller.end() == "lost: it closed the connection"
            assert caller.answered is answered
            assert there.all_idle() == []

    run(work())


def test_a_reset_is_no_end_of_a_body_that_ends_with_the_connection(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            peer.says(b"HTTP/1.1 200 OK\r\n\r\nhi")
            await caller.until(lambda caller: caller.body)
            peer.resets()
            assert await caller.end() == "lost: it reset the connection"

    run(work())


# What a caller asks for


def test_a_discarded_connection_is_closed_at_once_and_tells_nothing_more(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            peer.says(CHUNKED + b"2\r\nhi\r\n")
            await caller.until(lambda caller: caller.body)
            assert caller.connection is not None
            caller.connection.discard()
            await peer.is_closed()
            assert caller.ended == ""
            assert there.all_idle() == []

    run(work())


def test_a_paused_connection_reads_nothing_until_it_is_resumed(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            peer.says(OK[:-2])
            await caller.until(lambda caller: caller.status)
            assert caller.connection is not None
            caller.connection.pause()
            peer.says(OK[-2:])
            # A round trip on another connection: by then the bytes are there.
            await there.idle()
            assert (caller.body, caller.ended) == (b"", "")
            caller.connection.resume()
            assert await caller.end() == "end"

    run(work())


def test_a_connection_that_waits_for_its_turn_reads_once_that_and_its_caller_let_it(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            peer.says(OK[:-2])
            await caller.until(lambda caller: caller.status)
            connection = caller.connection
            assert isinstance(connection, UpstreamConnection)
            for stops, goes_on in (
                (connection.hold_up, connection.resume),
                (connection.pause, connection.read_on),
            ):
                connection.hold_up()
                connection.pause()
                goes_on()
                await there.idle()
                assert (caller.body, caller.ended) == (b"", "")
                connection.resume()
                connection.read_on()
                stops()
            peer.says(OK[-2:])
            await there.idle()
            assert (caller.body, caller.ended) == (b"", "")
            connection.resume()
            assert await caller.end() == "end"

    run(work())


def test_answers_that_come_all_at_once_have_turns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held_up: list[UpstreamConnection] = []
    hold_up = UpstreamConnection.hold_up

    def counted(connection: UpstreamConnection) -> None:
        held_up.append(connection)
        hold_up(connection)

    monkeypatch.setattr(UpstreamConnection, "hold_up", counted)
    body = b"x" * 2_000_000

    async def work() -> None:
        async with net() as there:
            calls = [await there.call(release=False) for _ in range(40)]
            for _, peer in calls:
                peer.says(b"HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n" + body)
            for caller, _ in calls:
                assert await caller.end() == "end"
                assert caller.body == body

    run(work())
    assert held_up


def test_a_connection_that_was_paused_can_serve_again(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call(release=False)
            peer.says(OK)
            await caller.end()
            assert caller.connection is not None
            caller.connection.pause()
            caller.connection.release()
            again = there.connect()
            await send(again, peer)
            peer.says(OK)
            assert await again.end() == "end"

    run(work())


def test_a_caller_that_leaves_inside_the_head_hears_nothing_more(run: Run) -> None:
    class Leaving(Caller):
        def upstream_head(self, head: AnswerHead, length: bytes | None) -> None:
            super().upstream_head(head, length)
            assert self.connection is not None
            self.connection.discard()

    async def work() -> None:
        async with net() as there:
            caller = Leaving()
            there.pool.connect(there.upstream, caller, fresh=False)
            peer = await there.accept()
            await send(caller, peer)
            peer.says(OK)
            await peer.is_closed()
            assert (caller.status, caller.pieces, caller.ended) == (200, [], "")

    run(work())


def test_an_answer_before_the_request_has_been_read_ends_the_connection(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            caller = there.connect()
            peer = await there.accept()
            await caller.until(lambda caller: caller.connection)
            assert caller.connection is not None
            # Far more than the sockets between take, while the peer's stream reads 128 KiB of it.
            caller.connection.send(b"x" * 32_000_000)
            peer.says(b"HTTP/1.1 413 Large\r\ncontent-length: 0\r\n\r\n")
            assert await caller.end() == "end"
            assert there.all_idle() == []

    run(work())


# Idle connections


def test_an_idle_connection_serves_the_next_request_and_counts_as_reused(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            first, peer = await there.call()
            assert first.connection is not None
            assert not first.connection.reused
            peer.says(OK)
            await first.end()
            second = there.connect()
            assert second.connection is first.connection
            assert second.connection.reused
            await send(second, peer)
            peer.says(OK)
            assert (await second.end(), second.body) == ("end", b"hi")
            assert first.pieces == [b"hi"]

    run(work())


def test_a_fresh_connection_is_never_an_idle_one(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            idle, _ = await there.idle()
            caller, _ = await there.call(fresh=True)
            assert caller.connection is not idle
            assert caller.connection is not None
            assert not caller.connection.reused
            assert there.all_idle() == [idle]

    run(work())


def test_an_idle_connection_of_another_upstream_is_not_taken(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            idle, _ = await there.idle()
            other, caller = Upstream.from_url(there.upstream.url), Caller()
            there.pool.connect(other, caller, fresh=False)
            await caller.until(lambda caller: caller.connection)
            assert caller.connection is not idle

    run(work())


def test_the_youngest_idle_connection_is_taken_first(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            callers = [await there.call(fresh=True) for _ in range(3)]
            for caller, peer in callers:
                peer.says(OK)
                await caller.end()
            taken = [there.connect().connection for _ in range(3)]
            assert taken == [caller.connection for caller, _ in reversed(callers)]

    run(work())


def test_an_idle_connection_past_its_time_is_closed_and_not_taken(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            idle, peer = await there.idle()
            idle.idle_since -= IDLE_FOR + 0.1
            caller, _ = await there.call()
            assert caller.connection is not idle
            await peer.is_closed()
            assert there.all_idle() == []

    run(work())


def test_an_idle_connection_within_its_time_is_taken(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            idle, _ = await there.idle()
            idle.idle_since -= IDLE_FOR - 1
            assert there.connect().connection is idle

    run(work())


class SkewedLoop(asyncio.SelectorEventLoop):
    """A loop whose time can be moved on."""

    skew = 0.0

    def time(self) -> float:
        return super().time() + self.skew


def test_idle_connections_are_closed_when_their_time_is_up_though_nobody_asks() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SkewedLoop)
        async with net() as there:
            _, old_peer = await there.idle()
            loop.skew += IDLE_FOR / 2
            young, young_peer = await there.idle()
            kept_at = young.idle_since
            loop.skew += IDLE_FOR / 2
            await old_peer.is_closed()
            assert there.all_idle() == [young]
            loop.skew += IDLE_FOR / 2
            await young_peer.is_closed()
            assert there.all_idle() == []
            assert loop.time() - kept_at < IDLE_FOR * 1.4

    with asyncio.Runner(loop_factory=SkewedLoop) as runner:
        runner.run(work())


@pytest.mark.parametrize("said", [OK, b"garbage", b"HTTP/1.1 408 Idle\r\nconnection: close\r\n\r\n"])
def test_an_upstream_that_speaks_while_idle_is_not_trusted_again(said: bytes, run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            _, peer = await there.idle()
            peer.says(said)
            await there.forgets()
            await peer.is_closed()
            assert there.all_idle() == []

    run(work())


@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_an_idle_connection_that_its_upstream_closes_is_forgotten(ending: str, run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            idle, peer = await there.idle()
            getattr(peer, ending)()
            await there.forgets()
            assert there.all_idle() == []
            caller, _ = await there.call()
            assert caller.connection is not idle

    run(work())


# Dials


def test_a_dial_whose_caller_has_gone_ends_among_the_idle_ones(run: Run) -> None:
    class Gone(Caller):
        def upstream_connected(self, connection: Connection) -> None:
            super().upstream_connected(connection)
            connection.release()

    async def work() -> None:
        async with net() as there:
            gone = Gone()
            there.pool.connect(there.upstream, gone, fresh=False)
            peer = await there.accept()
            await gone.until(lambda caller: caller.connection)
            caller = there.connect()
            assert caller.connection is gone.connection
            await send(caller, peer)
            peer.says(OK)
            assert await caller.end() == "end"

    run(work())


def test_a_connection_that_was_idle_counts_as_reused_though_it_never_served() -> None:
    async def work() -> None:
        async with net() as there:
            first = there.connect()
            await first.until(lambda caller: caller.connection)
            assert first.connection is not None
            first.connection.release()
            second = there.connect()
            assert second.connection is first.connection
            assert second.connection.reused

    asyncio.run(work())


UNREACHABLE = {
    "nobody listens": lambda: f"http://127.0.0.1:{free_port()}",
    "no such name": lambda: "http://no-such-host.invalid",
    "no name at all": lambda: f"http://{'a' * 70}.example",
}


@pytest.mark.parametrize("url", UNREACHABLE.values(), ids=UNREACHABLE.keys())
def test_an_upstream_that_cannot_be_reached_is_said_to_be_so_without_its_address(
    url: Callable[[], str], run: Run
) -> None:
    async def work() -> None:
        async with net() as there:
            upstream, caller = Upstream.from_url(url()), Caller()
            there.pool.connect(upstream, caller, fresh=False)
            said = await caller.end()
            assert said.startswith("unreachable: ")
            assert upstream.host not in said
            assert str(upstream.port) not in said
            if "127.0.0.1" in upstream.url:
                assert said == "unreachable: connection refused"
            assert caller.timed_out is None

    run(work())


def test_an_upstream_that_refuses_on_all_its_addresses_refuses(run: Run) -> None:
    async def work() -> None:
        async with net(Names(two_addresses=["127.0.0.1", "127.0.0.2"])) as there:
            caller = Caller()
            upstream = Upstream.from_url(f"http://two-addresses:{free_port()}")
            there.pool.connect(upstream, caller, fresh=False)
            assert await caller.end() == "unreachable: connection refused"

    run(work())


def test_an_address_that_answers_nothing_does_not_stand_in_for_the_next(run: Run) -> None:
    async def work() -> None:
        # One that takes no connect, and one that does, at the same port.
        names = Names(two_addresses=["127.0.0.1", "127.0.0.2"])
        with full_backlog() as port:
            async with net(names, host="127.0.0.2", port=port, connect_timeout=30) as there:
                caller = Caller()
                there.pool.connect(Upstream.from_url(f"http://two-addresses:{port}"), caller, fresh=False)
                await caller.until(lambda caller: caller.connection or caller.ended)
                connection = caller.connection
                assert isinstance(connection, UpstreamConnection)
                assert connection.address == "127.0.0.2"
                await there.accept()
                connection.discard()

    run(work())


def test_a_connection_serves_no_more_calls_and_no_longer_than_it_may(run: Run) -> None:
    async def work() -> None:
        async with net(max_requests=10) as there:
            served = []
            for _ in range(24):
                caller = there.connect()
                await caller.until(lambda caller: caller.connection)
                assert isinstance(caller.connection, UpstreamConnection)
                if caller.connection not in served:
                    peer = await there.accept()
                served.append(caller.connection)
                await send(caller, peer)
                peer.says(OK)
                await caller.end()
            assert {9, 10, 11} >= {served.count(one) for one in served[:18]}
        async with net(max_age=1e-9) as there:
            _, peer = await there.idle()
            await peer.is_closed()
            assert there.all_idle() == []

    run(work())


def test_a_connection_ends_once_its_host_is_no_longer_there(run: Run) -> None:
    async def work() -> None:
        names = Names(moves=["127.0.0.1"])
        async with net(names) as there:
            there.upstream = Upstream.from_url(f"http://moves:{there.upstream.port}")
            connection, peer = await there.idle()
            busy, other = await there.call(fresh=True)
            assert connection.address == "127.0.0.1"
            there.pool._gone.add(("moves", "127.0.0.1"))
            there.pool._drop_gone()
            await peer.is_closed()
            # What runs there ends, and its connection with it.
            other.says(OK)
            assert await busy.end() == "end"
            await other.is_closed()
            assert there.all_idle() == []

    run(work())


def test_a_silent_upstream_is_asked_whether_it_is_there(run: Run) -> None:
    async def work() -> None:
        async with net(keepalive=40) as there:
            connection, _ = await there.idle()
            assert connection._transport is not None
            asked = connection._transport.get_extra_info("socket")
            assert asked.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            for option, value in (("KEEPIDLE", 20), ("KEEPINTVL", 5), ("KEEPCNT", 4), ("USER_TIMEOUT", 40_000)):
                assert asked.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}")) == value

    run(work())


def test_an_upstream_that_does_not_speak_tls_is_unreachable(run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            upstream, caller = Upstream.from_url(there.upstream.url.replace("http:", "https:")), Caller()
            there.pool.connect(upstream, caller, fresh=False)
            (await there.accept()).says(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert (await caller.end()).startswith("unreachable: ")
            assert caller.timed_out is None

    run(work())


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """A port that answers no more connects."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = waiting.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_a_dial_that_takes_too_long_says_which_limit_passed(run: Run) -> None:
    async def work() -> None:
        with full_backlog() as port:
            async with net(connect_timeout=0.05) as there:
                upstream, caller = Upstream.from_url(f"http://127.0.0.1:{port}"), Caller()
                there.pool.connect(upstream, caller, fresh=False)
                assert await caller.end() == "unreachable: it took no connection"
                assert caller.timed_out == 0.05

    run(work())


@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_an_upstream_that_hangs_up_at_once_is_told_as_a_loss(ending: str, run: Run) -> None:
    async def work() -> None:
        async with net() as there:
            for _ in range(20):
                caller = Caller()
                there.pool.connect(there.upstream, caller, fresh=True)
                getattr(await there.accept(), ending)()
                await caller.until(lambda caller: caller.connection or caller.ended)
                if caller.connection is not None:
                    caller.connection.send(REQUEST)
                assert await caller.end()
                assert not caller.answered

    run(work())


# The end


def test_closing_gives_up_dials_and_closes_what_is_idle(run: Run) -> None:
    async def work() -> None:
        with full_backlog() as port:
            async with net(connect_timeout=10 * PATIENCE) as there:
                _, peer = await there.idle()
                dialling = Caller()
                there.pool.connect(Upstream.from_url(f"http://127.0.0.1:{port}"), dialling, fresh=False)
                async with asyncio.timeout(PATIENCE):
                    await there.pool.close()
                await peer.is_closed()
                assert there.all_idle() == []
                assert asyncio.all_tasks() - {asyncio.current_task()} == set()
                assert dialling.connection is None

    run(work())


def test_a_connection_released_after_the_close_is_closed() -> None:
    async def work() -> None:
        async with net() as there:
            caller, peer = await there.call()
            await there.pool.close()
            peer.says(OK)
            await caller.end()
            kept = there.all_idle()
            await there.pool.close()
            assert kept == []

    asyncio.run(work())


def test_a_closed_connection_leaves_nothing_to_the_garbage_collector() -> None:
    async def work() -> int:
        pool, upstream = a_pool(), Upstream.from_url("http://upstream")
        gc.collect()
        for _ in range(10):
            connection, caller = UpstreamConnection(pool, upstream, "192.0.2.1", math.inf, 1000), Caller()
            connection.connection_made(Wire())
            connection.exchange = caller
            caller.upstream_connected(connection)
            connection.data_received(OK)
            connection.connection_lost(None)
        del connection, caller
        return gc.collect()

    gc.disable()
    try:
        assert asyncio.run(work()) == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError()])
def test_a_dial_that_fails_in_a_way_that_nobody_foresees_is_told(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        pool = a_pool()

        async def fails(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(connections, "start_connection", fails)
        caller = Caller()
        pool.connect(Upstream.from_url("http://127.0.0.1:1"), caller, fresh=False)
        assert await caller.end() == f"crashed: {error!r}"
        await pool.close()

    asyncio.run(work())


def test_a_bug_in_what_is_told_of_an_answer_ends_the_call_and_is_no_loss_of_the_upstream(run: Run) -> None:
    class Broken(Caller):
        def upstream_body(self, data: bytes) -> None:
            raise RuntimeError("a bug")

        def upstream_answer(self, head: AnswerHead, content: bytes) -> None:
            raise RuntimeError("a bug")

    async def work() -> None:
        async with net() as there:
            for _ in range(2):
                caller = Broken()
                there.pool.connect(there.upstream, caller, fresh=True)
                peer = await there.accept()
                await send(caller, peer)
                peer.says(OK)
                assert await caller.end() == "crashed: RuntimeError('a bug')"

    run(work())
