"""A shortcut past ASGI, from uvicorn's HTTP protocol into an exchange."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.admission.owners import Owner
from gateway.relay.buffered_call import BufferedCall
from gateway.relay.exchange import FAILED
from gateway.server.context import Parts
from gateway.server.endpoints import AT_ONCE, Answer
from gateway.server.http_protocol import HttpProtocol, SharedState, TooManyHeaders
from gateway.wire.client_address import client_address
from gateway.wire.errors import GatewayError
from gateway.wire.head_cache import SameHead
from gateway.wire.heads import AnswerHead, RequestHead, fault_of, new_request_id
from gateway.wire.routes import Route

_log = logging.getLogger(__name__)


class Shortcut(HttpProtocol):
    """Drives an exchange by plain callbacks, with no scope and no task, and is the exchange's client.

    It is used for a plain request on a data-path route while nothing else is in flight on the connection; every other
    request goes through the application. The connection then acts as uvicorn's `cycle`, so that pipelining, keep-alive
    and the wait at shutdown stay uvicorn's. `cycle` is the newest request, which may be queued behind the running one;
    `_exchange` is the running one. It writes the same bytes as uvicorn's own cycle, the head together with the first
    data.
    """

    __slots__ = (
        "_chunked",
        "_data",
        "_exchange",
        "_head",
        "_in_message",
        "_length",
        "_routes",
        "_same",
        "chunk",
        "keep_alive",
        "response_complete",
        "response_started",
    )

    def __init__(
        self,
        config: Config,
        server_state: SharedState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # The running request, if any, and the attributes that uvicorn reads from its cycle.
        self._exchange: BufferedCall | None = None
        self.keep_alive = True
        self.response_started = False
        self.response_complete = True
        # The response's head until it is written.
        self._head = b""
        self._chunked = False
        self.chunk: Callable[[bytes], None] | None = None
        # Cache of the last parsed head of the connection; the next usually differs only in Content-Length.
        self._same: tuple[SameHead, RequestHead, Route] | None = None
        self._in_message = False
        self._length = 0
        self._data = b""
        self._routes: dict[tuple[bytes, bytes], Route] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        parts: Parts = self.app_state["parts"]
        if self.server is None or self.server[1] != parts.metrics_port:
            self._routes = parts.data_path.routes

    def data_received(self, data: bytes) -> None:
        if self._same is not None and self.cycle is self and self.response_complete and not self._in_message:
            same, head, route = self._same
            if (at := same.body_at(data)) and not self._rest:
                self._idle_since = None
                self._take(head, route, data, at)
                return
        self._data = b"" if self._in_message else data
        super().data_received(data)
        self._data = b""
        exchange = self._exchange
        if self._in_message and exchange is not None and self.cycle is self:
            try:
                exchange.awaits_more()
            except Exception as error:
                self._failed(exchange, error)

    def _take(self, head: RequestHead, route: Route, data: bytes, at: int) -> None:
        """Start the request that `data` holds completely, with its body from `at` on."""
        exchange = self._begin(head, route)
        try:
            exchange.request(data[at:])
        except Exception as error:
            self._failed(exchange, error)

    def _begin(self, head: RequestHead, route: Route) -> BufferedCall:
        parts: Parts = self.app_state["parts"]
        path = parts.data_path
        exchange = self._exchange = BufferedCall(path, self, route, route.path, head)
        self.cycle = self
        self.keep_alive = not path.drain.began
        self.response_started = self.response_complete = False
        if self.flow.write_paused:  # by the previous response
            exchange.client_paused()
        return exchange

    def on_message_begin(self) -> None:
        # uvicorn creates the scope here; this class creates it later, only where the application needs one.
        self._in_head = self._in_message = True
        self._head_size = -1
        self._awaited_since = self.loop.time()
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_headers_complete(self) -> None:
        parser, cycle = self.parser, self.cycle
        # A target with a query, or in another spelling, has no entry and goes through the application.
        route = self._routes.get((parser.get_method(), self.url))
        if route is None and self.url in AT_ONCE and self._is_answered_at_once(AT_ONCE[self.url]):
            return
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
        path = self._path
        head = RequestHead(self.headers, path.forwarded_headers)
        if (
            fault_of(head, len(self.url), path.head_limits, "1.1")
            or (head.from_page and (path.cors_origins or not head.json))
            or (path.allows_host is not None and head.hosts is not None and not path.allows_host(head.hosts))
        ):
            self._data = b""
            self._to_the_app()  # which refuses it
            return
        self.headers = []  # trailers are ignored
        exchange = self._begin(head, route)
        self._length = head.length
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

    def _is_answered_at_once(self, answer: Callable[[Parts, RequestHead], Answer]) -> bool:
        """Answer a plain GET of a polled endpoint past the application; return whether that was done."""
        parser, path, parts = self.parser, self._path, self.app_state["parts"]
        if (
            not self._routes  # the connection is on the metrics port
            or self.flow.write_paused  # the client reads no responses; the app waits for that
            or path.cors_origins
            or parser.get_method() != b"GET"
            or self.expect_100_continue
            or (self.cycle is not None and not self.cycle.response_complete)
            or parser.should_upgrade()
            or parser.get_http_version() != "1.1"
        ):
            return False
        head = RequestHead(self.headers, path.forwarded_headers)
        has_body = head.length or head.coding is not None
        if has_body or head.from_page or fault_of(head, len(self.url), path.head_limits, "1.1"):
            return False
        self._data = b""
        self.headers = []
        if self.transport.is_closing():
            return True  # the previous response announced the close
        self.cycle = self
        self._in_head, self._in_body = False, True
        self._awaited_since = None
        self.keep_alive = not path.drain.began and parser.should_keep_alive()
        self.response_started, self.response_complete, self._chunked = True, False, False
        began, request_id = path.time(), head.request_id or new_request_id()
        try:
            status, content, more = answer(parts, head)
        except Exception:
            _log.exception("the answer to %r failed (request id %s)", self.url, request_id)
            error = GatewayError(FAILED)
            status, content = error.status, error.envelope(request_id)
            more = {name.decode(): value.decode() for name, value in error.answer_headers}
        headers = [(name.encode(), value.encode()) for name, value in more.items()]
        headers += [(b"content-length", b"%d" % len(content)), (b"content-type", b"application/json")]
        self.transport.write(self._to_head(AnswerHead(status, headers), f"x-request-id: {request_id}\r\n") + content)
        name = self.url.decode()
        parts.metrics.requests.other(name, status)
        if status >= 400:
            client = client_address(self.address, head.forwarded_for, path.proxies)
            parts.request_log.other(request_id, "GET", name, client, status, path.time() - began)
        self._complete()
        return True

    def _to_the_app(self) -> None:
        url, headers, expect_100_continue = self.url, self.headers, self.expect_100_continue
        HttpToolsProtocol.on_message_begin(self)
        self.url, self.expect_100_continue = url, expect_100_continue
        self.headers += headers
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is self and self._exchange is not None:
            self._head_size = -1
            self._exchange.request_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._in_head:
            return  # the head is parsed once more
        if self.cycle is self and self._exchange is not None:
            self._ends_message()
            self._exchange.request_end()
        else:
            super().on_message_complete()
        self._in_message = False

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        exchange = self._exchange
        ours = isinstance(error, httptools.HttpParserCallbackError) and not isinstance(
            error.__context__, TooManyHeaders
        )
        if ours and error is not None and exchange is not None and self.cycle is self:
            # A bug in the gateway, which httptools reports as an error of the client.
            self._failed(exchange, error)
        else:
            super().send_400_response(msg)

    def _failed(self, exchange: BufferedCall, error: Exception) -> None:
        self.keep_alive = False
        exchange.crashed(error)
        self.transport.close()

    def _cut(self, outcome: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_gone(outcome)
        super()._cut(outcome)

    def _whose(self) -> Owner:
        return self.owner if self._exchange is None else self._exchange.owner

    def _has_length(self) -> bool:
        if self.cycle is not self:
            return super()._has_length()
        return bool(self._in_body and self._length)  # also true for the body of a refused call

    def pause_writing(self) -> None:
        if self._exchange is not None:
            self._exchange.client_paused()
        super().pause_writing()  # it also checks the buffers' limit

    def _resume(self) -> None:
        super()._resume()
        # The buffer of a disconnected client is empty, too: it does not resume.
        if self._exchange is not None and not self.flow.write_paused and not self.transport.is_closing():
            self._exchange.client_resumed()

    def _lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        if self.cycle is self:
            self.cycle = None
        super()._lost(exc)
        if exchange is not None:
            exchange.client_gone()

    # The exchange's client

    def start(self, head: AnswerHead, length: bytes | None, request_id: str) -> None:
        """Prepare the response's head, to be written with the first data."""
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
        default = self.server_state.default_lines
        return b"".join((STATUS_LINE[head.status], default, head.lines, more.encode(), b"\r\n"))

    def body(self, data: bytes) -> None:
        """Write a piece of the response's body."""
        if self._chunked:
            data = b"".join((b"%x\r\n" % len(data), data, b"\r\n"))
        if self._head:
            data, self._head = self._head + data, b""
        self.transport.write(data)

    def end(self) -> None:
        """End the response."""
        rest = self._head + b"0\r\n\r\n" if self._chunked else self._head
        if rest:
            self._head = b""
            self.transport.write(rest)
        self._complete()

    def whole(self, head: AnswerHead, content: bytes, request_id: str) -> None:
        """Write a complete response at once."""
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
        """Close the connection in the middle of a response."""
        self.transport.close()

    def is_gone(self) -> bool:
        """Whether the client can no longer be written to."""
        return self.transport.is_closing()
