"""One connection to an upstream: HTTP/1.1 by httptools, with the framing that this does not tell of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol, cast

import httptools

from gateway.admission.turns import BulkReads
from gateway.pool.upstream_pool import Upstream
from gateway.relay.interfaces import Caller
from gateway.upstream.connect_errors import describe_error
from gateway.wire.head_cache import SameHead
from gateway.wire.heads import AnswerHead, Header, answer_head

# A read of so many bytes is one of many: of thousands of streams at full speed each would have its turn before a timer.
_BULK: Final = 16 * 1024
# Most that an answer may send before its head is complete, or after that without any of its body.
HEADER_BYTES: Final = 64 * 1024
# What a chunk begins with, how long that is, and the chunk's size, by its whole length: an event of a usual size need
# not be parsed and framed anew. Its first letter, of `data` or `event`, tells it from a comment.
_CHUNKS: Final = {
    len(head) + size + 2: ((head + b"d", head + b"e"), len(head) + 1, size)
    for size, head in ((size, b"%x\r\n" % size) for size in range(1, 512))
}
_TOO_LARGE: Final = f"its headers are larger than {HEADER_BYTES} bytes"


class Owner(Protocol):
    """What has the connections of all upstreams, and whose turn it is of those that bring much."""

    bulk_reads: BulkReads

    def keep(self, connection: UpstreamConnection) -> None:
        """It is idle, and may serve again."""

    def forget(self, connection: UpstreamConnection) -> None:
        """It is idle no more, as its upstream has closed it."""


class UpstreamConnection:
    """One connection to an upstream; serves one exchange at a time.

    httptools tells of 1xx answers and trailers by the same callbacks as of everything else, has no
    call for the end of the stream, and goes on to a second answer without a word; so framing is
    tracked here.
    """

    __slots__ = (
        "_answered",
        "_between_chunks",
        "_body",
        "_complete",
        "_head",
        "_head_done",
        "_headers",
        "_held_up",
        "_interim",
        "_keep_alive",
        "_new_head",
        "_overhead",
        "_owner",
        "_parser",
        "_paused",
        "_problem",
        "_same",
        "_status",
        "_transport",
        "_until_close",
        "address",
        "ends_at",
        "exchange",
        "idle_since",
        "on_body",
        "requests",
        "reused",
        "send",
        "upstream",
    )

    def __init__(self, owner: Owner, upstream: Upstream, address: str, ends_at: float, requests: int) -> None:
        """To `address`; it is closed after so many `requests`, and after the first that is over past `ends_at`."""
        self.upstream = upstream
        self.address = address
        self.ends_at = ends_at
        self.requests = requests
        self.exchange: Caller | None = None
        self.reused = False
        self.idle_since = 0.0  # not idle
        self._same: tuple[SameHead, AnswerHead] | None = None
        # The transport's own, as one more call for each request would only pass it on.
        self.send: Callable[[bytes | bytearray], None] = _nowhere
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._held_up = False
        self._body: list[bytes] = []
        self.on_body = self._body.append  # the parser's callback: the list's own, as it comes with every event
        self._parser: Any = httptools.HttpResponseParser(self)
        self._reset()

    def _reset(self) -> None:
        self._headers: list[Header] = []
        self._head: list[Header] = []
        self._overhead = 0
        self._status = 0
        self._body.clear()
        self._between_chunks = False
        self._answered = False
        self._interim = False
        self._head_done = False
        self._new_head = False
        self._until_close = False
        self._complete = False
        self._keep_alive = False
        self._problem = ""

    # What an exchange asks for

    def send_pieces(self, pieces: Iterable[bytes | bytearray]) -> None:
        """Send what is in pieces, in one call of the system."""
        if self._transport is not None:
            self._transport.writelines(pieces)

    def pause(self) -> None:
        """Stop reading."""
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again, in its turn: thousands of clients may begin to read at once."""
        self._paused = False
        if self._transport is not None and not self._held_up:
            self._owner.bulk_reads.has_read(self)
            if not self._held_up:
                self._transport.resume_reading()

    def hold_up(self) -> None:
        """Others bring much, too: read no more until it is its turn."""
        self._held_up = True
        if self._transport is not None:
            self._transport.pause_reading()

    def read_on(self) -> None:
        """It is its turn."""
        self._held_up = False
        if self._transport is not None and not self._paused:
            self._transport.resume_reading()

    def unsent(self) -> int:
        """How many bytes were written that the system has yet to take."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def release(self) -> None:
        """To the idle ones, if the answer left the connection fit for another request."""
        self.exchange = None
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._answered:
            fit = self._complete and self._keep_alive and not self._problem
            self._reset()
        else:
            fit = True
        if fit and not transport.get_write_buffer_size():
            if self._paused:
                self.resume()
            self.reused = True
            self._owner.keep(self)
        else:
            self.discard()

    def discard(self) -> None:
        """Close at once; vLLM stops generating when it sees that."""
        self.exchange = None
        self.idle_since = 0.0
        if self._transport is not None:
            self._transport.abort()

    # What asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self.send = self._transport.write

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            # Nobody asked: an upstream that speaks first cannot be trusted with the next request.
            self._forget()
            self.discard()
            return
        if len(data) >= _BULK:
            self._owner.bulk_reads.has_read(self)
        try:
            if self._between_chunks:
                known = _CHUNKS.get(len(data))
                if known is not None:
                    heads, start, size = known
                    # By slices, as startswith and endswith take longer; the blank line is an event's end.
                    if data[:start] in heads and data[-4:] == b"\n\n\r\n":
                        exchange.upstream_chunk(data, size)
                        return
            self._parse(exchange, data)
        except Exception as error:
            # A bug of ours, which asyncio would take for the end of the connection.
            self.discard()
            exchange.crashed(error)

    def _parse(self, exchange: Caller, data: bytes) -> None:
        begins = not self._answered
        if begins:
            if self._same is not None and (at := self._same[0].body_at(data)):
                exchange.upstream_answer(self._same[1], data[at:])
                return
            self._answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._unreadable(error)
        if data[-1:] != b"\n":
            self._between_chunks = False  # the next chunk's head may have begun
        # What one read brought is handed on in order: head, body, end or problem; its body is one call.
        if self._new_head:
            self._hand_on_head(exchange, data, begins=begins)
        body = self._body
        if body:
            piece = body.pop() if len(body) == 1 else b"".join(body)
            body.clear()
            self._overhead = 0
            if self.exchange is exchange:  # it may have left in its answer's head
                exchange.upstream_body(piece)
        else:
            self._count_overhead(data)
        if self._complete or self._problem:
            self._end(exchange)

    def _unreadable(self, error: Exception) -> None:
        if isinstance(error, httptools.HttpParserUpgrade):
            self._problem = "it answered with a protocol that was not asked for"
        else:
            self._problem = self._problem or f"its answer is not HTTP ({error})"

    def _count_overhead(self, data: bytes) -> None:
        self._overhead += len(data)
        if self._overhead > HEADER_BYTES and not self._problem:
            self._problem = _TOO_LARGE

    def _end(self, exchange: Caller) -> None:
        if self.exchange is not exchange:
            return  # it has ended, and may have given this connection back
        if self._complete:
            exchange.upstream_end()
        else:
            self.exchange = None
            exchange.upstream_lost(self._problem, answered=True)
            self.discard()

    def _hand_on_head(self, exchange: Caller, data: bytes, *, begins: bool) -> None:
        self._new_head = False
        self._overhead += len(data)
        if self._overhead > HEADER_BYTES and _size_of(self._head) > HEADER_BYTES:
            self._problem = _TOO_LARGE
            self._complete = False
            self._body.clear()
            return
        self._overhead = 0
        head, length = answer_head(self._status, self._head)
        self._head = []
        if begins and self._complete and self._keep_alive and length is not None and self._status not in (204, 304):
            same = SameHead.of(data)
            self._same = (same, head) if same else None
        exchange.upstream_head(head, length)

    def pause_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.upstream_paused()

    def resume_writing(self) -> None:
        if self.exchange is not None:
            self.exchange.upstream_resumed()

    def eof_received(self) -> None:
        """Returning nothing lets asyncio close the connection; `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.send = _nowhere
        self._parser = None  # which holds this connection, and would keep it until the garbage collector's next round
        self._forget()
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        if self._until_close and self._head_done and exc is None:
            exchange.upstream_end()
            return
        exchange.upstream_lost(
            "it closed the connection" if exc is None else describe_error(exc), answered=self._answered
        )

    def _forget(self) -> None:
        if self.idle_since:
            self._owner.forget(self)

    # What httptools tells

    def on_message_begin(self) -> None:
        if self._complete:
            self._stop("it sent more than one answer")

    def _stop(self, problem: str) -> None:
        """Take nothing more of this read: the parser hands an exception on."""
        self._problem = problem
        raise ValueError(problem)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        status = self._status = parser.get_status_code()
        if not 100 <= status <= 599:
            self._stop(f"its status {status} does not exist")
        headers, self._headers = self._headers, []  # what comes from now on are trailers
        self._interim = status < 200
        if self._interim:
            return
        self._head = headers
        self._head_done = self._new_head = True
        self._keep_alive = parser.should_keep_alive()
        if not self._keep_alive and status not in (204, 304):
            names = {name for name, _ in headers}
            self._until_close = names.isdisjoint((b"content-length", b"transfer-encoding"))

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_message_complete(self) -> None:
        self._complete = not self._interim


def _nowhere(request: bytes | bytearray) -> None: ...


def _size_of(headers: list[Header]) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers)
