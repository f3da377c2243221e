"""A call whose body is collected, read and, while the upstream has not begun, sent again where that can help."""

from __future__ import annotations

from gateway.relay.exchange import ANSWERING, RECEIVING, RENEWING, WAITING, Exchange
from gateway.wire.errors import GatewayError, UpstreamUnauthorized
from gateway.wire.heads import AnswerHead

# A reused connection that closes this soon after a request was already closing when it was sent, in seconds.
STALE_WITHIN = 0.1


class BufferedCall(Exchange):
    """An exchange that has the whole request before it asks for a connection."""

    __slots__ = ()

    # The request

    def request_body(self, data: bytes) -> None:
        """A piece of the request's body."""
        if self._state is not RECEIVING:
            return
        self._last_read_at = self._path.time()
        self._size += len(data)
        if self._size > self._path.limits.max_body_bytes:
            self.fail(self._too_large())
        else:
            self._body.append(data)

    def request_end(self) -> None:
        """The request is complete."""
        if self._state is RECEIVING:
            self._call(b"".join(self._body), self._path.time())

    def request(self, content: bytes) -> None:
        """The whole request is there."""
        self.begin(len(content))
        if self._state is RECEIVING:
            self._call(content, self.started_at)

    def _call(self, content: bytes, now: float) -> None:
        """Make the upstream's request of this body, and begin, or wait for room."""
        self.received_at = now
        reader, request = self._path.reader, self._request
        self._lines = request.lines
        try:
            reading = reader.read(self.route.body, content)
            content, self.form, self.model, self.streaming, self._translation = reading
            if (translation := self._translation) is not None:
                self.target = translation.target
                self.model = reader.select_model(translation)
                content = translation.to_call(self.model)
                self._lines = request.lines_rewritten
        except GatewayError as error:
            self.fail(error)
            return
        self._body = [content]
        if self.route.method == "POST":
            self._framing = f"content-length: {len(content)}\r\n"
            if not request.json:
                self._framing += "content-type: application/json\r\n"
        if not self._try_start(now):
            self._enqueue(now)

    # The upstream

    def _is_dealt_with(self, refusal: AnswerHead) -> bool:
        return self._retry_with_new_credentials() if refusal.status == 401 else self._retry_elsewhere(refusal)

    def _retry_with_new_credentials(self) -> bool:
        if self._renewed:
            self._upstream_failed(UpstreamUnauthorized())
            return True
        return self._renew_credentials()

    def credentials_renewed(self, error: GatewayError | None) -> None:
        """There are other credentials, unless there is an error; once a request."""
        if self._state is not RENEWING:
            return
        if error is not None:
            self._upstream_failed(error)
            return
        assert self.upstream is not None
        self._renewed = True
        self._connect(self.upstream, fresh=False)

    def _retry_elsewhere(self, refusal: AnswerHead) -> bool:
        """Whether another upstream, that is ready, takes what this one refuses before it has begun."""
        upstream = self.upstream
        connection, self._connection = self._connection, None
        if not self._fail_over(ready=True):
            self._connection = connection
            return False
        assert upstream is not None
        upstream.record_failure(self._path.time())
        self._refusal = dict(refusal.headers).get(b"retry-after", b"2")
        if connection is not None:
            connection.discard()  # the rest of the refusal is not read
        return True

    def upstream_lost(self, why: str, *, answered: bool) -> None:
        """The connection is gone; a request on a reused one that was already closing is sent once more."""
        if self._retried or answered or not self._is_stale():
            super().upstream_lost(why, answered=answered)
            return
        self._connection = None
        self._retried = True
        assert self.upstream is not None
        self._connect(self.upstream, fresh=True)

    def _is_stale(self) -> bool:
        connection = self._connection
        return (
            self._state in (WAITING, ANSWERING)
            and connection is not None
            and connection.reused
            and self.sent_at is not None
            and self._path.time() - self.sent_at <= STALE_WITHIN
        )
