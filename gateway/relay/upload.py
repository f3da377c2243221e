"""A call whose body is sent upstream as it arrives, so that a large body is not held."""

from __future__ import annotations

from typing import Final

from gateway.admission.arrivals import no_room
from gateway.pool.upstream_pool import Upstream
from gateway.relay.data_path import DataPath
from gateway.relay.exchange import RECEIVING, RENEWING, Exchange
from gateway.relay.interfaces import Connection, UploadingClient
from gateway.relay.usage import ITEM
from gateway.wire.errors import BadRequest, GatewayError, NoneReady, UnsupportedType, UpstreamBroken, body_too_large
from gateway.wire.heads import AnswerHead, RequestHead
from gateway.wire.pieces import add_piece
from gateway.wire.routes import Route

# Bytes of a body that are held while there is no connection yet, before the client is paused.
HELD: Final = 64 * 1024


class Upload(Exchange):
    """An exchange that asks for a connection once there is something to send, and sends on each piece of its body.

    Data that were sent are not kept, so nothing is sent twice: the connection is always a new one, and another upstream
    is tried only if this one accepted no connection. The model's name is somewhere in the body, so the upstream is any
    that takes speech, whatever its model.
    """

    __slots__ = ("_all_came", "_blocked", "_uploader")

    def __init__(self, path: DataPath, client: UploadingClient, route: Route, target: str, head: RequestHead) -> None:
        super().__init__(path, client, route, target, head)
        self._needs_audio = True
        self._uploader = client
        self._all_came = False
        self._blocked = False  # whether this upload has paused its client

    # The request

    def begin(self, length: int) -> None:
        """The request's head has arrived; its body is sent upstream in chunks if it states no length."""
        self.form = "openai"
        super().begin(length)
        if self.outcome:
            return
        request, kind = self._request, self._request.content_type
        if not kind.lower().startswith(b"multipart/form-data"):
            said = repr(kind[:40].decode("latin-1")) if kind else "missing"
            self.fail(UnsupportedType(f"Content-Type must be multipart/form-data, with a file, but it is {said}."))
            return
        key = self.key
        if key is not None and (refusal := self._bounded_by_key(key, b"")):
            self.fail(refusal)
            return
        self._framing = f"content-length: {request.length}\r\n" if request.length else "transfer-encoding: chunked\r\n"
        self._lines = b"content-type: %b\r\n%b" % (kind, request.lines)

    def request_body(self, data: bytes) -> None:
        """A piece of the request's body."""
        if self.outcome:
            return
        self._last_read_at = self._path.time()
        self._size += len(data)
        if self._size > self._path.limits.max_body_bytes:
            self.fail(body_too_large(self._path.limits.max_body_bytes))
        elif self._connection is not None:
            self._connection.send(self._framed(data))
        else:
            add_piece(self._body, self._framed(data))
            if self._size > HELD:
                self._go(self._last_read_at)
                if self._connection is None and self._has_room(self._size):
                    self.upstream_paused()

    def _go(self, now: float) -> None:
        """There is something to send: only now does the call take a place upstream."""
        if self._state != RECEIVING:
            return
        self._path.arrivals.leave(self)
        if self._has_room(self._size) and not self._try_start(now):
            self._enqueue(now)

    def _has_room(self, size: int) -> bool:
        """Set the bytes that are held; the call ends if there is no room for them."""
        if not self.outcome and not self._hold(size):
            self.fail(no_room(self._path.buffers))
        return not self.outcome

    def request_end(self) -> None:
        """The request is complete."""
        if self.outcome:
            return
        if self._size != self._request.length > 0:
            # For example with an `Upgrade` header, under an ASGI server that takes that for the end of HTTP.
            self.fail(BadRequest("The request's body is not as long as its Content-Length says."))
            return
        self._all_came = True
        self.prompt_bytes = min(self._size, ITEM)
        self.received_at = self._path.time()
        if self._blocked:  # the end arrived together with the data that blocked the client
            self._blocked = False
            self._uploader.resume()
        end = self._framed(b"")
        if self._connection is None:
            self._body.append(end)
            self._go(self.received_at)
            return
        self.sent_at = self.received_at
        if end:
            self._connection.send(end)
        self.deadline = self._next_timeout(self.received_at)

    def _framed(self, data: bytes) -> bytes:
        return data if self._request.length else b"%x\r\n%b\r\n" % (len(data), data)

    # The upstream

    def _connect(self, upstream: Upstream, *, fresh: bool) -> None:
        self.model = upstream.models[0] if upstream.models else None
        super()._connect(upstream, fresh=True)

    def upstream_paused(self) -> None:
        """The upstream applies backpressure: the request arrives faster than the upstream takes it."""
        if self._connection is not None and not self._has_room(self._connection.unsent()):
            return
        if not self._all_came and not self._blocked:
            self._blocked = True
            self._uploader.pause()

    def upstream_resumed(self) -> None:
        """The upstream takes more data."""
        self._hold(0)
        if self._blocked and not self.outcome:
            now = self._path.time()
            self._attempt_started_at += now - self._last_read_at  # the client was paused for this time
            self._last_read_at = now
            self._blocked = False
            self.deadline = self._next_timeout(now)
            self._uploader.resume()

    def upstream_connected(self, connection: Connection) -> None:
        """A connection is ready, for the received part of the body and the rest."""
        was_blocked, self._blocked = self._blocked, False
        self._last_read_at = self._attempt_started_at = self._path.time()
        super().upstream_connected(connection)
        self._body.clear()  # nothing is sent twice
        if self._connection is not None:
            self._hold(connection.unsent() if self._blocked else 0)
            self.deadline = self._next_timeout(self._attempt_started_at)
            if was_blocked and not self._blocked:  # sending may have paused the client again
                self._uploader.resume()

    def _is_dealt_with(self, refusal: AnswerHead) -> bool:
        """Whether new credentials are requested: for the next call, as this one cannot be sent again."""
        if refusal.status != 401 or not self._renew_credentials():
            return False
        self.credentials_renewed(None)
        return True

    def credentials_renewed(self, error: GatewayError | None) -> None:
        """There may be new credentials, but the body is no longer held and cannot be sent again."""
        if self._state != RENEWING:
            return
        if error is not None:
            self._upstream_failed(error)
        else:
            self.fail(
                NoneReady(
                    "The model server refused the gateway's token, which is being renewed: send the request again."
                )
            )

    def upstream_lost(self, why: str, *, answered: bool) -> None:
        """The connection is gone; if it closes while the body is being sent, an answer may be lost with it."""
        if self._connection is not None and not self._all_came:
            self._connection = None
            self.fail(UpstreamBroken(f"The model server broke off while the request was sent: {why}."))
        else:
            super().upstream_lost(why, answered=answered)

    def upstream_end(self) -> None:
        """The answer is complete; a connection that still expects a part of this body is not reused."""
        if not self._all_came:
            self._drop_connection()
        super().upstream_end()

    # Time

    @property
    def _is_coming(self) -> bool:
        return self._connection is not None and not self._all_came and not self._blocked

    def check_timeouts(self) -> None:
        """The time limits of a body hold while it is received and the client is not paused."""
        late = self._late_body(self._path.time(), self._attempt_started_at) if self._is_coming else None
        if late is not None:
            self.fail(late)
        else:
            super().check_timeouts()

    def _next_timeout(self, now: float) -> float:
        limit = super()._next_timeout(now)
        return min(limit, self._body_deadline(self._attempt_started_at)) if self._is_coming else limit
