"""uvicorn's HTTP protocol with timeouts, the gateway's own error responses and a graceful shutdown."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import select
import socket
import struct
import sys
import termios
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.admission.arrivals import no_room
from gateway.admission.buffers import SHARE
from gateway.admission.owners import Owner
from gateway.admission.turns import BULK, BulkReads, FewAtATime
from gateway.relay.data_path import DataPath
from gateway.server.context import Parts, state_of
from gateway.server.listener import WATCHERS
from gateway.wire.client_address import is_trusted
from gateway.wire.errors import BadRequest, Draining, GatewayError, HeadTimeout, HeadTooLarge, Shortage
from gateway.wire.heads import lines, new_request_id, too_large, too_many

_log = logging.getLogger(__name__)

_NO_HTTP: GatewayError = BadRequest("What came is not an HTTP request: the connection is closed.")

# The members used here of uvicorn's protocol class, which is not a public interface for subclasses.
_METHODS = (
    "connection_lost",
    "connection_made",
    "data_received",
    "on_body",
    "on_headers_complete",
    "on_message_begin",
    "on_message_complete",
    "on_response_complete",
    "_start_asgi_task",
    "_unset_keepalive_if_required",
    "pause_writing",
    "resume_writing",
    "send_400_response",
    "shutdown",
    "timeout_keep_alive_handler",
)
_ATTRIBUTES = (
    "app_state",
    "cycle",
    "expect_100_continue",
    "flow",
    "headers",
    "parser",
    "pipeline",
    "server_state",
    "timeout_keep_alive",
    "timeout_keep_alive_task",
    "transport",
)


def missing_names(protocol: type[asyncio.Protocol]) -> list[str]:
    """The names that this module needs and that the installed uvicorn's protocol lacks."""
    attributes = protocol.__init__.__code__.co_names
    methods = [name for name in _METHODS if not hasattr(protocol, name)]
    return methods + [name for name in _ATTRIBUTES if name not in attributes]


# Seconds after the listeners close in which a connection may get one more request: its client does not know yet.
DRAIN_GRACE = 1.0
# Longer where its last answer has just ended: most clients send their next request then, and on a busy machine a second
# is too short for some of them.
ANSWERED_GRACE = 3.0

# High-water mark of a client's write buffer in bytes: above it the response is paused.
_UNSENT = 16 * 1024
# Data that may hold many chunks is parsed in slices of so many bytes, for so many seconds in a row: parsing one chunk
# takes as long as parsing a thousand bytes.
_SLICE, _SLICE_TIME = 4096, 0.0005

# Linux reports a FIN behind unread bytes; every system reports a reset, whatever events are polled.
_LEFT = getattr(select, "POLLRDHUP", 0)

# A path with its query, after an optional scheme and host as sent to a proxy, which are ignored. No client sends a
# fragment.
_TARGET = re.compile(rb"(?:https?://[A-Za-z0-9._~:\[\]-]+)?(/[^#]*)", re.IGNORECASE)
# Replaces any other target: uvicorn can parse it and no route matches it.
_NO_PATH = b"*"

# struct linger: on, with zero seconds, so that closing sends a reset.
_AT_ONCE = struct.pack("ii", 1, 0)


def _unsent_by_the_system(connection: socket.socket) -> int:
    """Bytes written but not yet acknowledged by the peer; 0 where the system does not report them."""
    if sys.platform != "linux":
        return 0
    try:
        return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0])
    except OSError:
        return 0  # the socket has just been closed


# Shared instead of a deque per connection, because hardly any connection pipelines.
_NOTHING_WAITS: deque[Any] = deque(maxlen=0)


class _Flow(FlowControl):
    """uvicorn's flow control without an event per connection, which would take as much memory as the exchange."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = False
        self.write_paused = False
        self.held_up = False
        self._writable: asyncio.Event | None = None

    def hold_up(self) -> None:
        """Pause reading until `read_on`, even if uvicorn resumes it."""
        self.held_up = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def read_on(self) -> None:
        self.held_up = False
        if not self.read_paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def resume_reading(self) -> None:
        if self.held_up:
            self.read_paused = False
        else:
            super().resume_reading()

    async def drain(self) -> None:
        if self.write_paused:
            if self._writable is None:
                self._writable = asyncio.Event()
            await self._writable.wait()

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()
            self._writable = None


class TooManyHeaders(Exception):
    """Raised in a callback to stop the parser on a head."""


class _ClosedParser:
    """The parser of a refused connection: it discards all data."""

    @staticmethod
    def feed_data(data: bytes) -> None: ...


class SharedState(ServerState):
    """uvicorn's server state with the additional state that the connections share."""

    def __init__(self) -> None:
        super().__init__()
        # The default response headers in wire format; they change once a second.
        self.default_lines = b""
        # The connections in ten groups; the timeouts of one group are checked per tick.
        self.sweep_groups: list[set[HttpProtocol]] = [set() for _ in range(10)]
        self.bulk_reads = BulkReads(lambda call: asyncio.get_running_loop().call_soon(call))
        self.few = FewAtATime(lambda call: asyncio.get_running_loop().call_soon(call))


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, but invalid HTTP is refused in OpenAI's envelope and never in the middle of a response."""

    server_state: SharedState
    flow: _Flow
    cycle: Any  # uvicorn's RequestResponseCycle, or, where the shortcut is taken, the protocol itself

    # uvicorn's own attributes just fit CPython's shared-key dict. A slot costs 8 bytes; one more attribute would cost
    # 1,500 bytes per connection.
    __slots__ = (
        "_awaited_since",
        "_ends",
        "_feeds_rest",
        "_first_read",
        "_has_all",
        "_head_size",
        "_held",
        "_held_for",
        "_idle_since",
        "_in_body",
        "_in_head",
        "_refusal",
        "_rest",
        "_running",
        "_stuck_since",
        "_sweep_group",
        "_unsent",
        "address",
        "owner",
    )

    def __init__(
        self,
        config: Config,
        server_state: SharedState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.pipeline = _NOTHING_WAITS
        self._in_body = False
        # The error that ended reading, None while reading goes on.
        self._refusal: GatewayError | None = None
        self._ends = False
        self._idle_since: float | None = None
        # The application's running request; uvicorn's `cycle` is the newest request, which may be queued behind it.
        self._running: RequestResponseCycle | None = None
        # Since when the client owes data: the rest of a request's head, or of a refused body.
        self._awaited_since: float | None = None
        self._in_head = False
        # Bytes of the read in which the head began, and bytes after that.
        self._first_read = 0
        self._head_size = 0
        self._unsent = 0
        self._stuck_since = 0.0
        self._has_all = False
        # Received data that waits for its turn, and whether a slice of it is being parsed now.
        self._rest = b""
        self._feeds_rest = False
        # Bytes that this connection itself buffers, as counted for the owner in `_held_for`.
        self._held = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.address = self.client[0] if self.client else ""
        self.owner = self._held_for = self._path.owners.of(self.address)
        self.flow = _Flow(self.transport)
        # Unsent bytes are counted only above the high-water mark. It is low, because uncounted bytes of thousands of
        # connections add up. Writing resumes when the buffer is empty, or thousands would resume in one loop turn.
        self.transport.set_write_buffer_limits(high=_UNSENT, low=0)
        self._awaited_since = self.loop.time()
        self._sweep_group = min(self.server_state.sweep_groups, key=len)
        self._sweep_group.add(self)
        self.owner.connections += 1
        self._refusal = self._one_too_many()
        if self._refusal is not None:
            self._in_head = False
            self.parser = cast(Any, _ClosedParser)
            self._refuse(self._refusal)

    def _one_too_many(self) -> Shortage | None:
        """The error if this connection exceeds a limit; an owner of many leaves a share to others, as with buffers."""
        path = self._path
        most, others = path.limits.max_connections, len(self.server_state.connections) - 1
        if others >= most + self._kept:
            return Shortage(f"{most} clients are connected, and no more may be (GATEWAY_MAX_CONNECTIONS).")
        own = self.owner.connections - 1
        if own < SHARE * (most - others) or self._kept or is_trusted(self.address, path.proxies):
            return None
        return Shortage(
            f"{own} of at most {most} connections (GATEWAY_MAX_CONNECTIONS) are of this address, and the rest is for "
            "others: close some of them."
        )

    @property
    def _kept(self) -> int:
        """Extra connections allowed on the health and metrics ports: a full gateway must not look dead."""
        parts: Parts = self.app_state["parts"]
        return WATCHERS if self.server and self.server[1] in (parts.health_port, parts.metrics_port) else 0

    def data_received(self, data: bytes) -> None:
        if self._rest and not self._feeds_rest:
            self._rest += data
            return
        if len(data) <= _SLICE:
            self._parse(data)
            if self._feeds_rest:
                return  # the size is checked once all of it is parsed
        elif not self._feed(data):
            return
        self._look_at_size(len(data))

    def _parse(self, data: bytes) -> None:
        """uvicorn's `data_received`, but a request with `Upgrade` is parsed as a plain request."""
        self._idle_since = None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("")
        except httptools.HttpParserUpgrade as offer:
            self._read_without_offer(data[offer.args[0] :])

    def _read_without_offer(self, rest: bytes) -> None:
        """Parse a head again without its `Upgrade`, then the `rest`, which begins with its body.

        RFC 9110, 7.8: a server may ignore an upgrade. java.net.http offers one with each request that is not in TLS.
        httptools tells llhttp that no body follows such a head, so a new parser gets the head. The new head says that
        the connection closes: data after the body may already be of the other protocol and is not parsed. For CONNECT
        nothing is parsed again: the data after it belongs to its tunnel and is not HTTP.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        self.parser = cast(Any, _ClosedParser)
        if method == b"CONNECT":
            return
        named = [token.strip() for name, value in self.headers if name == b"connection" for token in value.split(b",")]
        named = [token for token in named if token.lower() not in (b"", b"upgrade", b"keep-alive")]
        headers = [header for header in self.headers if header[0] not in (b"upgrade", b"connection")]
        headers.append((b"connection", b",".join([*named, b"close"])))
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, lines(headers))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn: it skips the rest
        self._parse(head + rest)

    def hold_up(self) -> None:
        """Pause reading: other connections also send much, and each has its turn."""
        self.flow.hold_up()

    def read_on(self) -> None:
        """Resume reading: it is this connection's turn again."""
        if not self._rest:
            self.flow.read_on()

    def _feed(self, data: bytes) -> bool:
        """Feed the data to the parser; return whether all of it was parsed.

        A body of known length is parsed at once. Other data may hold many chunks: it is parsed in slices, and the rest
        waits for its turn.
        """
        began, at = self._path.time(), 0
        while at < len(data):
            size = len(data) if self._has_length() else _SLICE
            if at and size == _SLICE and self._path.time() - began >= _SLICE_TIME:
                self._rest = data[at:]
                self.flow.hold_up()
                self._path.work.add(self._whose(), self._feed_in_steps(at))
                if not self._hold():
                    self._stop(no_room(self._path.buffers))
                return False
            self._parse(data[at : at + size])
            at += size
        return True

    def _has_length(self) -> bool:
        """Whether a body with a Content-Length is being received."""
        return self._in_body and any(name == b"content-length" for name, _ in self.scope["headers"])

    def _feed_in_steps(self, before: int) -> Iterator[None]:
        """Parse the rest of a read in slices, of which `before` bytes are parsed already."""
        at = 0
        while at < len(self._rest) and self._refusal is None and not self.transport.is_closing():
            self._feeds_rest = True
            try:
                self.data_received(self._rest[at : at + _SLICE])
            except Exception:
                _log.exception("a connection failed")
                self.transport.abort()
            self._feeds_rest = False
            at += _SLICE
            yield
        size, self._rest = before + len(self._rest), b""
        if not self.transport.is_closing():
            self.read_on()
            self._look_at_size(size)

    def _look_at_size(self, size: int) -> None:
        """Account for `size` received bytes of a head or body: fair reading, head limit and buffer limit."""
        if self._in_body and size >= BULK and not self.flow.read_paused:
            if self.cycle.response_complete:
                self.server_state.bulk_reads.has_read_for_nothing(self)
            else:
                self.server_state.bulk_reads.has_read(self)
        if (self._in_head or self._in_body) and self._refusal is None:
            # Limits a head that does not end, and the bytes inside a body that are no data: trailers and chunk
            # extensions. The read in which a head began is not counted: it may hold the body before.
            if self._head_size < 0:
                self._first_read, self._head_size = size, 0
            else:
                self._head_size += size
            if self._head_size > self._path.head_limits.max_head_bytes:
                self._in_head = False
                self._stop(HeadTooLarge(too_large(self._path.head_limits)))
            elif not self._hold():
                self._stop(no_room(self._path.buffers))
        elif self.pipeline and not self._hold():
            self._forget_pipelined(no_room(self._path.buffers))

    def _forget_pipelined(self, error: GatewayError) -> None:
        """Drop the pipelined requests, answer them with this one error and close the connection."""
        for cycle, _ in self.pipeline:
            cycle.body = bytearray()
        self.pipeline.clear()
        self._stop(error)
        self._hold()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_size = -1
        self._awaited_since = self.loop.time()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """uvicorn's `on_header`, but more than twice the limit ends a head; further trailers are dropped.

        A smaller excess is kept here and refused later by a complete response, like calls of other origins' pages.
        """
        if len(self.headers) > 2 * self.app_state["parts"].data_path.head_limits.max_headers:
            if self._in_head:
                raise TooManyHeaders
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # the head is parsed once more
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1: HTTP/1.0 has no 100 (Continue)
        self._in_head = False
        self._head_size = -1
        self._awaited_since = None
        self._in_body = True
        if self._held:
            self._hold()
        target = self.url
        self.url = self._readable(target)
        if self.pipeline is _NOTHING_WAITS and self.cycle is not None and not self.cycle.response_complete:
            self.pipeline = deque()
        super().on_headers_complete()
        self.headers = []  # trailers must not be appended to the scope's list
        if self.url is _NO_PATH:
            self.scope["path"] = target[:1000].decode("latin-1")
        if self._path.drain.began or self.parser.should_upgrade():
            self.cycle.keep_alive = False

    def _readable(self, target: bytes) -> bytes:
        """The path and query of a target, in a form that uvicorn can parse; it would fail on other targets."""
        found = _TARGET.fullmatch(target)
        # A too long target keeps enough bytes to be refused for its length; uvicorn parses at most 65,535 bytes.
        return found[1][: self._path.head_limits.max_url_bytes + 2] if found else _NO_PATH

    def on_body(self, body: bytes) -> None:
        self._head_size = -1
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._in_head:
            return  # the head is parsed once more
        self._ends_message()
        super().on_message_complete()

    def _ends_message(self) -> None:
        """The request is complete; its trailers may also have made it the last one of the connection."""
        self._in_body = False
        self._awaited_since = None
        if not self.parser.should_keep_alive():
            self.cycle.keep_alive = False
            if self.cycle.response_complete:
                self.transport.close()

    def on_response_complete(self) -> None:
        """uvicorn's, with the pending refusal, and with one keep-alive timer per connection instead of per request."""
        self.server_state.total_requests += 1
        self._running = None
        if self.transport.is_closing():
            return
        if self._in_body:
            self._awaited_since = self.loop.time()
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._refuse(self._refusal)
        else:
            self._idle_since = self.loop.time()
            if self.timeout_keep_alive_task is None:
                self._arm(self.timeout_keep_alive)
            if self._ends:
                self.shutdown()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        state_of(cycle.scope)["leaving"] = []
        if cycle.scope["http_version"] == "1.0" and cycle.scope["method"] != "HEAD":
            app = self._without_chunks(app, cycle)
        super()._start_asgi_task(cycle, app)

    def _without_chunks(self, app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
        """`app` for an HTTP/1.0 client, which knows no chunks: a response without a length ends with the connection.

        RFC 9112, 6.1 and 6.3. uvicorn frames every response by its length or in chunks, so each piece is given to it as
        one length. A truncated response ends in a reset, because it would look complete otherwise.
        """

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            ends_with_connection = False

            async def send_plain(message: Message) -> None:
                nonlocal ends_with_connection
                if message["type"] == "http.response.start":
                    if not any(name == b"content-length" for name, _ in message["headers"]):
                        ends_with_connection, cycle.chunked_encoding = True, False
                elif ends_with_connection:
                    cycle.expected_content_length = len(message.get("body", b""))
                await send(message)

            try:
                await app(scope, receive, send_plain)
            finally:
                if ends_with_connection and not cycle.response_complete and not self.transport.is_closing():
                    self._reset()

        return answer

    def _arm(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is not None:
            left = self._idle_since + self.timeout_keep_alive - self.loop.time()
            if left > 0:
                self._arm(left)
            else:
                self.transport.close()

    @property
    def _path(self) -> DataPath:
        parts: Parts = self.app_state["parts"]
        return parts.data_path

    def check_timeouts(self, now: float) -> None:
        """Enforce the client-side timeouts; called about once a second per connection, with the loop's time.

        Polled for all connections: one timer per connection would cost more than this whole check.
        """
        limits = self._path.limits
        answered = self.cycle is None or self.cycle.response_complete  # the next request does not cut a response
        if answered and self._awaited_since is not None and now - self._awaited_since >= limits.header_timeout:
            if self._in_head:
                self._refuse(
                    HeadTimeout(f"No whole head came within {limits.header_timeout:g} s (GATEWAY_HEADER_TIMEOUT).")
                )
            else:
                self.transport.close()
        elif answered and self._in_head and self._path.time() >= self._path.drain.ends_at:
            self._refuse(Draining("The gateway ends, and the time for what was still coming is over: try again."))
        if self._held:
            self._hold()
        unsent, closing = self.transport.get_write_buffer_size(), self.transport.is_closing()
        if unsent or closing:
            # Plus the bytes in the system's buffer: it takes more of ours only once a third of that is sent.
            unsent += _unsent_by_the_system(self.transport.get_extra_info("socket"))
        if unsent and unsent >= self._unsent > 0:
            if now - self._stuck_since >= limits.client_write_timeout:
                self._cut("timeout:client_write")
        else:
            self._stuck_since = now
        self._unsent = unsent
        # In TLS the transport would wait long for the client's close_notify, which many clients never send. Checked
        # twice, because bytes on their way to the system are counted nowhere.
        has_all = closing and not unsent
        if has_all and self._has_all:
            self.transport.abort()
        self._has_all = has_all
        if self.flow.read_paused and self._has_left():
            self.transport.abort()

    def _has_left(self) -> bool:
        """Whether the client has closed the connection; needed while reading is paused for a pipelined request."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), _LEFT)
        return bool(poll.poll(0))

    def _cut(self, outcome: str) -> None:
        """Cut the connection: the client does not read its response, or too slowly for the buffers' limit."""
        self._let_go()
        self._reset()  # else the system keeps its unsent bytes for minutes

    def _reset(self) -> None:
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self._hold():
            self._cut("shortage")

    def resume_writing(self) -> None:
        self.server_state.few.add(self._resume)

    def _resume(self) -> None:
        """The client's write buffer is empty again: resume the response."""
        if self.transport.get_write_buffer_size() <= _UNSENT:  # else it was paused again, and another resume follows
            super().resume_writing()
            self._hold()

    def _hold(self) -> bool:
        """Count the bytes buffered here: unsent response, incomplete head, unparsed data and pipelined requests.

        Return whether the buffers' limit allows them.
        """
        size = len(self._rest)
        if self.flow.write_paused:
            size += self.transport.get_write_buffer_size()
        if self._in_head:
            size += self._first_read + max(0, self._head_size)
        for cycle, _ in self.pipeline:
            size += len(cycle.body)
        buffers, held = self._path.buffers, self._held
        if held:
            buffers.hold(self._held_for, -held)
        self._held = size
        self._held_for = self._whose()
        return buffers.hold(self._held_for, size) if size else True

    def _let_go(self) -> None:
        self._path.buffers.hold(self._held_for, -self._held)
        self._held = 0

    def _whose(self) -> Owner:
        """The owner that the buffered bytes count for."""
        return self.owner

    def shutdown(self) -> None:
        """The server accepts no more connections: an idle one may still get one request, whose response closes it.

        The same holds for one whose response has begun, once that is complete: its head did not say that the connection
        closes, and the client's next request may be on its way.
        """
        grace, self._ends = ANSWERED_GRACE if self._ends else DRAIN_GRACE, True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(grace, self._close_if_idle)
        elif not self.cycle.response_started:
            super().shutdown()

    def _close_if_idle(self) -> None:
        if not self._in_head and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._sweep_group.discard(self)
        self.server_state.few.add(partial(self._lost, exc))

    def _lost(self, exc: Exception | None) -> None:
        """Clean up after a lost connection."""
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
            for call in state_of(self._running.scope)["leaving"]:
                call()
        self._let_go()
        self.owner.connections -= 1
        self._rest = b""
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid input; the responses to earlier requests go first."""
        error = sys.exception()
        fault = _NO_HTTP
        if error is not None and isinstance(error.__context__, TooManyHeaders):
            fault = HeadTooLarge(too_many(self._path.head_limits))
        self._stop(fault)

    def _stop(self, error: GatewayError) -> None:
        self._refusal = error
        self.parser = cast(Any, _ClosedParser)
        if self._rest:
            # It will not be parsed, and until its turn it would count against the buffers' limit.
            self._rest = b""
            self._hold()
        if not self._in_body:
            if self.cycle is None or self.cycle.response_complete:
                self._refuse(error)
        elif self.pipeline:
            cycle, _ = self.pipeline.popleft()  # the newest request, whose body is invalid
            cycle.body = bytearray()
            self._hold()
        elif self.cycle.response_started:
            self.transport.close()
        else:
            self._refuse(error)

    def _refuse(self, error: GatewayError) -> None:
        if self.transport.is_closing():
            return
        request_id = new_request_id()
        content = error.envelope(request_id)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            (b"x-request-id", request_id.encode()),
            *(header for header in error.answer_headers if header[0] != b"connection"),
            (b"connection", b"close"),
        ]
        self.transport.write(STATUS_LINE[error.status] + lines(headers) + b"\r\n" + content)
        self.transport.close()
        parts: Parts = self.app_state["parts"]
        parts.metrics.requests.other("unknown", error.status)
        parts.request_log.other(request_id, "-", "-", self.address, error.status, 0.0)

    def cut(self) -> None:
        """Abort the connection: the time for a graceful end is over."""
        self.transport.abort()
