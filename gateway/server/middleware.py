"""The middleware around all handlers: request ids, refusals by the head, CORS and separate ports."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.relay.exchange import FAILED
from gateway.server.context import context_of, state_of
from gateway.server.responses import no_path, to_response
from gateway.wire.client_address import client_address
from gateway.wire.errors import BadRequest, GatewayError
from gateway.wire.heads import RequestHead, fault_of
from gateway.wire.origins import misdirected, page_fault

_log = logging.getLogger(__name__)

# Polled by platforms under any host name or address, so the Host header is not checked.
PROBES = frozenset({"/health", "/ping", "/v1/health_check"})
# Polled by machines: a log line for each request would hide the others.
_QUIET = PROBES | {"/metrics", "/v1/statistics", "/v1/status", "/v1/status/stream"}
# The path prefix of a model's id.
MODELS = b"/v1/models/"
# Links on other sites may lead here: the page is the same for everyone.
_LINKED = "/"


class PortRoute(BaseRoute):
    """Serves only these routes on one of the listening ports."""

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
    """Starlette's CORS, not on the metrics port; a preflight is checked, counted and logged like a call."""

    def __init__(self, app: ASGIApp, /, metrics_port: int | None, **options: Any) -> None:
        """`metrics_port` is the port on which no page may read a response."""
        super().__init__(app, **options)
        self._metrics_port = metrics_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_on(scope, self._metrics_port):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["method"] == "OPTIONS" and {"origin", "access-control-request-method"} <= set(headers):
            context = context_of(scope)
            answer = self.preflight_response(headers)
            context.preflight = answer if answer.status_code == 200 else _refused(answer, context.request_id)
        await self.simple_response(scope, receive, send, headers)


def _refused(answer: Response, request_id: str) -> Response:
    """A preflight that Starlette refuses, in the envelope that all errors have."""
    said = bytes(answer.body).decode()
    dropped = ("content-length", "content-type", "access-control-allow-private-network")
    headers = {name: value for name, value in answer.headers.items() if name not in dropped}
    error = BadRequest(f"{said}: GATEWAY_CORS_ORIGINS names the origins whose pages may GET and POST.")
    return to_response(error, request_id, headers)


class RequestContext:
    """Adds the request id, logs and counts requests that are not relayed, and responds if a handler fails."""

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        """`paths` are the route labels that metrics may have: no path that a client made up."""
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
        route = context.route or scope["path"]
        if status == 404 or route not in self._paths:
            route = "unknown"
        parts.metrics.requests.other(route, status)
        if route not in _QUIET or status >= 400:
            peer, head = scope["client"][0] if scope["client"] else "", context.head
            client = client_address(peer, head.forwarded_for, parts.data_path.proxies)
            total = time.monotonic() - started
            parts.request_log.other(request_id, scope["method"], scope["path"], client, status, total)


def _fault_of(scope: Scope, head: RequestHead) -> GatewayError | None:
    """The error if a request is refused by its head alone."""
    path, raw = scope["path"], scope.get("raw_path") or b""
    # No served path needs percent-encoding except a model's id, which goes to no upstream. A proxy in front of the
    # gateway may not have decoded the path. A trailing line feed is refused because a pattern's `$` matches before it.
    if (b"%" in raw and not raw.startswith(MODELS)) or path.endswith("\n"):
        return no_path(scope)
    target = len(raw or path) + len(scope["query_string"])
    data_path = state_of(scope)["parts"].data_path
    fault = fault_of(head, target, data_path.head_limits, scope["http_version"])
    if fault is not None or path in PROBES:
        return fault
    if data_path.allows_host is not None and head.hosts is not None and not data_path.allows_host(head.hosts):
        return misdirected(head.hosts)
    if path == _LINKED or scope["method"] == "OPTIONS":  # a preflight of a browser
        return None
    return page_fault(head, data_path.cors_origins)
