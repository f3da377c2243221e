"""A call whose body is collected and read; it may be sent again as long as the upstream has not begun."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any, Final

from gateway.admission.arrivals import no_room
from gateway.dialects.json_body import LONG_BODY, to_object, without_long_strings
from gateway.dialects.reader import Reading, Translation
from gateway.relay.exchange import ANSWERING, READING, RECEIVING, RENEWING, WAITING, Exchange
from gateway.relay.usage import ITEM, prompt_size, prompt_size_in_steps
from gateway.wire.body_edit import edited
from gateway.wire.errors import GatewayError, UpstreamUnauthorized, body_too_large
from gateway.wire.heads import UNCOMPRESSED, AnswerHead
from gateway.wire.pieces import add_piece

# A body of at least so many bytes is read in steps; a single read brings less.
LARGE: Final = 256 * 1024
# Bytes of the body that are joined in one step.
_WRITTEN: Final = 1024 * 1024
# A reused connection that closes this soon after a request was already closing when it was sent, in seconds.
STALE_WITHIN: Final = 0.1


class BufferedCall(Exchange):
    """An exchange that receives the whole request before it asks for a connection."""

    __slots__ = ()

    # The request

    def request_body(self, data: bytes) -> None:
        """A piece of the request's body."""
        if self._state != RECEIVING:
            return
        self._last_read_at = self._path.time()
        self._size += len(data)
        if self._size > self._path.limits.max_body_bytes:
            self.fail(body_too_large(self._path.limits.max_body_bytes))
        elif self._body:
            add_piece(self._body, data)
        else:
            self._body.append(data)

    def request_end(self) -> None:
        """The request is complete."""
        if self._state != RECEIVING:
            return
        if self._size < LARGE:
            self._call(b"".join(self._body), self._path.time())
            return
        self._path.arrivals.leave(self)
        self._state = READING
        if self._hold(self._size):
            self._path.work.add(self.owner, self._read_in_steps())
        else:
            self.fail(no_room(self._path.buffers))

    def _read_in_steps(self) -> Iterator[None]:
        try:
            # Joined in steps, too: getting memory from the system costs several times as much as copying into it.
            joined, written = BytesIO(), 0
            self._body.reverse()
            while self._body:
                written += joined.write(self._body.pop())
                if written >= _WRITTEN:
                    written = 0
                    yield
            content = joined.getvalue()
            marks = None if self.key is None else self._marks()
            steps = self._path.reader.read_in_steps(self.route.body, content, marks)
            while self._state == READING:
                yield
                try:
                    next(steps)
                except StopIteration as end:
                    reading = end.value
                    break
            else:
                return
            self.prompt_bytes = yield from prompt_size_in_steps(content)
            if self._state == READING:
                self._call(content, self._path.time(), reading)
        except GatewayError as error:
            self.fail(error)
        except Exception as error:
            self.crashed(error)

    def request(self, content: bytes) -> None:
        """The whole request has arrived at once."""
        self.begin(len(content))
        if self._state == RECEIVING:
            self._call(content, self.started_at)

    def _call(self, content: bytes, now: float, reading: Reading | None = None) -> None:
        """Make the upstream's request from this body; start or queue it. A long body comes with its `reading`."""
        self.received_at = now
        self.bytes_in = len(content)
        if self._path.arrivals:
            self._path.arrivals.leave(self)
        reader, request, came = self._path.reader, self._request, content
        try:
            if reading is None:
                # Checked here, because calling `_marks` would cost each keyed call one more call.
                marked = self.key is not None and (self._path.salts_caches or self.route.body == "response")
                reading = reader.read(self.route.body, content, self._marks() if marked else None)
                self.prompt_bytes = len(content) if len(content) <= ITEM else prompt_size(content)
            content, self.form, self.model, self.streaming, self._translation, self._hides_usage, salt, self.alias = (
                reading
            )
            if self._translation is not None:
                content, salt = self._translated(self._translation, salt)
            rewritten = self._translation is not None or self._hides_usage or self.route.name == "models"
            self._lines = UNCOMPRESSED + request.lines_rewritten if rewritten else request.lines
        except GatewayError as error:
            self.fail(error)
            return
        self._body = [content]
        more, self._held = len(content) - self._held, len(content)
        if not self._path.buffers.hold(self.owner, more):
            self.fail(no_room(self._path.buffers))
            return
        key = self.key
        if (
            key is not None
            and (key.models is not None or key.tokens is not None)
            and (refusal := self._bounded_by_key(key, content)) is not None
        ):
            self.fail(refusal)
            return
        self.model = self.model or self._unnamed_model()
        self._prefix = None if self._path.pool.prefixes is None else self._prefix_key(came, salt)
        if self.route.method == "POST":
            self._framing = f"content-length: {len(content)}\r\n"
            if not request.json:
                self._framing += "content-type: application/json\r\n"
        if not self._try_start(now):
            self._enqueue(now)

    def _unnamed_model(self) -> str | None:
        """The model of a call that names none, if it decides on the upstream; for its key the call names none."""
        several = len(self._path.pool) > 1 and self.route.body != "none"
        return self._path.reader.model_of(self.route) if several else None

    def _prefix_key(self, came: bytes, salt: Any) -> int | None:
        """The key by which the pool selects the upstream, made from the body as received."""
        if not self.route.generates:
            return None
        return self._path.pool.key_of(self.model, salt if type(salt) is str else None, came)

    def _translated(self, translation: Translation, salt: Any) -> tuple[bytes, Any]:
        """The translated body with its key's marks, and its `cache_salt`."""
        self.target = translation.target
        self.model = self._path.reader.select_model(translation)
        if translation.model and translation.model != self.model:
            self.alias = translation.model
        content = translation.to_call(self.model)
        self.prompt_bytes = len(content) if len(content) <= ITEM else prompt_size(content)
        marks = None if self.key is None else self._marks()
        if marks is None:
            return content, salt
        call = to_object(without_long_strings(content) if len(content) >= LONG_BODY else content)
        added = marks.fields(call)
        return edited(content, call, **added), added.get("cache_salt", salt)

    # The upstream

    def _is_dealt_with(self, refusal: AnswerHead) -> bool:
        return self._retry_with_new_credentials() if refusal.status == 401 else self._retry_elsewhere(refusal)

    def _retry_with_new_credentials(self) -> bool:
        if self._renewed:
            self._upstream_failed(UpstreamUnauthorized())
            return True
        return self._renew_credentials()

    def credentials_renewed(self, error: GatewayError | None) -> None:
        """New credentials are available, unless there is an error; at most once per request."""
        if self._state != RENEWING:
            return
        if error is not None:
            self._upstream_failed(error)
            return
        assert self.upstream is not None
        self._renewed = True
        self._connect(self.upstream, fresh=False)

    def _retry_elsewhere(self, refusal: AnswerHead) -> bool:
        """Whether another upstream that is ready takes the call that this one refused before it began."""
        upstream = self.upstream
        connection, self._connection = self._connection, None
        self._refused = True
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
        """The connection is gone; if it was reused and was already closing, the request is sent once more."""
        if self._retried or answered or not self._is_stale():
            super().upstream_lost(why, answered=answered)
            return
        self._connection = None
        self._retried = self._refused = True
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
