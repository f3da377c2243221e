"""One connection to an upstream: HTTP/1.1 by httptools, with the framing that httptools does not report."""

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

# A read of so many bytes takes turns with others: else thousands of streams at full speed would all run before a timer.
_BULK: Final = 16 * 1024
# The most bytes that a response may send before its head is complete, or after that without body data.
HEADER_BYTES: Final = 64 * 1024
# By a chunk's total length: the bytes it begins with, their length and the chunk's size. With this table an event of a
# usual size need not be parsed and framed again. The first letter of `data` or `event` excludes a comment.
_CHUNKS: Final = {
    len(head) + size + 2: ((head + b"d", head + b"e"), len(head) + 1, size)
    for size, head in ((size, b"%x\r\n" % size) for size in range(1, 512))
}
_TOO_LARGE: Final = f"its headers are larger than {HEADER_BYTES} bytes"


class Owner(Protocol):
    """Owns the connections of all upstreams, and gives turns to those that receive much."""

    bulk_reads: BulkReads

    def keep(self, connection: UpstreamConnection) -> None:
        """Keep an idle connection for reuse."""

    def forget(self, connection: UpstreamConnection) -> None:
        """Forget an idle connection that its upstream has closed."""


class UpstreamConnection:
    """One connection to an upstream; serves one exchange at a time.

    httptools reports 1xx responses and trailers by the same callbacks as everything else. It has no call for the end of
    the stream, and parses a second response without notice. So framing is tracked here.
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
        """A connection to `address`, closed after so many `requests`, or when a request ends after `ends_at`."""
        self.upstream = upstream
        self.address = address
        self.ends_at = ends_at
        self.requests = requests
        self.exchange: Caller | None = None
        self.reused = False
        self.idle_since = 0.0  # not idle
        self._same: tuple[SameHead, AnswerHead] | None = None
        # The transport's own method: a wrapper would cost one more call per request.
        self.send: Callable[[bytes | bytearray], None] = _nowhere
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._held_up = False
        self._body: list[bytes] = []
        self.on_body = self._body.append  # the parser's callback: the list's own method, as each event calls it
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

    # Called by the exchange

    def send_pieces(self, pieces: Iterable[bytes | bytearray]) -> None:
        """Send several pieces in one system call."""
        if self._transport is not None:
            self._transport.writelines(pieces)

    def pause(self) -> None:
        """Stop reading."""
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Resume reading, in turn with others: thousands of clients may resume at once."""
        self._paused = False
        if self._transport is not None and not self._held_up:
            self._owner.bulk_reads.has_read(self)
            if not self._held_up:
                self._transport.resume_reading()

    def hold_up(self) -> None:
        """Pause reading until this connection's turn: others also receive much."""
        self._held_up = True
        if self._transport is not None:
            self._transport.pause_reading()

    def read_on(self) -> None:
        """Resume reading: it is this connection's turn."""
        self._held_up = False
        if self._transport is not None and not self._paused:
            self._transport.resume_reading()

    def unsent(self) -> int:
        """The number of written bytes that the system has not yet taken."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def release(self) -> None:
        """Return the connection to the idle ones if it can serve another request, else close it."""
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

    # Called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self.send = self._transport.write

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            # Unsolicited data: an upstream that speaks first cannot be trusted with the next request.
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
                    # Slices, because startswith and endswith take longer. The blank line ends an event.
                    if data[:start] in heads and data[-4:] == b"\n\n\r\n":
                        exchange.upstream_chunk(data, size)
                        return
            self._parse(exchange, data)
        except Exception as error:
            # A bug in the gateway, which asyncio would treat as the end of the connection.
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
            self._between_chunks = False  # the next chunk's size line may have begun
        # The data of one read is passed on in order: head, body, end or problem. All its body is one call.
        if self._new_head:
            self._hand_on_head(exchange, data, begins=begins)
        body = self._body
        if body:
            piece = body.pop() if len(body) == 1 else b"".join(body)
            body.clear()
            self._overhead = 0
            if self.exchange is exchange:  # it may have released the connection at the head
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
            return  # the exchange has ended and may have released the connection
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
        self._parser = None  # a reference cycle: without this the connection lives until the next collection
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

    # Called by httptools

    def on_message_begin(self) -> None:
        if self._complete:
            self._stop("it sent more than one answer")

    def _stop(self, problem: str) -> None:
        """Stop parsing this read: the parser passes the exception on."""
        self._problem = problem
        raise ValueError(problem)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        status = self._status = parser.get_status_code()
        if not 100 <= status <= 599:
            self._stop(f"its status {status} does not exist")
        headers, self._headers = self._headers, []  # later headers are trailers
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
