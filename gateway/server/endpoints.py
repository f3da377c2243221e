"""One short handler per route; the data path's are the ASGI adapter of an exchange."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.page.document import Document
from gateway.relay.exchange import FAILED, KEY_NEEDED, Exchange, new_request_id
from gateway.relay.upload import Upload
from gateway.wire.errors import GatewayError, MethodNotAllowed, NotFound, Unauthorized
from gateway.wire.heads import AnswerHead, RequestHead, fault_of
from gateway.wire.routes import RESPONSE_ID, Route
from gateway.wire.sse import Ends

_log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

# An adapter's queue pauses the upstream above the one and resumes it below the other, in bytes.
_HIGH_WATER = 64 * 1024
_LOW_WATER = 16 * 1024

# No longer than a sample and a half does a watch go on, in seconds.
_WATCH_ENDS = 5.0

# Asked again and again by machines: a line for each would hide the others.
_QUIET = frozenset(
    {"/health", "/metrics", "/ping", "/v1/health_check", "/v1/statistics", "/v1/status", "/v1/status/stream"}
)


class Relay:
    """A data-path route as an ASGI application: drives an exchange from `receive` and `send`."""

    def __init__(self, route: Route) -> None:
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, until its answer is written or its client has gone."""
        if not all(map(RESPONSE_ID.fullmatch, scope["path_params"].values())):
            raise HTTPException(404)
        scope["relayed"] = True
        client = _AsgiClient()
        path, head = scope["state"]["data_path"], scope["head"]
        # Starlette answers HEAD wherever it answers GET; the exchange asks by GET, the server drops the body.
        query = scope["query_string"].decode("latin-1")
        target = self._route.path.format(**scope["path_params"])
        if query:
            target = f"{target}?{query}"
        client.asked_for = not any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"]
        )
        kind = Upload if self._route.body == "upload" else Exchange
        exchange = client.exchange = kind(path, client, self._route, target, head)
        if self._route.body == "upload":
            # Whose reader may wait for something else: it then sees at once that the client has left.
            scope["state"].get("leaving", []).append(client.resume)
        reader = asyncio.create_task(_read(exchange, head.length, client, receive))
        try:
            await client.write(send)
        finally:
            reader.cancel()
            del client.exchange  # which holds the client, too
            exchange.client_gone()


async def _read(exchange: Exchange, length: int, client: _AsgiClient, receive: Receive) -> None:
    """Feed the exchange with what the client sends; the client's leaving is seen here, at any time."""
    try:
        exchange.begin(length)
        if exchange.outcome:
            return  # what was refused by its head is not asked for, as `receive` would by a 100 (Continue)
        client.asked_for = True
        while (message := await receive())["type"] == "http.request":
            await client.readable()
            if body := message.get("body"):
                exchange.request_body(body)
            if not message.get("more_body"):
                exchange.request_end()
        exchange.client_gone()
    except Exception:
        # A bug of ours: the client, who waits on the other task, still gets an answer.
        _log.exception("the exchange failed (request id %s)", exchange.request_id)
        exchange.fail(GatewayError(FAILED))
    client.abort()


class _AsgiClient:
    """The exchange's client: queues what goes out, as `send` has to be awaited."""

    exchange: Exchange
    chunk: Callable[[bytes], None] | None = None  # the server does the framing

    def __init__(self) -> None:
        self._queue: deque[Message] = deque()
        self._queued = 0
        self._paused = False
        self._aborted = False
        self._wake = asyncio.Event()
        self._waits: asyncio.Event | None = None
        self.asked_for = True
        """Whether the request's body will come: not that of an `Expect`, until it is read."""

    def pause(self) -> None:
        if self._waits is None:
            self._waits = asyncio.Event()

    def resume(self) -> None:
        if self._waits is not None:
            self._waits.set()
            self._waits = None

    async def readable(self) -> None:
        """Returns when more of the request is wanted."""
        while self._waits is not None:
            await self._waits.wait()

    def start(self, head: AnswerHead, length: bytes | None, request_id: str) -> None:
        headers = head.headers[:]
        if length is not None:
            headers.append((b"content-length", length))
        headers.append((b"x-request-id", request_id.encode()))
        if not self.asked_for:
            headers.append((b"connection", b"close"))  # RFC 9110, 10.1.1: or what comes next could be the body, or not
        self._put({"type": "http.response.start", "status": head.status, "headers": headers})

    def body(self, data: bytes) -> None:
        self._queued += len(data)
        self._put({"type": "http.response.body", "body": data, "more_body": True})
        if self._queued > _HIGH_WATER and not self._paused:
            self._paused = True
            self.exchange.client_paused()

    def end(self) -> None:
        self._put({"type": "http.response.body", "body": b"", "more_body": False})

    def whole(self, head: AnswerHead, content: bytes, request_id: str) -> None:
        self.start(head, b"%d" % len(content), request_id)
        self._queued += len(content)
        self._put({"type": "http.response.body", "body": content, "more_body": False})

    def abort(self) -> None:
        self._aborted = True
        self._wake.set()

    def _put(self, message: Message) -> None:
        self._queue.append(message)
        self._wake.set()

    async def write(self, send: Send) -> None:
        """Send what comes until the answer ends; after an abort return at once, which a server takes as a cut."""
        ended = False
        while not ended:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                message = self._queue.popleft()
                await send(message)
                self._queued -= len(message.get("body", b""))
                ended = message.get("more_body") is False
                if self._paused and self._queued < _LOW_WATER:
                    self._paused = False
                    self.exchange.client_resumed()
            if self._aborted:
                return


class OnPort(BaseRoute):
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


class Pages(CORSMiddleware):
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
            scope["preflight"] = self.preflight_response(headers)
        await self.simple_response(scope, receive, send, headers)


class Outermost:
    """Each request's id; of those that are not relayed, the log line and the count; an answer if a handler fails."""

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        """`paths` are those that metrics may name: no client's word."""
        self._app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head = scope["head"] = RequestHead(list(scope["headers"]))  # the server may yet add trailers to its own
        request_id = scope["request_id"] = head.request_id = head.request_id or new_request_id()
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if "relayed" not in scope:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            fault = _fault_of(scope)
            app: ASGIApp = scope.get("preflight", self._app) if fault is None else to_response(fault, request_id)
            await app(scope, receive, send_with_id)
        except Exception:
            _log.exception("the handler of %r failed (request id %s)", scope["path"], request_id)
            error = GatewayError(FAILED)
            scope.pop("relayed", None)
            if status == 0:
                await to_response(error, request_id)(scope, receive, send_with_id)
        if "relayed" in scope:
            return
        state = scope["state"]
        route = scope["path"] if status != 404 and scope["path"] in self._paths else "unknown"
        state["metrics"].other(route, status)
        if route not in _QUIET or status >= 400:
            state["request_log"].other(request_id, scope["method"], scope["path"], status, time.monotonic() - started)


def _fault_of(scope: Scope) -> GatewayError | None:
    """Why a request is refused by its head alone."""
    path, raw = scope["path"], scope.get("raw_path") or b""
    # No path that there is needs to be encoded; who stands before us may not have decoded it. A line feed is what a
    # pattern's `$` takes for the end.
    if b"%" in raw or path.endswith("\n"):
        return _no_path(path)
    target = len(raw or path) + len(scope["query_string"])
    limits = scope["state"]["data_path"].head_limits
    return fault_of(scope["head"], target, limits, scope["http_version"])


def _no_path(path: str) -> NotFound:
    return NotFound(f"There is no path {path[:200]!r} here.")


def to_response(
    error: GatewayError, request_id: str, headers: dict[str, str] | None = None, ends: Ends = "done"
) -> Response:
    """An error as a response, in OpenAI's envelope or Anthropic's."""
    own = {name.decode(): value.decode() for name, value in error.headers}
    content = error.envelope(request_id, ends)
    return Response(content, error.status, own | (headers or {}), media_type="application/json")


async def refused(request: Request, exception: Exception) -> Response:
    """Starlette's own refusals: no such path, no such method on it."""
    assert isinstance(exception, HTTPException)
    error: GatewayError
    path = request.scope["path"][:200]
    if exception.status_code == 405:
        allowed = (exception.headers or {}).get("Allow", "")
        error = MethodNotAllowed(f"{request.method[:20]} is not allowed on {path!r}; allowed: {allowed}.")
    else:
        error = _no_path(path)
    headers = dict(exception.headers) if exception.headers else None
    ends: Ends = "messages" if path.startswith("/v1/messages") else "done"
    return to_response(error, request.scope["request_id"], headers, ends)


def _has_key(request: Request) -> bool:
    """Whether there are no keys, or one was brought."""
    keys, digest = request.state.data_path.keys, request.scope["head"].key
    return keys is None or (digest is not None and keys.find(digest) is not None)


def guarded(handler: Handler) -> Handler:
    """A handler of what only those with a key may see, where there are keys; calls are guarded by their exchange."""

    async def asks_for_key(request: Request) -> Response:
        if _has_key(request):
            return await handler(request)
        return to_response(Unauthorized(KEY_NEEDED), request.scope["request_id"])

    return asks_for_key


async def health(request: Request) -> Response:
    """This process lives; says nothing of the upstreams."""
    return JSONResponse({"status": "ok"})


async def health_check(request: Request) -> Response:
    """200 only when a chat call would succeed now, else 503; with how each upstream is and, given a key, where."""
    prober = request.state.prober
    await prober.probe_all()
    upstreams = prober.report(time.monotonic())
    if not _has_key(request):
        for upstream in upstreams:
            del upstream["url"]
    draining = request.state.data_path.drain.began
    serving = not draining and any(upstream["state"] == "serving" for upstream in upstreams)
    body: dict[str, Any] = {
        "Service Title": "vllm-gateway",
        "Service Description": "A thin gateway in front of vLLM model servers",
        "status": "draining" if draining else "serving" if serving else "unavailable",
        "upstreams": upstreams,
    }
    return JSONResponse(body, 200 if serving else 503, None if serving else {"retry-after": "2"})


async def ping(request: Request) -> Response:
    """What load balancers of GPU workers ask for: 200 serving, 204 loading, else 503; nothing is probed for it."""
    states = {upstream["state"] for upstream in request.state.prober.report(time.monotonic())}
    if request.state.data_path.drain.began or not states & {"serving", "loading"}:
        return JSONResponse({"status": "unhealthy"}, 503)
    return JSONResponse({"status": "healthy"}) if "serving" in states else Response(status_code=204)


async def statistics(request: Request) -> Response:
    """How long the last chat calls took, in seconds."""
    request.state.ended.settle()
    return JSONResponse(request.state.metrics.latencies.report())


async def metrics(request: Request) -> Response:
    """Prometheus's exposition format."""
    request.state.ended.settle()
    return Response(request.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def page(document: Document) -> Handler:
    """What answers with the page."""

    async def answers(request: Request) -> Response:
        return Response(document.content, headers=document.headers, media_type="text/html")

    return answers


async def status(request: Request) -> Response:
    """How the gateway and its upstreams are, and were in the last five minutes."""
    content = await request.state.sampler.report()
    return Response(content, headers={"cache-control": "no-store"}, media_type="application/json")


async def status_stream(request: Request) -> Response:
    """The same as server-sent events, one a second."""
    # Only here: it patches uvicorn's way to end, which ours does not go, and not every gateway is watched.
    from sse_starlette import EventSourceResponse

    async def events() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(request.state.sampler.watch()) as watched:
            async for event in watched:
                if not _has_key(request):  # its key has been taken back
                    return
                yield event

    # It would cut what still runs when the gateway ends; a watch ends by itself, well within this time.
    return EventSourceResponse(events(), ping=0, shutdown_grace_period=_WATCH_ENDS)
