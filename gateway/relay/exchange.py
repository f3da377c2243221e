"""One request of the data path and its answer: a state machine that does no I/O of its own.

Events come in as method calls, in any order that a network can cause: the request's body and end; the upstream
connected or not, its head, body, end or loss; the client paused, resumed or gone; the timer. Actions go out as direct
calls on three small interfaces, `Client`, `Connection` and `Transport`. State is changed before actions are taken, as
an action may call back at once.

`BufferedCall` and `Upload` are the two kinds of exchange: they differ in the handling of the request's body.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Final

from gateway.admission.arrivals import no_room
from gateway.dialects.reader import TranslatedStream, Translation
from gateway.dialects.streams import ChunkStream
from gateway.pool.model_list import without_paths
from gateway.pool.upstream_pool import Upstream
from gateway.relay.data_path import DataPath
from gateway.relay.interfaces import Client, Connection
from gateway.relay.keyed_record import JSON, NO_SUCH_PATH
from gateway.relay.paced_client import PacedClient
from gateway.relay.record import CLIENT_LEFT
from gateway.relay.streamed_answer import StreamedAnswer
from gateway.relay.usage import first_usage, text_size, usage_text
from gateway.wire import sse
from gateway.wire.client_address import client_address
from gateway.wire.errors import (
    Draining,
    GatewayError,
    NoneReady,
    Shortage,
    TooMany,
    UnsupportedEncoding,
    UpstreamBroken,
    UpstreamCompressed,
    UpstreamRedirects,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnreachable,
    body_too_large,
    is_shortage,
)
from gateway.wire.heads import REDIRECTS, AnswerHead, RequestHead
from gateway.wire.pieces import add_piece
from gateway.wire.routes import Route

_log = logging.getLogger(__name__)

# An unfinished event is held back up to this size, so that an error event starts on a boundary.
HELD_EVENT: Final = 64 * 1024
# A whole answer that has to be rewritten is collected up to this size.
COLLECTED = 64 * 1024 * 1024

NO_TOKEN: Final = "The gateway has no token for the model server yet: try again soon."
FAILED: Final = "The gateway failed; its log says why under this request id."

# An exchange's state. Plain ints: reading an Enum member costs as much as a function call.
RECEIVING: Final = 0  # the request is arriving
QUEUED: Final = 1  # there is no room upstream
CONNECTING: Final = 2  # a connection is awaited
WAITING: Final = 3  # the request is sent, no answer yet
RENEWING: Final = 4  # the upstream has refused the gateway's credentials, and new ones are awaited
ANSWERING: Final = 5  # the answer's head has arrived
ENDED: Final = 6
READING: Final = 7  # the request has arrived, and is read in steps when its turn comes

# How the answer's body is sent.
_RELAYED: Final = 0  # piece by piece, as it arrives
_IN_EVENTS: Final = 1  # in whole events
_COLLECTED: Final = 2  # rewritten at its end

# Bytes that a stream which waits for its client holds beside the last write: earlier writes that the system has not
# taken yet (server/http_protocol.py), the objects of a call and its two connections, and the overhead of malloc.
_OF_A_STREAM: Final = 32 * 1024

_LINE_FEED: Final = ord("\n")
_REPLY: Final = AnswerHead(200, [JSON])
# Statuses that may not reach the client: the call may be tried again, and redirects are never passed on.
_REFUSALS: Final = REDIRECTS | {401, 503}


class Exchange(StreamedAnswer):
    """One request and its answer. Attributes without an underscore are for observers to read."""

    __slots__ = (
        "_authorization",
        "_body",
        "_body_mode",
        "_collected",
        "_connection",
        "_first_usage",
        "_framing",
        "_held",
        "_hides_usage",
        "_length",
        "_lines",
        "_needs_audio",
        "_prefix",
        "_queued_until",
        "_refusal",
        "_renewed",
        "_retried",
        "_state",
        "_translation",
    )

    def __init__(self, path: DataPath, client: Client, route: Route, target: str, head: RequestHead) -> None:
        now = path.time()
        super().__init__(route, target, head, now)
        self._path = path
        self.deadline = self._last_read_at = self._commented_at = self._attempt_started_at = now
        self._size = 0
        self._paused = False
        self.address = client.address
        self.owner = client.owner
        if path.proxies:
            self.address = client_address(client.address, head.forwarded_for, path.proxies)
            self.owner = path.owners.of(self.address)
        self._client = client
        self._state = RECEIVING
        # The request: the held part of its body, all bytes held, and its framing and other headers for the upstream.
        self._body: list[bytes | bytearray] = []
        self._held = 0
        # The tokens that are reserved of its key's budget, and the tokens that the call asks for.
        self._reserved: float | None = None
        self._asked: int | None = None
        self._framing = ""
        self._lines = b""
        self._queued_until = now
        self._translation: Translation | None = None
        self._hides_usage = False
        # Whether the upstream must take speech.
        self._needs_audio = False
        # The upstream; the key of the prompt, by which it is selected, and whether its first byte is awaited.
        self._prefix: int | None = None
        self._awaited = False
        self._connection: Connection | None = None
        self._authorization: str | None = None
        self._retried = False
        self._renewed = False
        self._refusal: bytes | None = None
        # The answer: its head and length until they are sent, and the handling of its body.
        self._head: AnswerHead | None = None
        self._length: bytes | None = None
        self._started = False
        self._body_mode = _RELAYED
        self._events: sse.WholeEvents | None = None
        self._stream: TranslatedStream | None = None
        self._rewritten = 0
        self._write_chunk = None
        self._collected: list[bytes | bytearray] | None = None
        # The last two pieces, which hold the answer's end and usage, and the first usage of an answer without events.
        self._first_usage = b""
        self._before_last = b""
        self._last = b""

    # The request

    def begin(self, length: int) -> None:
        """The request's head has arrived; `length` is its body's length, as far as it is known."""
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
        elif length > limits.max_body_bytes:
            self.fail(body_too_large(limits.max_body_bytes))
        elif self.owner.short_until > self.started_at or (
            length > HELD_EVENT and not path.buffers.has_room(self.owner, length)
        ):
            self.fail(no_room(path.buffers))
        elif path.credentials.value is None and not path.pool.has_own_keys:
            self.fail(NoneReady(NO_TOKEN))

    @abstractmethod
    def request_body(self, data: bytes) -> None:
        """A piece of the request's body."""

    def awaits_more(self) -> None:
        """The data of one read have been handled, and more of the request is to come."""
        if self._state == RECEIVING:
            self._path.arrivals.grow(self, self.owner, self._size)

    @abstractmethod
    def request_end(self) -> None:
        """The request is complete."""

    def _hold(self, size: int) -> bool:
        """Set the bytes that are held for this call; return whether there is room for them."""
        more = size - self._held
        self._held = size
        return self._path.buffers.hold(self.owner, more)

    # The queue

    def _enqueue(self, now: float) -> None:
        self._state = QUEUED
        path = self._path
        if not path.pool:
            self.fail(NoneReady("No model server is known yet: GATEWAY_UPSTREAMS leads to none. Try again soon."))
        elif path.queue.add(self, path.pool.group(self.model, audio=self._needs_audio), self.owner):
            self._queued_until = min(now + path.limits.queue_timeout, self.started_at + path.limits.total_timeout)
            self.deadline = min(self._queued_until, self._next_heartbeat())
        else:
            self.fail(TooMany(f"There is no room, and {len(path.queue)} requests wait already: try again soon."))

    def give_way(self) -> None:
        """End: the queue is full, and other owners have fewer calls in it."""
        self.fail(TooMany("There is no room, and most of those that wait are yours: others go first. Try again soon."))

    def try_admit(self) -> bool:
        """There may be room upstream; True if it was taken."""
        return self._state != QUEUED or self._try_start(self._path.time())

    def _try_start(self, now: float) -> bool:
        path, owner = self._path, self.owner
        if owner.max_in_flight is not None and owner.in_flight >= owner.max_in_flight:
            return False
        upstream = path.pool.select(self.model, now, audio=self._needs_audio, key=self._prefix)
        if upstream is None:
            return False
        if self._state == QUEUED:
            path.queue.leave(self)
        owner.in_flight += 1
        self._attempt_started_at = now
        self.deadline = self._next_timeout(now) if self.streaming else self.started_at + path.limits.total_timeout
        self._connect(upstream, fresh=False)
        return True

    # The upstream

    def _connect(self, upstream: Upstream, *, fresh: bool) -> None:
        """Ask for a connection to this upstream, which may replace an earlier one."""
        self._state = CONNECTING
        before = self.upstream
        if upstream is not before:
            self.upstream = upstream
            upstream.in_flight += 1
            if before is not None:
                before.in_flight -= 1
                before.awaited -= self._awaited
            self._awaited = self.streaming
            upstream.awaited += self._awaited
        self._path.transport.connect(upstream, self, fresh=fresh)
        if before is not None and upstream is not before and self._path.queue:
            self._path.queue.wake()

    def _fail_over(self, *, ready: bool) -> bool:
        """Whether another upstream is tried instead of this one, which did not begin; at most once per request."""
        upstream = self.upstream
        assert upstream is not None
        if self._retried:
            return False
        other = self._path.pool.select_other(
            self.model,
            self._path.time(),
            instead_of=upstream,
            ready=ready,
            audio=self._needs_audio,
            key=self._prefix,
        )
        if other is None:
            return False
        self._retried = True
        self._connect(other, fresh=False)
        return True

    def upstream_connected(self, connection: Connection) -> None:
        """A connection is ready; one that comes too late is released to the idle connections."""
        if self._state != CONNECTING:
            connection.release()
            return
        upstream = self.upstream
        assert upstream is not None
        own = upstream.authorization
        self._authorization = self._path.credentials.value if own is None else own
        if self._authorization is None:  # the token has expired since this call began
            connection.release()
            self.fail(NoneReady(NO_TOKEN))
            return
        self._state = WAITING
        self._connection = connection
        self._refused = False
        self.sent_at = self._path.time()
        if self._paused:
            connection.pause()
        head = self._to_upstream()
        if self._held <= HELD_EVENT:
            connection.send(b"".join((head, *self._body)))
        else:
            connection.send_pieces((head, *self._body))  # not joined: a large body is not held twice

    def _to_upstream(self) -> bytes:
        """The head of the request to the upstream."""
        upstream, lines, traced = self.upstream, self._lines, self._path.traced
        assert upstream is not None
        head = (
            f"{self.route.method} {upstream.prefix}{self.target} HTTP/1.1\r\n"
            f"host: {upstream.authority}\r\nx-request-id: {self.upstream_id}\r\n{self._framing}"
        )
        if self._authorization:
            head += f"authorization: {self._authorization}\r\n"
        if traced is not None:
            lines = traced(self, lines)
        return b"".join((head.encode("latin-1"), lines, b"\r\n"))

    def upstream_unreachable(self, why: str, *, timed_out: float | None = None) -> None:
        """No connection could be made: `why`, or `timed_out`, the limit in seconds that passed."""
        if self._state != CONNECTING:
            return
        upstream = self.upstream
        assert upstream is not None
        upstream.record_failure(self._path.time())
        if self._fail_over(ready=False):
            return
        if self._refusal is not None:
            self.fail(NoneReady("No model server takes requests now: try again later.", retry_after=self._refusal))
        elif self.route.name == "models":
            self.fail(NoneReady("No model server is up: try again soon."))  # as if all of several upstreams are down
        elif timed_out is not None:
            self.fail(UpstreamTimeout("connect", timed_out))
        elif not upstream.ever_served:
            self.fail(NoneReady("The model server is not up yet: it may still be loading. Try again soon."))
        else:
            self.fail(UpstreamUnreachable(f"The model server cannot be reached: {why}."))

    def _is_no_answer(self, refusal: AnswerHead) -> bool:
        """Whether this refusal is not sent to the client: it is a redirect, or the call is tried again."""
        if refusal.status in REDIRECTS:
            self._upstream_failed(UpstreamRedirects(refusal.status))
            return True
        return self._is_dealt_with(refusal)

    @abstractmethod
    def _is_dealt_with(self, refusal: AnswerHead) -> bool:
        """Whether a refusal (status 401 or 503) is handled without the client, as the upstream has not begun."""

    def _renew_credentials(self) -> bool:
        """Whether new credentials are requested after the upstream refused the old ones; the client sees no refusal."""
        self._state = RENEWING
        self._refused = True
        connection, self._connection = self._connection, None
        own = self.upstream is not None and self.upstream.authorization is not None
        if own or not self._path.credentials.renew(self._authorization, self.credentials_renewed):
            self._state, self._connection = WAITING, connection
            return False
        if connection is not None:
            connection.discard()  # the rest of the refusal is not read
        return True

    @abstractmethod
    def credentials_renewed(self, error: GatewayError | None) -> None:
        """New credentials are available, unless there is an error."""

    def upstream_head(self, head: AnswerHead, length: bytes | None) -> None:
        """The head of the answer; it is sent with the first byte of the body."""
        if self._state != WAITING or (head.status in _REFUSALS and self._is_no_answer(head)):
            return
        self._state = ANSWERING
        self._body.clear()
        if self._held:
            self._hold(0)
        if not self._started:
            self.status = head.status
            self._head = head
            self._choose_body_mode(head, length)
        elif not head.streams or head.status != 200:  # to be reported in the stream that a heartbeat has begun
            self._head = head
            self._body_mode = _COLLECTED
            self._collected = []
        if self._stream is not None and self.upstream is not None:
            self._stream.fingerprint = self.upstream.fingerprint

    def _choose_body_mode(self, head: AnswerHead, length: bytes | None) -> None:
        """Choose how the body is sent; a length cannot be promised if an error event may have to be added."""
        if head.encoding and self._is_unreadable(head):
            return
        translation = self._translation if head.status == 200 else None
        if not head.streams:
            rewritten = translation is not None or head.status == 404 or self.route.name == "models"
            if rewritten or self._uses_erag_errors():
                self._body_mode = _COLLECTED
                self._collected = []
            else:
                self._length = length
            return
        if translation is not None and not translation.streaming:
            self._upstream_failed(UpstreamBroken("The model server streams an answer that was to be whole."))
            return
        if self.route.body in ("none", "upload"):  # a stream is requested in the query, or in a form's field
            self.streaming = True
            # Its limits count from now: only now is it known that it streams, and it may have waited long.
            self._last_read_at = self._path.time()
            self.deadline = self._next_timeout(self._last_read_at)
        self._body_mode = _IN_EVENTS
        self._events = sse.WholeEvents(HELD_EVENT)
        if translation is not None and (stream := translation.to_stream()):
            self._stream = stream
            self._head = stream.head
            if stream.paced:
                self._client = PacedClient(self._client, self._path.call_later)
        elif self._hides_usage and head.status == 200:
            self._stream = ChunkStream([], hides_usage=True)

    def _is_unreadable(self, head: AnswerHead) -> bool:
        """Whether a compressed body would have to be rewritten; the call then fails."""
        if head.status == 200:
            rewritten = self._translation is not None or self._hides_usage or self.route.name == "models"
        else:
            rewritten = head.status >= 400 and self._uses_erag_errors()
        if rewritten:
            self.fail(UpstreamCompressed(head.encoding))
        return rewritten

    def upstream_body(self, data: bytes) -> None:
        """A piece of the answer's body, from one read."""
        if self._state != ANSWERING:
            return
        if self._body_mode == _IN_EVENTS:
            events = self._events
            assert events is not None
            # Data that are not whole events, or do not begin with `data` or `event`, may hold a comment. The first
            # events of a response show no more progress than a comment.
            if (
                events.unfinished
                or data[-2:] != b"\n\n"
                or data[:1] not in b"de"
                or b"\n:" in data
                or (self.first_byte_at is None and self.route.ends == "responses")
            ):
                data = self._whole_events(events, data)
                if not data:
                    return
            self.events += data.count(b"\n\n")
        self._last_read_at = self._path.time()
        if self.first_byte_at is None:
            self._first_byte(self._last_read_at)
        if self._body_mode == _COLLECTED:
            self._collect(data)
            return
        self._first_usage = first_usage(self._first_usage, data) if self._events is None else b""
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
        head, self._head = self._head, None  # not to be kept while the stream lasts
        assert head is not None
        if self.key is not None or self._path.tells_route:
            head = self._with_own(head)
        self._client.start(head, self._length, self.request_id)
        self._write_chunk = self._chunk_writer()

    def upstream_chunk(self, chunk: bytes, size: int) -> None:
        """The data of one read that is exactly one HTTP chunk of `size` bytes, with one or more whole events.

        Most events arrive like this; relaying the chunk unchanged costs least.
        """
        write = self._write_chunk
        if write is None:
            self.upstream_body(chunk[-size - 2 : -2])
            return
        self._last_read_at = self._path.time()
        # Usually there is a single event of one line. Seeing that takes half the time of counting.
        self.events += chunk.count(b"\n\n") if _LINE_FEED in chunk[-size - 2 : -4] else 1
        self._before_last, self._last = self._last, chunk  # with the chunk's framing, which does not disturb the scans
        self.bytes_out += size
        write(chunk)

    def upstream_end(self) -> None:
        """The answer is complete."""
        if self._state != ANSWERING:
            return
        connection, self._connection = self._connection, None
        self.upstream_ended_at = self._path.time()
        if connection is not None:
            if self._lacks_end():
                connection.discard()  # an upstream that broke off in the middle gets no more calls on this connection
            else:
                connection.release()
        self._complete()

    def _lacks_end(self) -> bool:
        events = self._events
        if events is None or self.status != 200 or self._body_mode == _COLLECTED:
            return False
        return not self._has_end(self._before_last + self._last + events.held)

    def _has_end(self, tail: bytes) -> bool:
        """Whether the stream's end is in its last bytes; an end event too large to be held began before them."""
        events = self._events
        return events is not None and sse.has_end(events.beginning + tail, self.route.ends)

    def upstream_answer(self, head: AnswerHead, content: bytes) -> None:
        """The whole answer has arrived at once."""
        if head.streams:
            self.upstream_head(head, None)
            if content:
                self.upstream_body(content)
            self.upstream_end()
        elif self._state == WAITING:
            if head.status in _REFUSALS and self._is_no_answer(head):
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
        """The upstream takes more data. No effect here; an upload resumes its client."""

    # The answer

    def _collect(self, data: bytes) -> None:
        assert self._collected is not None
        add_piece(self._collected, data)
        size = self._held + len(data)
        if size > COLLECTED:
            self._upstream_failed(UpstreamBroken(f"The model server's answer is larger than {COLLECTED} bytes."))
        elif not self._hold(size):
            self.fail(no_room(self._path.buffers))

    def _complete(self) -> None:
        if self._body_mode == _COLLECTED:
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
            if self._stream is not None and self.upstream is not None:
                self.upstream.fingerprint = self._stream.fingerprint
        if self._state == ENDED:  # the client has left during a write, or was sent an error
            return
        client = self._client
        if not self._started:
            self._start()
        self._answered(failed=failed)
        client.end()

    def _answer(self, head: AnswerHead, content: bytes) -> None:
        """Send the whole answer at once, translated if the request was in another form."""
        if head.encoding and self._is_unreadable(head):
            return
        self._last = content
        if self._started:
            no_path = head.status == 404 and content == NO_SUCH_PATH
            self._tell_in_stream(self._not_served() if no_path else UpstreamRefused(head.status, content))
            return
        if self._translation is not None and head.status == 200:
            try:
                head, content = _REPLY, self._translation.to_reply(content)
            except GatewayError as unreadable:
                self._upstream_failed(unreadable)
                return
        elif head.status >= 400 and self._uses_erag_errors():
            rest = [header for header in head.headers if header[0] != b"content-type"]
            head, content = AnswerHead(head.status, [JSON, *rest]), self._path.reader.to_upstream_error(content)
        elif head.status == 404:
            head, content = self._not_found(head, content)
        elif self.route.name == "models" and head.status == 200:
            content = without_paths(content)
        self.bytes_out = len(content)
        if self.key is not None or self._path.tells_route:
            head = self._with_own(head)
        self._answered(failed=head.status >= 500)
        self._client.whole(head, content, self.request_id)

    def _answered(self, *, failed: bool, outcome: str = "done") -> None:
        upstream = self.upstream
        assert upstream is not None
        if failed:
            upstream.record_failure(self._path.time(), self.owner)
            self._finish("upstream_error")
        else:
            if upstream.broken_in_a_row:
                upstream.record_success()
            self._finish(outcome)

    # The client

    def client_paused(self) -> None:
        """The client reads more slowly than the upstream writes."""
        self._paused = True
        if self._started and self._state == ANSWERING and self._collected is None:
            # A stream that is not read should hold little: its end, which holds the usage, and the data written.
            written, self._last = len(self._last), sse.last_events(self._before_last + self._last, HELD_EVENT)
            self._before_last = b""
            if not self._hold(written + len(self._last) + _OF_A_STREAM):
                self.client_gone("shortage")
                self._client.abort()
                return
        if self._connection is not None:
            self._connection.pause()

    def client_resumed(self) -> None:
        """The client has caught up."""
        self._paused = False
        self._last_read_at = self._path.time()
        if self._started and self._state == ANSWERING and self._collected is None:
            self._hold(0)
        if self._connection is not None:
            self._connection.resume()

    def client_gone(self, outcome: str = "client_left") -> None:
        """The client has left, or reads no more; closing the connection tells the upstream at once."""
        if self._state == ENDED:
            return
        self._drop_connection()
        if outcome == "shortage":
            self.owner.was_cut(self._path.time())
        if not self._started:
            self.status = CLIENT_LEFT
        self._finish(outcome)

    # Time

    def check_timeouts(self) -> None:
        """End with the error of a limit that has passed, or set `deadline` to when one may pass."""
        if self._state == ENDED:
            return
        now = self._path.time()
        limits = self._path.limits
        if now >= self._path.drain.ends_at:
            self.fail(Draining("The gateway ends, and the time for what was still running is over: try again."))
        elif self._state == QUEUED and now - self.started_at < limits.total_timeout:
            if now >= self._queued_until:
                seconds = limits.queue_timeout
                self.fail(TooMany(f"There was no room for {seconds:g} s (GATEWAY_QUEUE_TIMEOUT): try again later."))
                return
            self._beat_if_due(now)
            self.deadline = min(self._queued_until, self._next_heartbeat())
        elif self._state == RECEIVING:
            if late_body := self._late_body(now, self.started_at):
                self.fail(late_body)
            else:
                self.deadline = self._body_deadline(self.started_at)
        elif now - self.started_at >= limits.total_timeout:
            self._took_too_long(now)
        elif self.streaming and (late := self._late(now)):
            self._upstream_failed(late)
        else:
            self._beat_if_due(now)
            self.deadline = self._next_timeout(now)

    def _took_too_long(self, now: float) -> None:
        limit = self._path.limits.total_timeout
        error = UpstreamTimeout("total", limit)
        silent = self.first_byte_at is None or not self.streaming
        if silent and not self._paused and now - self._attempt_started_at >= limit / 2:
            self._upstream_failed(error)
        else:
            self.fail(error)  # a long stream, a slow reader or a slow upload is not the upstream's fault

    # The end

    def _upstream_failed(self, error: GatewayError) -> None:
        silent = self.route.replays and isinstance(error, UpstreamTimeout)
        if self.upstream is not None and not silent:
            self.upstream.record_failure(self._path.time())
        self.fail(error)

    def crashed(self, error: BaseException) -> None:
        """A bug of the gateway's, or a shortage of memory: the client gets an error, and the upstream is not blamed."""
        _log.error("the exchange failed (request id %s)", self.request_id, exc_info=error)
        if self._state == ENDED:
            self._client.abort()  # the answer was being sent
        elif isinstance(error, MemoryError) or is_shortage(error):
            what = "memory" if isinstance(error, MemoryError) else "descriptors (ulimit -n)"
            self.fail(Shortage(f"The gateway is short of {what}: try again soon."))
        else:
            self.fail(GatewayError(FAILED))

    def fail(self, error: GatewayError) -> None:
        """End with an error of the gateway's own: an answer, an event in a stream or, if neither is possible, a cut."""
        if self._state == ENDED:
            return
        self._drop_connection()
        self.error = error.code, error.message  # not the exception, whose traceback holds the body
        client, events = self._client, self._events
        if not self._started:
            if self._uses_erag_errors():
                content = self._path.reader.to_error(error)
            else:
                content = error.envelope(self.request_id, self.route.ends)
            self.status = error.status
            self.bytes_out = len(content)
            self._finish(error.outcome)
            head = AnswerHead(error.status, [JSON, *error.answer_headers])
            if self.key is not None or self._path.tells_route:
                head = self._with_own(head)
            client.whole(head, content, self.request_id)
        elif events is not None and not events.is_cut:
            tail = self._before_last + self._last
            done = self.status == 200 and self._has_end(tail)  # so the client has the whole stream
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
        if path.arrivals:
            path.arrivals.leave(self)
        # Not by `_hold`, whose call every request would pay for.
        path.buffers.held -= self._held
        self.owner.held -= self._held
        self._held = 0
        if self.upstream is not None:
            self.upstream.in_flight -= 1
            self.upstream.awaited -= self._awaited
            self.owner.in_flight -= 1
        tail = self._before_last + self._last
        self._usage_text = usage_text(tail, self._first_usage)
        if self.events and self._usage_text[8:9] != b"{":  # no usage, or null
            self._text_bytes = text_size(tail, self.events, self.bytes_out + self._rewritten)
        if self._reserved is not None:
            self._settle(self._reserved)
        # Observers may hold this object for a while, so drop what is large.
        self._last = self._before_last = self._first_usage = b""
        self._body.clear()
        self._collected = None
        self._events = None
        self._translation = None
        self._write_chunk = None
        path.finished(self)
        if path.queue:
            path.queue.leave(self)
            if self.upstream is not None:  # else no room is freed, and a refusal must not cost a scan of the queue
                path.queue.wake()
