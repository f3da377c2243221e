"""The data path under any ASGI server: drives an exchange from `receive` and `send`."""

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

# An adapter's queue pauses the upstream above the one and resumes it below the other, in bytes.
_HIGH_WATER = 64 * 1024


_LOW_WATER = 16 * 1024


class Relay:
    """A data-path route as an ASGI application: drives an exchange from `receive` and `send`."""

    def __init__(self, route: Route) -> None:
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, until its answer is written or its client has gone."""
        if not all(map(RESPONSE_ID.fullmatch, scope["path_params"].values())):
            raise HTTPException(404)
        state, context = state_of(scope), context_of(scope)
        context.relayed = True
        path, head = state["parts"].data_path, context.head
        address = scope["client"][0] if scope["client"] else ""
        client = _AsgiClient(address, path.owners.of(address))
        # Starlette answers HEAD wherever it answers GET; the exchange asks by GET, the server drops the body.
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
            # Whose reader may wait for something else: it then sees at once that the client has left.
            state.get("leaving", []).append(client.resume)
        reader = asyncio.create_task(_read(exchange, head.length, client, receive))
        try:
            await client.write(send)
        finally:
            reader.cancel()
            del client.exchange  # which holds the client, too
            client.abort()  # whatever still comes for it goes nowhere
            exchange.client_gone()


async def _read(exchange: Exchange, length: int, client: _AsgiClient, receive: Receive) -> None:
    """Feed the exchange with what the client sends; the client's leaving is seen here, at any time."""
    try:
        exchange.begin(length)
        if exchange.outcome:
            return  # what was refused by its head is not asked for, as `receive` would by a 100 (Continue)
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
        # A bug of ours: the client, who waits on the other task, still gets an answer.
        _log.exception("the exchange failed (request id %s)", exchange.request_id)
        exchange.fail(GatewayError(FAILED))
    client.abort()


class _AsgiClient:
    """The exchange's client: queues what goes out, as `send` has to be awaited."""

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

    def is_gone(self) -> bool:
        return self._aborted

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
