"""uvicorn's HTTP protocol, with a shortcut past ASGI into an exchange."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import select
import socket
import struct
import sys
import termios
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway.errors import BadRequest, Draining, GatewayError, HeadTimeout
from gateway.exchange import FAILED, ROUTES, DataPath, Exchange, Route, new_request_id
from gateway.headers import AnswerHead, RequestHead, SameHead, lines

_log = logging.getLogger(__name__)

# A target with a query, or in another spelling, goes the long way.
_ROUTES = {(route.method.encode(), route.path.encode()): route for route in ROUTES}

# What is used here of a class that promises nothing to those that inherit from it.
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


def missing_in(protocol: type[asyncio.Protocol]) -> list[str]:
    """The names that this file needs of uvicorn's protocol and that the installed one lacks."""
    attributes = protocol.__init__.__code__.co_names
    methods = [name for name in _METHODS if not hasattr(protocol, name)]
    return methods + [name for name in _ATTRIBUTES if name not in attributes]


# Once no more is accepted, a connection may get one more request for so many seconds: its client does not know yet.
_LAST_CALL = 1.0

# Linux tells of a FIN behind unread bytes; a reset is told of everywhere, whatever is asked.
_LEFT = getattr(select, "POLLRDHUP", 0)

# struct linger: on, for no time.
_AT_ONCE = struct.pack("ii", 1, 0)


def _unsent_by_the_system(connection: socket.socket) -> int:
    """Bytes that were written and that the other side has not taken; 0 where the system does not tell."""
    if sys.platform != "linux":
        return 0
    return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))[0])


# In the place of a deque for each connection, of which hardly any pipelines.
_NOTHING_WAITS: deque[Any] = deque(maxlen=0)


class _Flow(FlowControl):
    """uvicorn's, without an event for each connection, which takes as much memory as the exchange."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.read_paused = False
        self.write_paused = False
        self._writable: asyncio.Event | None = None

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


class Protocol(HttpToolsProtocol):
    """uvicorn's own, but what is no HTTP is refused in OpenAI's envelope, and never in the middle of an answer."""

    cycle: Any  # uvicorn's RequestResponseCycle, or, where the shortcut is taken, the protocol itself

    # uvicorn's own attributes just fit in what its instances share; a slot more is 8 bytes, one past that 1,500.
    __slots__ = (
        "_awaited_since",
        "_idle_since",
        "_in_body",
        "_in_head",
        "_refused",
        "_running",
        "_stuck_since",
        "_unsent",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.pipeline = _NOTHING_WAITS
        self._in_body = False
        self._refused = False
        self._idle_since: float | None = None
        # The application's running request; uvicorn knows only the newest, which may wait behind it.
        self._running: RequestResponseCycle | None = None
        # Since when more is to come of the client: a request's head, or the rest of a body that was refused.
        self._awaited_since: float | None = None
        self._in_head = False
        self._unsent = 0
        self._stuck_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.flow = _Flow(self.transport)
        self._awaited_since = self.loop.time()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._awaited_since = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._awaited_since = None
        self._in_body = True
        if self.pipeline is _NOTHING_WAITS and self.cycle is not None and not self.cycle.response_complete:
            self.pipeline = deque()
        super().on_headers_complete()
        self.headers = []  # the parser goes on to fill the scope's own list, with trailers
        if self._path.drain.began:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._in_body = False
        self._awaited_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, but for the refusal and for one keep-alive timer a connection, not one a request."""
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
        elif self._refused:
            self._refuse(_NO_HTTP)
        else:
            self._idle_since = self.loop.time()
            if self.timeout_keep_alive_task is None:
                self._arm(self.timeout_keep_alive)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

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
        path: DataPath = self.app_state["data_path"]
        return path

    def look(self, now: float) -> None:
        """To be called again and again, with the loop's time: what the client keeps us waiting for has its limits.

        For all connections at once, as a timer for each would cost more than all of this.
        """
        limits = self._path.limits
        answered = self.cycle is None or self.cycle.response_complete  # an answer is not cut for what comes after it
        if answered and self._awaited_since is not None and now - self._awaited_since >= limits.header:
            if self._in_head:
                self._refuse(HeadTimeout(f"No whole head came within {limits.header:g} s (GATEWAY_HEADER_TIMEOUT)."))
            else:
                self.transport.close()
        elif answered and self._in_head and self._path.time() >= self._path.drain.ends_at:
            self._refuse(Draining("The gateway ends, and the time for what was still coming is over: try again."))
        unsent = self.transport.get_write_buffer_size()
        if unsent:
            # And what the system holds: it takes more of ours only once a third of that is gone.
            unsent += _unsent_by_the_system(self.transport.get_extra_info("socket"))
        if unsent and unsent >= self._unsent > 0:
            if now - self._stuck_since >= limits.client_write:
                self._stuck()
        else:
            self._stuck_since = now
        self._unsent = unsent
        if self.flow.read_paused and self._has_left():
            self.transport.abort()

    def _has_left(self) -> bool:
        """Whether the client has, which is not read while it is not read from: a second request waits behind one."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), _LEFT)
        return bool(poll.poll(0))

    def _stuck(self) -> None:
        """The client reads nothing of what was written to it."""
        # Reset: else the system keeps for minutes what it, too, could not send.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self.transport.abort()

    def shutdown(self) -> None:
        """No more is accepted: one that is idle may still get one request, whose answer closes it."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_LAST_CALL, self._close_if_idle)
        else:
            super().shutdown()

    def _close_if_idle(self) -> None:
        if not self._in_head and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what came; answers that are owed to requests before it go first."""
        self._refused = True
        self.parser = cast(Any, _Deaf)
        if not self._in_body:
            if self.cycle is None or self.cycle.response_complete:
                self._refuse(_NO_HTTP)
        elif self.pipeline:
            self.pipeline.popleft()  # the newest, which is broken in its body
        elif self.cycle.response_started:
            self.transport.close()
        else:
            self._refuse(_NO_HTTP)

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
            (b"connection", b"close"),
        ]
        self.transport.write(STATUS_LINE[error.status] + lines(headers) + b"\r\n" + content)
        self.transport.close()
        self.app_state["metrics"].other("unknown", error.status)
        self.app_state["request_log"].other(request_id, "-", "-", error.status, 0.0)

    def cut(self) -> None:
        """The time to end in good order is over."""
        self.transport.abort()


_NO_HTTP = BadRequest("What came is not an HTTP request: the connection is closed.")


class _Deaf:
    """The parser of a connection that was refused."""

    @staticmethod
    def feed_data(data: bytes) -> None: ...


class Shortcut(Protocol):
    """Drives an exchange by plain callbacks, with no scope and no task; is its client, too.

    Taken for a plain request on a data-path route while nothing else is in flight on the
    connection; all else goes through the application. The connection then stands in as uvicorn's
    `cycle`, so that pipelining, keep-alive and the wait at shutdown stay uvicorn's. `cycle` is the
    newest request, which may wait behind the running one: that is kept here. Writes the same bytes
    as uvicorn's own cycle, the head together with what comes first.
    """

    __slots__ = (
        "_chunked",
        "_data",
        "_exchange",
        "_head",
        "_in_message",
        "_same",
        "chunk",
        "keep_alive",
        "response_complete",
        "response_started",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # The running request, if any, and what uvicorn asks its cycle for.
        self._exchange: Exchange | None = None
        self.keep_alive = True
        self.response_started = False
        self.response_complete = True
        # The answer's head until it is written.
        self._head = b""
        self._chunked = False
        self.chunk: Callable[[bytes], None] | None = None
        # What came last on the connection, for the next that is like it but for its length.
        self._same: tuple[SameHead, RequestHead, Route] | None = None
        self._in_message = False
        self._data = b""

    def data_received(self, data: bytes) -> None:
        if self._same is not None and self.cycle is self and self.response_complete and not self._in_message:
            same, head, route = self._same
            if at := same.body_at(data):
                self._idle_since = None
                self._take(head, route, data, at)
                return
        self._data = b"" if self._in_message else data
        super().data_received(data)
        self._data = b""

    def _take(self, head: RequestHead, route: Route, data: bytes, at: int) -> None:
        """What is in `data` whole, its body beginning at `at`, is the request."""
        exchange = self._begin(head, route)
        try:
            exchange.request(memoryview(data)[at:])  # a large one is not copied
        except Exception as error:
            self._failed(exchange, error)

    def _begin(self, head: RequestHead, route: Route) -> Exchange:
        path = self.app_state["data_path"]
        exchange = self._exchange = Exchange(path, self, route, b"", head)
        self.cycle = self
        self.keep_alive = not path.drain.began
        self.response_started = self.response_complete = False
        if self.flow.write_paused:  # by the answer before
            exchange.client_paused()
        return exchange

    def on_message_begin(self) -> None:
        # uvicorn makes the scope here; it is made later, where one is needed.
        self._in_head = self._in_message = True
        self._awaited_since = self.loop.time()
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        parser, cycle = self.parser, self.cycle
        route = _ROUTES.get((parser.get_method(), self.url))
        if (
            route is None
            or self.expect_100_continue
            or (cycle is not None and not cycle.response_complete)
            or parser.should_upgrade()
            or parser.get_http_version() != "1.1"
        ):
            self._data = b""
            self._to_the_app()
            return
        head, self.headers = RequestHead(self.headers), []  # trailers are of no interest
        exchange = self._begin(head, route)
        self._in_head = False
        self._awaited_since = None
        self._in_body = True
        if not parser.should_keep_alive():
            self.keep_alive = False
        if self._data:
            same = SameHead.of(self._data) if self.keep_alive else None
            self._same = (same, head, route) if same else None
            self._data = b""
        exchange.begin(head.length)

    def _to_the_app(self) -> None:
        url, headers, expect_100_continue = self.url, self.headers, self.expect_100_continue
        HttpToolsProtocol.on_message_begin(self)
        self.url, self.expect_100_continue = url, expect_100_continue
        self.headers += headers
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is self and self._exchange is not None:
            self._exchange.request_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle is self and self._exchange is not None:
            self._in_body = False
            self._awaited_since = None
            self._exchange.request_end()
        else:
            super().on_message_complete()
        self._in_message = False

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        exchange = self._exchange
        if isinstance(error, httptools.HttpParserCallbackError) and exchange is not None and self.cycle is self:
            # A bug of ours, which httptools takes for one of the client's.
            self._failed(exchange, error)
        else:
            super().send_400_response(msg)

    def _failed(self, exchange: Exchange, error: Exception) -> None:
        _log.error("the exchange failed (request id %s)", exchange.request_id, exc_info=error)
        self.keep_alive = False
        exchange.fail(GatewayError(FAILED))
        self.transport.close()

    def _stuck(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_gone("timeout:client_write")
        super()._stuck()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._exchange is not None:
            self._exchange.client_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._exchange is not None:
            self._exchange.client_resumed()

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        if self.cycle is self:
            self.cycle = None
        super().connection_lost(exc)
        if exchange is not None:
            exchange.client_gone()

    # The exchange's client

    def start(self, head: AnswerHead, length: bytes | None, request_id: str) -> None:
        """The answer's head, to be written with what comes first."""
        self.response_started = True
        self._chunked = length is None and head.status not in (204, 304)
        self.chunk = self.transport.write if self._chunked else None
        more = f"x-request-id: {request_id}\r\n"
        if length is not None:
            more = f"content-length: {length.decode()}\r\n{more}"
        self._head = self._to_head(head, more)

    def _to_head(self, head: AnswerHead, more: str) -> bytes:
        if head.closes:
            self.keep_alive = False
        elif not self.keep_alive:
            more += "connection: close\r\n"
        if self._chunked:
            more += "transfer-encoding: chunked\r\n"
        default = lines(self.server_state.default_headers)
        return b"".join((STATUS_LINE[head.status], default, head.lines, more.encode(), b"\r\n"))

    def body(self, data: bytes) -> None:
        """A piece of the answer."""
        if self._chunked:
            data = b"".join((b"%x\r\n" % len(data), data, b"\r\n"))
        if self._head:
            data, self._head = self._head + data, b""
        self.transport.write(data)

    def end(self) -> None:
        """The answer is complete."""
        rest = self._head + b"0\r\n\r\n" if self._chunked else self._head
        if rest:
            self._head = b""
            self.transport.write(rest)
        self._complete()

    def whole(self, head: AnswerHead, content: bytes, request_id: str) -> None:
        """All of the answer at once."""
        self.response_started = True
        self._chunked = False
        more = f"content-length: {len(content)}\r\nx-request-id: {request_id}\r\n"
        self.transport.write(self._to_head(head, more) + content)
        self._complete()

    def _complete(self) -> None:
        self._exchange = None
        self.response_complete = True
        if not self.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def abort(self) -> None:
        """The answer breaks off."""
        self.transport.close()
