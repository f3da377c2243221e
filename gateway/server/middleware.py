"""What is around all handlers: request ids, refusals by the head alone, pages of other origins, ports of their own."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Match, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.relay.exchange import FAILED
from gateway.server.context import context_of, state_of
from gateway.server.responses import no_path, to_response
from gateway.wire.errors import GatewayError
from gateway.wire.heads import RequestHead, fault_of

_log = logging.getLogger(__name__)

# Asked again and again by machines: a line for each would hide the others.
_QUIET = frozenset(
    {"/health", "/metrics", "/ping", "/v1/health_check", "/v1/statistics", "/v1/status", "/v1/status/stream"}
)


class PortRoute(BaseRoute):
    """These routes, and no others, on one of the ports that are listened on."""

    def __init__(self, port: int, routes: list[BaseRoute]) -> None:
        self._port = port
        self._router = Router(routes, redirect_slashes=False)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.FULL if _is_on(scope, self._port) else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._router(scope, receive, send)


def _is_on(scope: Scope, port: int | None) -> bool:
    server = scope.get("server")
    return server is not None and bool(server[1] == port)


class Cors(CORSMiddleware):
    """Starlette's, but for calls alone; what a browser asks first is checked, counted and logged as they are."""

    def __init__(self, app: ASGIApp, /, metrics_port: int | None, **options: Any) -> None:
        """`metrics_port` is the one on which no page may read."""
        super().__init__(app, **options)
        self._metrics_port = metrics_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_on(scope, self._metrics_port):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["method"] == "OPTIONS" and {"origin", "access-control-request-method"} <= set(headers):
            context_of(scope).preflight = self.preflight_response(headers)
        await self.simple_response(scope, receive, send, headers)


class RequestContext:
    """Each request's id; of those that are not relayed, the log line and the count; an answer if a handler fails."""

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        """`paths` are those that metrics may name: no client's word."""
        self._app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        request_id = context.request_id
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not context.relayed:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            fault = _fault_of(scope, context.head)
            app = (context.preflight or self._app) if fault is None else to_response(fault, request_id)
            await app(scope, receive, send_with_id)
        except Exception:
            _log.exception("the handler of %r failed (request id %s)", scope["path"], request_id)
            error = GatewayError(FAILED)
            context.relayed = False
            if status == 0:
                await to_response(error, request_id)(scope, receive, send_with_id)
        if context.relayed:
            return
        parts = state_of(scope)["parts"]
        route = scope["path"] if status != 404 and scope["path"] in self._paths else "unknown"
        parts.metrics.other(route, status)
        if route not in _QUIET or status >= 400:
            parts.request_log.other(request_id, scope["method"], scope["path"], status, time.monotonic() - started)


def _fault_of(scope: Scope, head: RequestHead) -> GatewayError | None:
    """Why a request is refused by its head alone."""
    path, raw = scope["path"], scope.get("raw_path") or b""
    # No path that there is needs to be encoded; who stands before us may not have decoded it. A line feed is what a
    # pattern's `$` takes for the end.
    if b"%" in raw or path.endswith("\n"):
        return no_path(path)
    target = len(raw or path) + len(scope["query_string"])
    limits = state_of(scope)["parts"].data_path.head_limits
    return fault_of(head, target, limits, scope["http_version"])
