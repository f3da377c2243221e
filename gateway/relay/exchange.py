"""One data-path request's life: a state machine that does no I/O of its own.

Events come in as method calls, in any order that a network can bring about: the request's body
and end, the upstream connected or not, its head, body, end or loss, the client paused, resumed or
gone, the timer. Actions go out as direct calls on three small interfaces, `Client`, `Connection` and `Transport`.
State is changed first and acted on last, as an action may call back at once.

`BufferedCall` and `Upload` are the two kinds of exchange: they differ in what becomes of the request's body.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from gateway.dialects.reader import TranslatedStream, Translation
from gateway.pool.keys import Key, Keys
from gateway.pool.upstream_pool import Upstream
from gateway.relay.data_path import DataPath
from gateway.relay.interfaces import Client, Connection
from gateway.relay.record import CLIENT_LEFT, Record
from gateway.relay.usage import usage_text
from gateway.wire import sse
from gateway.wire.errors import (
    Draining,
    GatewayError,
    NoneReady,
    RateLimited,
    RequestTimeout,
    TooLarge,
    TooMany,
    Unauthorized,
    UnsupportedEncoding,
    UnsupportedType,
    UpstreamBroken,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.wire.heads import AnswerHead, RequestHead
from gateway.wire.routes import Route

# An unfinished event is held back up to this size, so that an error event starts on a boundary.
HELD_EVENT = 64 * 1024
# A whole answer that has to be rewritten is collected up to this size.
COLLECTED = 64 * 1024 * 1024
# The slowest that a body may come, in bytes a second, past its time limit.
_BODY_RATE = 1024

LIMIT_HEADERS = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests")
KEY_NEEDED = "A key is needed: send it as Authorization: Bearer KEY, or as x-api-key."
NO_TOKEN = "The gateway has no token for the model server yet: try again soon."
FAILED = "The gateway failed; its log says why under this request id."

# An exchange's state. Plain ints: to read an Enum's member costs as much as a function call.
RECEIVING = 0  # the request comes in
QUEUED = 1  # there is no room upstream
CONNECTING = 2  # a connection is awaited
WAITING = 3  # the request is sent, no answer yet
RENEWING = 4  # the upstream has refused our credentials, and new ones are awaited
ANSWERING = 5  # the answer's head is there
ENDED = 6

# What happens to the answer's body.
_RELAYED = 0  # piece by piece, as it comes
_IN_EVENTS = 1  # in whole events
_COLLECTED = 2  # rewritten at its end

_LINE_FEED = ord("\n")
_JSON = (b"content-type", b"application/json")
_REPLY = AnswerHead(200, [_JSON])


class Exchange(Record, ABC):
    """One request and its answer. Attributes without an underscore are for observers to read.

    No time limit can have passed before `deadline`.
    """

    __slots__ = (
        "_attempt_started_at",
        "_authorization",
        "_before_last",
        "_body",
        "_body_mode",
        "_client",
        "_collected",
        "_collected_size",
        "_connection",
        "_events",
        "_framing",
        "_head",
        "_last",
        "_last_read_at",
        "_length",
        "_lines",
        "_path",
        "_paused",
        "_refusal",
        "_renewed",
        "_retried",
        "_size",
        "_started",
        "_state",
        "_stream",
        "_translation",
        "_write_chunk",
        "deadline",
    )

    # Whether an upstream is needed that takes speech.
    _needs_audio: ClassVar[bool] = False

    def __init__(self, path: DataPath, client: Client, route: Route, target: str, head: RequestHead) -> None:
        now = path.time()
        super().__init__(route, target, head, now)
        self.deadline = now
        self._path = path
        self._client = client
        self._state = RECEIVING
        # The request: what is held of its body, how much has come, its framing and other headers as they go upstream.
        self._body: list[bytes] = []
        self._size = 0
        self._framing = ""
        self._lines = b""
        self._translation: Translation | None = None
        # The upstream.
        self._connection: Connection | None = None
        self._authorization: str | None = None
        self._retried = False
        self._renewed = False
        self._refusal: bytes | None = None
        self._attempt_started_at = now
        self._last_read_at = now
        # The answer: its head and length until they go out, and what becomes of its body.
        self._head: AnswerHead | None = None
        self._length: bytes | None = None
        self._started = False
        self._paused = False
        self._body_mode = _RELAYED
        self._events: sse.WholeEvents | None = None
        self._stream: TranslatedStream | None = None
        self._write_chunk: Callable[[bytes], None] | None = None
        self._collected: list[bytes] | None = None
        self._collected_size = 0
        # The last two pieces, in which its end and its usage are.
        self._before_last = b""
        self._last = b""

    # The request

    def begin(self, length: int) -> None:
        """The request's head is there, and its body so long, as far as it is known."""
        path = self._path
        limits = path.limits
        path.in_flight.add(self)
        seconds, total = limits.body_timeout, limits.total_timeout
        self.deadline = self.started_at + (seconds if seconds < total else total)
        if path.keys is not None and (refusal := self._key_refusal(path.keys)):
            self.fail(refusal)
        elif self._request.encoding != b"identity":
            encoding = self._request.encoding.decode("latin-1")[:40]
            self.fail(
                UnsupportedEncoding(
                    f"Content-Encoding must be absent or identity, but it is {encoding!r}: send the body uncompressed."
                )
            )
        elif self._request.origin and not self._request.json and self.route.body not in ("none", "upload"):
            # Of any other type a browser sends it for whatever page, and asks nobody.
            self.fail(UnsupportedType("Content-Type must be application/json in a page's call, which has an Origin."))
        elif length > limits.max_body_bytes:
            self.fail(self._too_large())
        elif len(path.in_flight) > limits.max_requests:
            self.fail(TooMany("Too many requests run and wait already: try again soon."))
        elif path.credentials.value is None:
            self.fail(NoneReady(NO_TOKEN))

    @abstractmethod
    def request_body(self, data: bytes) -> None:
        """A piece of the request's body."""

    @abstractmethod
    def request_end(self) -> None:
        """The request is complete."""

    def _key_refusal(self, keys: Keys) -> GatewayError | None:
        """Why this client may not call now."""
        digest = self._request.key
        if digest is None:
            return Unauthorized(KEY_NEEDED)
        key = self.key = keys.find(digest)
        if key is None:
            return Unauthorized("The key that was sent is none of this gateway's.")
        if wait := key.take(self.started_at):
            return RateLimited(
                f"The key {key.name} has made its {key.a_minute} requests of this minute: try again in {wait:.0f} s.",
                retry_after=math.ceil(wait),
            )
        return None

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The request's body must be at most {self._path.limits.max_body_bytes} bytes (GATEWAY_MAX_BODY_BYTES)."
        )

    # The queue

    def _enqueue(self, now: float) -> None:
        self._state = QUEUED
        path = self._path
        if path.queue.add(self):
            self.deadline = min(now + path.limits.queue_timeout, self.started_at + path.limits.total_timeout)
        else:
            self.fail(TooMany(f"There is no room, and {path.queue.max_queue} requests wait already: try again soon."))

    def try_admit(self) -> bool:
        """There may be room upstream; True if it was taken."""
        return self._state is not QUEUED or self._try_start(self._path.time())

    def _try_start(self, now: float) -> bool:
        path = self._path
        upstream = path.pool.select(self.model, now, audio=self._needs_audio)
        if upstream is None:
            return False
        if self._state is QUEUED:
            path.queue.leave(self)
        self._attempt_started_at = now
        self.deadline = self._next_timeout(now) if self.streaming else self.started_at + path.limits.total_timeout
        self._connect(upstream, fresh=False)
        return True

    # The upstream

    def _connect(self, upstream: Upstream, *, fresh: bool) -> None:
        """Ask for a connection to this upstream, the request's second one if there was one before."""
        self._state = CONNECTING
        before = self.upstream
        if upstream is not before:
            self.upstream = upstream
            upstream.in_flight += 1
            if before is not None:
                before.in_flight -= 1
        self._path.transport.connect(upstream, self, fresh=fresh)
        if before is not None and upstream is not before and self._path.queue:
            self._path.queue.wake()

    def _fail_over(self, *, ready: bool) -> bool:
        """Whether another upstream is asked in the place of this one, which did not begin; once a request."""
        upstream = self.upstream
        assert upstream is not None
        if self._retried:
            return False
        other = self._path.pool.select_other(
            self.model, self._path.time(), instead_of=upstream, ready=ready, audio=self._needs_audio
        )
        if other is None:
            return False
        self._retried = True
        self._connect(other, fresh=False)
        return True

    def upstream_connected(self, connection: Connection) -> None:
        """A connection is there; one that comes too late goes to the idle ones."""
        if self._state is not CONNECTING:
            connection.release()
            return
        self._authorization = self._path.credentials.value
        if self._authorization is None:  # it has run out since this began
            connection.release()
            self.fail(NoneReady(NO_TOKEN))
            return
        self._state = WAITING
        self._connection = connection
        self.sent_at = self._path.time()
        if self._paused:
            connection.pause()
        connection.send(self._to_upstream())

    def _to_upstream(self) -> bytes:
        """The request's head as it goes out, and what is held of its body."""
        upstream, lines, traced = self.upstream, self._lines, self._path.traced
        assert upstream is not None
        head = (
            f"{self.route.method} {upstream.prefix}{self.target} HTTP/1.1\r\n"
            f"host: {upstream.authority}\r\nx-request-id: {self.request_id}\r\n{self._framing}"
        )
        if self._authorization:
            head += f"authorization: {self._authorization}\r\n"
        if traced is not None:
            lines = traced(self, lines)
        return b"".join((head.encode("latin-1"), lines, b"\r\n", *self._body))

    def upstream_unreachable(self, why: str, *, timed_out: float | None = None) -> None:
        """No connection: `why`, or the limit in seconds that passed."""
        if self._state is not CONNECTING:
            return
        upstream = self.upstream
        assert upstream is not None
        upstream.record_failure(self._path.time())
        if self._fail_over(ready=False):
            return
        if self._refusal is not None:
            self.fail(NoneReady("No model server takes requests now: try again later.", retry_after=self._refusal))
        elif timed_out is not None:
            self.fail(UpstreamTimeout("connect", timed_out))
        elif not upstream.ever_served:
            self.fail(NoneReady("The model server is not up yet: it may still be loading. Try again soon."))
        else:
            self.fail(UpstreamUnreachable(f"The model server cannot be reached: {why}."))

    @abstractmethod
    def _is_dealt_with(self, refusal: AnswerHead) -> bool:
        """Whether a refusal (status 401 or 503) is not the answer, as the upstream has not begun."""

    def _renew_credentials(self) -> bool:
        """Whether the upstream, which refused our credentials, may be shown others; no client sees the refusal."""
        self._state = RENEWING
        connection, self._connection = self._connection, None
        if not self._path.credentials.renew(self._authorization, self.credentials_renewed):
            self._state, self._connection = WAITING, connection
            return False
        if connection is not None:
            connection.discard()  # the rest of the refusal is not read
        return True

    @abstractmethod
    def credentials_renewed(self, error: GatewayError | None) -> None:
        """There are other credentials, unless there is an error."""

    def upstream_head(self, head: AnswerHead, length: bytes | None) -> None:
        """The head of the answer; it goes out with the first byte of the body."""
        if self._state is not WAITING or (head.status in (401, 503) and self._is_dealt_with(head)):
            return
        self._state = ANSWERING
        self._body.clear()
        self.status = head.status
        self._head = head
        self._choose_body_mode(head, length)

    def _choose_body_mode(self, head: AnswerHead, length: bytes | None) -> None:
        """What becomes of the answer's body; no length can be promised where an error event may have to be added."""
        translation = self._translation if head.status == 200 else None
        if not head.streams:
            if translation is not None or self._uses_erag_errors():
                self._body_mode = _COLLECTED
                self._collected = []
            else:
                self._length = length
            return
        if translation is not None and not translation.streaming:
            self._upstream_failed(UpstreamBroken("The model server streams an answer that was to be whole."))
            return
        if self.route.body in ("none", "upload"):  # a stream is asked for in the query, or in a form's field
            self.streaming = True
            self.deadline = self._next_timeout(self._last_read_at)
        self._body_mode = _IN_EVENTS
        self._events = sse.WholeEvents(HELD_EVENT)
        if translation is not None and (stream := translation.to_stream()):
            self._stream = stream
            self._head = stream.head

    def upstream_body(self, data: bytes) -> None:
        """What one read brought of the answer's body."""
        if self._state is not ANSWERING:
            return
        self._last_read_at = self._path.time()
        if self.first_byte_at is None:
            self.first_byte_at = self._last_read_at
        if self._body_mode is _IN_EVENTS:
            events = self._events
            assert events is not None
            if events.unfinished or data[-2:] != b"\n\n":
                data = events.feed(data)
                self._write_chunk = self._chunk_writer() if self._started else None
                if not data:
                    return
            self.events += data.count(b"\n\n")
        elif self._body_mode is _COLLECTED:
            self._collect(data)
            return
        self._before_last, self._last = self._last, data
        if self._stream is not None:
            data = self._translate_stream(data)
            if not data:
                return
        if not self._started:
            self._start()
        self.bytes_out += len(data)
        self._client.body(data)

    def _start(self) -> None:
        self._started = True
        head, self._head = self._head, None  # not kept for as long as a stream lasts
        assert head is not None
        if self.key is not None:
            head = self._with_limits(head, self.key)
        self._client.start(head, self._length, self.request_id)
        self._write_chunk = self._chunk_writer()

    def _chunk_writer(self) -> Callable[[bytes], None] | None:
        """What takes a chunk of whole events as it came; None where the next one has to be looked at."""
        events = self._events
        return None if events is None or events.unfinished or self._stream is not None else self._client.chunk

    def upstream_chunk(self, chunk: bytes, size: int) -> None:
        """What one read brought, where that was one HTTP chunk of `size` bytes that ends in a blank line.

        That is how most events come; they cost least by going on as they are.
        """
        write = self._write_chunk
        if write is None:
            self.upstream_body(chunk[-size - 2 : -2])
            return
        self._last_read_at = self._path.time()
        # To count takes twice as long as to see that there is but one, as there mostly is: a single line.
        self.events += chunk.count(b"\n\n") if _LINE_FEED in chunk[-size - 2 : -4] else 1
        self._before_last, self._last = self._last, chunk  # framed, but what is looked for in them is found
        self.bytes_out += size
        write(chunk)

    def upstream_end(self) -> None:
        """The answer is complete."""
        if self._state is not ANSWERING:
            return
        connection, self._connection = self._connection, None
        self.upstream_ended_at = self._path.time()
        if connection is not None:
            if self._lacks_end():
                connection.discard()  # who broke off in the middle is not to be trusted with more
            else:
                connection.release()
        self._complete()

    def _lacks_end(self) -> bool:
        events = self._events
        if events is None or self.status != 200:
            return False
        return not self._has_end(self._before_last + self._last + events.held)

    def _has_end(self, tail: bytes) -> bool:
        """Whether the stream's end is in its last bytes; an end that is too large to be held began before them."""
        events = self._events
        return events is not None and sse.has_end(events.beginning + tail, self.route.ends)

    def upstream_answer(self, head: AnswerHead, content: bytes) -> None:
        """The whole answer is there, at once."""
        if head.streams:
            self.upstream_head(head, None)
            if content:
                self.upstream_body(content)
            self.upstream_end()
        elif self._state is WAITING:
            if head.status in (401, 503) and self._is_dealt_with(head):
                return
            connection, self._connection = self._connection, None
            self.upstream_ended_at = self._path.time()
            if content:
                self.first_byte_at = self.upstream_ended_at
            if connection is not None:
                connection.release()
            self.status = head.status
            self._answer(head, content)

    def upstream_lost(self, why: str, *, answered: bool) -> None:
        """The connection is gone before the answer's end; `answered` once any byte of it had come."""
        if self._state in (WAITING, ANSWERING):
            self._connection = None
            self._upstream_failed(UpstreamBroken(f"The model server broke off: {why}."))

    def upstream_paused(self) -> None:
        """The upstream applies backpressure. No effect here; an upload pauses its client."""

    def upstream_resumed(self) -> None:
        """The upstream takes more."""

    # The answer

    def _translate_stream(self, data: bytes) -> bytes:
        assert self._stream is not None
        try:
            return self._stream.feed(data)
        except GatewayError as error:
            self._upstream_failed(error)
            return b""

    def _with_limits(self, head: AnswerHead, key: Key) -> AnswerHead:
        """The head, with what is left of the key's requests, in the headers that OpenAI's clients know."""
        if key.a_minute is None:
            return head
        left, reset = key.left(self._path.time())
        values = (str(key.a_minute), str(left), f"{reset:.3f}s")
        limits = [(name.encode(), value.encode()) for name, value in zip(LIMIT_HEADERS, values, strict=True)]
        return AnswerHead(head.status, head.headers + limits, streams=head.streams)

    def _collect(self, data: bytes) -> None:
        assert self._collected is not None
        self._collected.append(data)
        self._collected_size += len(data)
        if self._collected_size > COLLECTED:
            self._upstream_failed(UpstreamBroken(f"The model server's answer is larger than {COLLECTED} bytes."))

    def _complete(self) -> None:
        if self._body_mode is _COLLECTED:
            assert self._head is not None
            self._answer(self._head, b"".join(self._collected or ()))
            return
        failed = self.status >= 500
        events = self._events
        if events is not None:
            if events.held and (self.status != 200 or self._has_end(events.held)):
                # The last event lacks its blank line, but nothing else.
                self._body_mode = _RELAYED
                self.upstream_body(events.held if self._stream is None else events.held + b"\n\n")
            end = self._before_last + self._last
            if self._lacks_end():
                end_name = sse.END_NAMES[self.route.ends]
                self._upstream_failed(UpstreamBroken(f"The model server ended its stream without {end_name}."))
            failed = failed or sse.has_error(end)
        if self._state is ENDED:  # the client has left while it was written to, or what it got was an error
            return
        client = self._client
        if not self._started:
            self._start()
        self._answered(failed=failed)
        client.end()

    def _answer(self, head: AnswerHead, content: bytes) -> None:
        """Answer with all of it at once, in the simplified form where that was asked for."""
        self._last = content
        if self._translation is not None and head.status == 200:
            try:
                head, content = _REPLY, self._translation.to_reply(content)
            except GatewayError as error:
                self._upstream_failed(error)
                return
        elif head.status >= 400 and self._uses_erag_errors():
            rest = [header for header in head.headers if header[0] != b"content-type"]
            head, content = AnswerHead(head.status, [_JSON, *rest]), self._path.reader.to_upstream_error(content)
        self.bytes_out = len(content)
        if self.key is not None:
            head = self._with_limits(head, self.key)
        self._answered(failed=head.status >= 500)
        self._client.whole(head, content, self.request_id)

    def _answered(self, *, failed: bool) -> None:
        upstream = self.upstream
        assert upstream is not None
        if failed:
            upstream.record_failure(self._path.time())
            self._finish("upstream_error")
        else:
            if upstream.broken_in_a_row:
                upstream.record_success()
            self._finish("done")

    # The client

    def client_paused(self) -> None:
        """The client reads more slowly than the upstream writes."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def client_resumed(self) -> None:
        """The client has caught up."""
        self._paused = False
        self._last_read_at = self._path.time()
        if self._connection is not None:
            self._connection.resume()

    def client_gone(self, outcome: str = "client_left") -> None:
        """The client has left, or reads no more; the upstream is told at once, by a closed connection."""
        if self._state is ENDED:
            return
        self._drop_connection()
        if not self._started:
            self.status = CLIENT_LEFT
        self._finish(outcome)

    # Time

    def check_timeouts(self) -> None:
        """End with what is due if a limit has passed, or set `deadline` to when one may."""
        if self._state is ENDED:
            return
        now = self._path.time()
        limits = self._path.limits
        if now >= self._path.drain.ends_at:
            self.fail(Draining("The gateway ends, and the time for what was still running is over: try again."))
        elif self._state is QUEUED and now - self.started_at < limits.total_timeout:
            seconds = limits.queue_timeout
            self.fail(TooMany(f"There was no room for {seconds:g} s (GATEWAY_QUEUE_TIMEOUT): try again later."))
        elif self._state is RECEIVING:
            if late_body := self._late_body(now, self.started_at):
                self.fail(late_body)
            else:
                self.deadline = self._body_deadline(self.started_at)
        elif now - self.started_at >= limits.total_timeout:
            self._took_too_long(now)
        elif self.streaming and (late := self._late(now)):
            self._upstream_failed(late)
        else:
            self.deadline = self._next_timeout(now)

    def _late_body(self, now: float, since: float) -> RequestTimeout | None:
        """What is wrong with the time in which the request's body has come since then."""
        limits = self._path.limits
        if now - self._last_read_at >= limits.body_timeout:
            return RequestTimeout(f"The request's body stopped for {limits.body_timeout:g} s (GATEWAY_BODY_TIMEOUT).")
        if now - self.started_at >= limits.total_timeout:
            return RequestTimeout(f"The request took longer than {limits.total_timeout:g} s (GATEWAY_TOTAL_TIMEOUT).")
        if now - since >= limits.body_timeout + self._size / _BODY_RATE:
            return RequestTimeout(f"The request's body came more slowly than {_BODY_RATE} bytes a second.")
        return None

    def _body_deadline(self, since: float) -> float:
        """When `_late_body` may find something."""
        limits = self._path.limits
        slowest = since + limits.body_timeout + self._size / _BODY_RATE
        return min(self._last_read_at + limits.body_timeout, slowest, self.started_at + limits.total_timeout)

    def _took_too_long(self, now: float) -> None:
        limit = self._path.limits.total_timeout
        error = UpstreamTimeout("total", limit)
        silent = self.first_byte_at is None or not self.streaming
        if silent and not self._paused and now - self._attempt_started_at >= limit / 2:
            self._upstream_failed(error)
        else:
            self.fail(error)  # a long stream, a slow reader or a slow upload is no fault of the upstream's

    def _late(self, now: float) -> UpstreamTimeout | None:
        limits = self._path.limits
        if self._paused:
            return None
        if self.first_byte_at is None:
            late = now - max(self._attempt_started_at, self._last_read_at) >= limits.first_token_timeout
            return UpstreamTimeout("first_token", limits.first_token_timeout) if late else None
        late = now - self._last_read_at >= limits.idle_timeout
        return UpstreamTimeout("idle", limits.idle_timeout) if late else None

    def _next_timeout(self, now: float) -> float:
        """When a limit may pass. At most an idle gap from now, so that the first byte need not set it anew."""
        limits = self._path.limits
        end = self.started_at + limits.total_timeout
        if not self.streaming:
            return end
        if self._paused:
            return min(end, now + limits.idle_timeout)
        if self.first_byte_at is None:
            first_token = max(self._attempt_started_at, self._last_read_at) + limits.first_token_timeout
            return min(end, now + limits.idle_timeout, first_token)
        return min(end, self._last_read_at + limits.idle_timeout)

    # The end

    def _upstream_failed(self, error: GatewayError) -> None:
        silent = self.route.replays and isinstance(error, UpstreamTimeout)
        if self.upstream is not None and not silent:
            self.upstream.record_failure(self._path.time())
        self.fail(error)

    def fail(self, error: GatewayError) -> None:
        """End with an error of our own: an answer, an event in a stream, or, where neither is possible, a cut."""
        if self._state is ENDED:
            return
        self._drop_connection()
        client, events = self._client, self._events
        if not self._started:
            if self._uses_erag_errors():
                content = self._path.reader.to_error(error.message)
            else:
                content = error.envelope(self.request_id, self.route.ends)
            self.status = error.status
            self.bytes_out = len(content)
            self._finish(error.outcome)
            head = AnswerHead(error.status, [_JSON, *error.headers])
            if self.key is not None:
                head = self._with_limits(head, self.key)
            client.whole(head, content, self.request_id)
        elif events is not None and not events.is_cut:
            tail = self._before_last + self._last
            done = self.status == 200 and self._has_end(tail)  # and so it has all of it
            self._finish(error.outcome)
            if not done:
                client.body(self._event_of(error, tail))
            client.end()
        else:
            self._finish(error.outcome)
            client.abort()

    def _uses_erag_errors(self) -> bool:
        return self._path.reader.uses_erag_errors(self.route.body, self.form)

    def _event_of(self, error: GatewayError, tail: bytes) -> bytes:
        if self._stream is not None:
            return self._stream.failed(error.envelope(self.request_id))
        return error.event(self.request_id, self.route.ends, sse.next_sequence_number(tail))

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.discard()

    def _finish(self, outcome: str) -> None:
        self._state = ENDED
        self.outcome = outcome
        path = self._path
        self.ended_at = path.time()
        path.in_flight.discard(self)
        if self.upstream is not None:
            self.upstream.in_flight -= 1
        self._usage_text = usage_text(self._before_last + self._last)
        # Observers may hold this object for a while, so what is large is dropped.
        self._last = self._before_last = b""
        self._body.clear()
        self._collected = None
        self._events = None
        self._translation = None
        self._write_chunk = None
        path.finished(self)
        if path.queue:
            path.queue.leave(self)
            if self.upstream is not None:  # else it makes no room, and refusals must not cost a look at all that wait
                path.queue.wake()
