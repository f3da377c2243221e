"""uvicorn's HTTP protocol, with a shortcut past ASGI into an exchange."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.errors import BadRequest, GatewayError
from gateway.exchange import FAILED, ROUTES, Exchange, request_id_of
from gateway.headers import LINE, Header

_log = logging.getLogger(__name__)

# A target with a query, or in another spelling, goes the long way.
_ROUTES = {(route.method.encode(), route.path.encode()): route for route in ROUTES}

# What is used here of a class that promises nothing to those that inherit from it.
_METHODS = (
    "connection_lost",
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


class Protocol(HttpToolsProtocol):
    """uvicorn's own, but what is no HTTP is refused in OpenAI's envelope, and never in the middle of an answer."""

    cycle: Any  # uvicorn's RequestResponseCycle, or a _Call

    _in_body = False
    _refused = False
    _idle_since: float | None = None

    def on_headers_complete(self) -> None:
        self._in_body = True
        super().on_headers_complete()
        self.headers = []  # the parser goes on to fill the scope's own list, with trailers

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, but for the refusal and for one keep-alive timer a connection, not one a request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refused:
            self._refuse()
        else:
            self._idle_since = self.loop.time()
            if self.timeout_keep_alive_task is None:
                self._arm(self.timeout_keep_alive)

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

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what came; answers that are owed to requests before it go first."""
        self._refused = True
        self.parser = cast(Any, _Deaf)
        if not self._in_body:
            if self.cycle is None or self.cycle.response_complete:
                self._refuse()
        elif self.pipeline:
            self.pipeline.popleft()  # the newest, which is broken in its body
        elif self.cycle.response_started:
            self.transport.close()
        else:
            self._refuse()

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        request_id = request_id_of({})
        content = BadRequest("What came is not an HTTP request: the connection is closed.").envelope(request_id)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
            (b"x-request-id", request_id.encode()),
            (b"connection", b"close"),
        ]
        self.transport.write(_head(400, headers) + b"\r\n" + content)
        self.transport.close()
        self.app_state["metrics"].other("unknown", 400)
        self.app_state["request_log"].other(request_id, "-", "-", 400, 0.0)

    def cut(self) -> None:
        """The time to end in good order is over."""
        self.transport.abort()


class _Deaf:
    """The parser of a connection that was refused."""

    @staticmethod
    def feed_data(data: bytes) -> None: ...


class Shortcut(Protocol):
    """Drives an exchange by plain callbacks, with no scope and no task.

    Taken for a plain request on a data-path route while nothing else is in flight on the
    connection; all else goes through the application. The running call stands in as uvicorn's
    `cycle`, so that pipelining, keep-alive and the wait at shutdown stay uvicorn's. `cycle` is the
    newest request, which may wait behind the running one: that is kept here.
    """

    _call: _Call | None = None

    def on_message_begin(self) -> None:
        # uvicorn makes the scope here; it is made later, where one is needed.
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        parser = self.parser
        route = _ROUTES.get((parser.get_method(), self.url))
        if (
            route is None
            or self.expect_100_continue
            or (self.cycle is not None and not self.cycle.response_complete)
            or parser.should_upgrade()
            or parser.get_http_version() != "1.1"
        ):
            url, headers, expect_100_continue = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expect_100_continue
            self.headers += headers
            super().on_headers_complete()
            return
        self._in_body = True
        call = _Call(self, self.transport, parser.should_keep_alive())
        exchange = call.exchange = Exchange(self.app_state["data_path"], call, route, b"", self.headers)
        self._call = call
        self.cycle = call
        if self.flow.write_paused:  # by the answer before
            exchange.client_paused()
        exchange.begin()

    def on_body(self, body: bytes) -> None:
        call = self._call
        if call is None or self.cycle is not call:
            super().on_body(body)
        else:
            call.exchange.request_body(body)

    def on_message_complete(self) -> None:
        call = self._call
        if call is None or self.cycle is not call:
            super().on_message_complete()
        else:
            self._in_body = False
            call.exchange.request_end()

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        call = self._call
        if isinstance(error, httptools.HttpParserCallbackError) and call is not None and self.cycle is call:
            # A bug of ours, which httptools takes for one of the client's.
            _log.error("the exchange failed (request id %s)", call.exchange.request_id, exc_info=error)
            call.keep_alive = False
            call.exchange.fail(GatewayError(FAILED))
            self.transport.close()
        else:
            super().send_400_response(msg)

    def answered(self, call: _Call) -> None:
        """The running call's answer is complete."""
        self._call = None
        # Else they hold each other, and wait for the garbage collector, a cold cache line each.
        del call.exchange
        if not call.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._call is not None:
            self._call.exchange.client_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._call is not None:
            self._call.exchange.client_resumed()

    def connection_lost(self, exc: Exception | None) -> None:
        call, self._call = self._call, None
        if isinstance(self.cycle, _Call):
            self.cycle = None
        super().connection_lost(exc)
        if call is not None:
            exchange = call.exchange
            del call.exchange
            exchange.client_gone()


class _Call:
    """One exchange's client; writes the same bytes as uvicorn's cycle, the head together with what comes first."""

    __slots__ = (
        "_chunked",
        "_head",
        "_protocol",
        "_transport",
        "exchange",
        "keep_alive",
        "response_complete",
        "response_started",
    )

    exchange: Exchange

    def __init__(self, protocol: Shortcut, transport: asyncio.Transport, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.response_complete = False
        self.response_started = False
        self._protocol = protocol
        self._transport = transport
        self._chunked = False
        self._head = b""

    def start(self, status: int, headers: list[Header]) -> None:
        self.response_started = True
        self._chunked = status not in (204, 304)
        closes = False
        for name, value in headers:
            if name == b"content-length":
                self._chunked = False
            elif name == b"connection" and value == b"close":
                closes, self.keep_alive = True, False
        head = _head(status, self._protocol.server_state.default_headers + headers)
        if not self.keep_alive and not closes:
            head += b"connection: close\r\n"
        if self._chunked:
            head += b"transfer-encoding: chunked\r\n"
        self._head = head + b"\r\n"

    def body(self, data: bytes) -> None:
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if self._head:
            data, self._head = self._head + data, b""
        self._transport.write(data)

    def end(self) -> None:
        rest = self._head + b"0\r\n\r\n" if self._chunked else self._head
        if rest:
            self._transport.write(rest)
        self.response_complete = True
        self._protocol.answered(self)

    def abort(self) -> None:
        self._transport.close()


def _head(status: int, headers: list[Header]) -> bytes:
    return STATUS_LINE[status] + b"".join(map(LINE, headers))
