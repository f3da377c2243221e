"""An httpx transport over the calls' own connections, so that a probe sees the same as a call."""

from __future__ import annotations

import asyncio

import httpx

from gateway.pool.upstream_pool import Upstream
from gateway.relay.interfaces import Connection, Transport
from gateway.wire.errors import is_shortage
from gateway.wire.heads import AnswerHead

# Limit of a response in bytes: vLLM's metrics are some 100 KB, and a list of a thousand adapters is as large.
_MOST = 16 * 1024 * 1024


class UpstreamTransport(httpx.AsyncBaseTransport):
    """Sends a request to the upstream in its extension `upstream`. The caller sets timeouts."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.ConnectError if connecting fails, and RemoteProtocolError if the connection breaks."""
        upstream: Upstream = request.extensions["upstream"]
        content = await request.aread()
        head = b"%b %b HTTP/1.1\r\n" % (request.method.encode(), request.url.raw_path)
        head += b"".join(b"%b: %b\r\n" % header for header in request.headers.raw)
        call = _Call(self._transport, upstream, head + b"\r\n" + content)
        try:
            return await call.answer()
        finally:
            call.end()


class _Call:
    """One request, with the callbacks that a connection calls."""

    def __init__(self, transport: Transport, upstream: Upstream, request: bytes) -> None:
        self._transport = transport
        self._upstream = upstream
        self._request = request
        self._connection: Connection | None = None
        self._head: AnswerHead | None = None
        self._content: list[bytes] = []
        self._size = 0
        self._answer: asyncio.Future[httpx.Response] = asyncio.get_running_loop().create_future()

    async def answer(self) -> httpx.Response:
        self._transport.connect(self._upstream, self, fresh=False)
        return await self._answer

    def end(self) -> None:
        """End the call: the caller no longer waits for the response."""
        self._answer.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.discard()

    def _fail(self, error: BaseException) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)

    def upstream_connected(self, connection: Connection) -> None:
        if self._answer.done():
            connection.release()
            return
        self._connection = connection
        connection.send(self._request)

    def upstream_unreachable(self, why: str, *, timed_out: float | None = None) -> None:
        self._fail(httpx.ConnectError(why))

    def upstream_head(self, head: AnswerHead, length: bytes | None) -> None:
        self._head = head

    def upstream_body(self, data: bytes) -> None:
        self._content.append(data)
        self._size += len(data)
        if self._size > _MOST:
            self._fail(httpx.RemoteProtocolError(f"its answer is larger than {_MOST} bytes"))
            self.end()

    def upstream_chunk(self, chunk: bytes, size: int) -> None:
        self.upstream_body(chunk[-size - 2 : -2])

    def upstream_end(self) -> None:
        assert self._head is not None
        self.upstream_answer(self._head, b"".join(self._content))

    def upstream_answer(self, head: AnswerHead, content: bytes) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()
        if not self._answer.done():
            # A body compressed without being asked for stays compressed: it may expand a thousandfold.
            headers = [header for header in head.headers if header[0] != b"content-encoding"]
            self._answer.set_result(httpx.Response(head.status, headers=headers, content=content))

    def upstream_lost(self, why: str, *, answered: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and connection.reused and not answered and not self._answer.done():
            self._transport.connect(self._upstream, self, fresh=True)  # the upstream was already closing it
        else:
            self._fail(httpx.RemoteProtocolError(why))

    def upstream_paused(self) -> None: ...

    def upstream_resumed(self) -> None: ...

    def crashed(self, error: BaseException) -> None:
        if is_shortage(error):
            connect_error = httpx.ConnectError(str(error))
            connect_error.__cause__ = error
            error = connect_error
        self._fail(error)
