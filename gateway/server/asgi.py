"""The data path under any ASGI server: it drives an exchange from `receive` and `send`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from gateway.admission.owners import Owner
from gateway.relay.buffered_call import BufferedCall
from gateway.relay.exchange import FAILED, Exchange
from gateway.relay.upload import Upload
from gateway.server.context import context_of, state_of
from gateway.wire.errors import GatewayError
from gateway.wire.heads import AnswerHead
from gateway.wire.routes import RESPONSE_ID, Route

_log = logging.getLogger(__name__)

# Bytes queued for a client: the upstream is paused above the high mark and resumed below the low mark.
_HIGH_WATER = 64 * 1024


_LOW_WATER = 16 * 1024


class Relay:
    """A data-path route as an ASGI application: drives an exchange from `receive` and `send`."""

    def __init__(self, route: Route) -> None:
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request until its response is written or its client has disconnected."""
        if not all(map(RESPONSE_ID.fullmatch, scope["path_params"].values())):
            raise HTTPException(404)
        state, context = state_of(scope), context_of(scope)
        context.relayed = True
        path, head = state["parts"].data_path, context.head
        address = scope["client"][0] if scope["client"] else ""
        client = _AsgiClient(address, path.owners.of(address))
        # Starlette answers HEAD wherever it answers GET: the exchange sends a GET and the server drops the body.
        query = scope["query_string"].decode("latin-1")
        target = self._route.path.format(**scope["path_params"])
        if query:
            target = f"{target}?{query}"
        client.asked_for = not any(
            name == b"expect" and value.lower() == b"100-continue" for name, value in scope["headers"]
        )
        kind = Upload if self._route.body == "upload" else BufferedCall
        exchange = client.exchange = kind(path, client, self._route, target, head)
        if self._route.body == "upload":
            # The reader of an upload may be waiting in `readable`: this wakes it when the client disconnects.
            state.get("leaving", []).append(client.resume)
        reader = asyncio.create_task(_read(exchange, head.length, client, receive))
        try:
            await client.write(send)
        finally:
            reader.cancel()
            del client.exchange  # the exchange refers to the client: break the cycle
            client.abort()  # any further output is discarded
            exchange.client_gone()


async def _read(exchange: Exchange, length: int, client: _AsgiClient, receive: Receive) -> None:
    """Feed the request to the exchange; a disconnect of the client is detected here at any time."""
    try:
        exchange.begin(length)
        if exchange.outcome:
            return  # refused by its head: `receive` would ask for the body with a 100 (Continue)
        client.asked_for = True
        exchange.awaits_more()
        while (message := await receive())["type"] == "http.request":
            await client.readable()
            if body := message.get("body"):
                exchange.request_body(body)
            if message.get("more_body"):
                exchange.awaits_more()
            else:
                exchange.request_end()
        exchange.client_gone()
    except Exception:
        # A bug in the gateway: the client, served by the other task, still gets a response.
        _log.exception("the exchange failed (request id %s)", exchange.request_id)
        exchange.fail(GatewayError(FAILED))
    client.abort()


class _AsgiClient:
    """The exchange's client: it queues outgoing messages because `send` must be awaited."""

    exchange: Exchange
    chunk: Callable[[bytes], None] | None = None  # the server does the framing

    def __init__(self, address: str, owner: Owner) -> None:
        self.address = address
        self.owner = owner
        self._queue: deque[Message] = deque()
        self._queued = 0
        self._paused = False
        self._aborted = False
        self._wake = asyncio.Event()
        self._waits: asyncio.Event | None = None
        self.asked_for = True
        """Whether the client will send the body; with `Expect: 100-continue`, false until the body is read."""

    def pause(self) -> None:
        if self._waits is None:
            self._waits = asyncio.Event()

    def resume(self) -> None:
        if self._waits is not None:
            self._waits.set()
            self._waits = None

    async def readable(self) -> None:
        """Return when the exchange wants more of the request."""
        while self._waits is not None:
            await self._waits.wait()

    def start(self, head: AnswerHead, length: bytes | None, request_id: str) -> None:
        headers = head.headers[:]
        if length is not None:
            headers.append((b"content-length", length))
        headers.append((b"x-request-id", request_id.encode()))
        if not self.asked_for:
            headers.append((b"connection", b"close"))  # RFC 9110, 10.1.1: the body may or may not follow
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

    def is_gone(self) -> bool:
        return self._aborted

    def _put(self, message: Message) -> None:
        self._queue.append(message)
        self._wake.set()

    async def write(self, send: Send) -> None:
        """Send messages until the response ends; after an abort return at once: the server then cuts the connection."""
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
