"""One data-path request's life: a state machine that does no I/O of its own.

Events come in as method calls, in any order that a network can bring about: the request's body
and end, the upstream connected or not, its head, body, end or loss, the client paused, resumed or
gone, the timer. Actions go out as direct calls on three small interfaces that this file owns,
`Client`, `Connection` and `Transport`. State is changed first and acted on last, as an action may
call back at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import getrandbits
from typing import Any, Literal, Protocol

from gateway import simplified, sse
from gateway.body import to_object
from gateway.errors import (
    BadRequest,
    GatewayError,
    ModelNotFound,
    NoneReady,
    RequestTimeout,
    Style,
    TooLarge,
    UnsupportedEncoding,
    UpstreamBroken,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from gateway.headers import LINE, NOT_TO_CLIENT, NOT_TO_UPSTREAM, Header, by_name, forwarded, sane_request_id
from gateway.upstreams import Upstream, UpstreamPool
from gateway.usage import usage_in

# An unfinished event is held back up to this size, so that an error event starts on a boundary.
HELD_EVENT = 64 * 1024
# A whole answer that has to be rewritten is collected up to this size.
COLLECTED = 64 * 1024 * 1024
# A reused connection that closes this soon after a request was already closing when it was sent.
STALE_WITHIN = 0.1

CLIENT_LEFT = 499  # as nginx logs it; never sent

FAILED = "The gateway failed; its log says why under this request id."


class Client(Protocol):
    """The side that asked; each adapter does its own framing."""

    def start(self, status: int, headers: list[Header]) -> None:
        """The answer's head; comes with the first byte of its body, or its end."""

    def body(self, data: bytes) -> None:
        """A piece of the answer."""

    def end(self) -> None:
        """The answer is complete."""

    def abort(self) -> None:
        """The answer breaks off: the connection closes without a clean end."""


class Connection(Protocol):
    """One connection to an upstream, lent to one exchange at a time."""

    reused: bool

    def send(self, request: bytes) -> None:
        """The whole request, head and body."""

    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Read again."""

    def release(self) -> None:
        """Done with it: to the idle ones where it can serve again."""

    def discard(self) -> None:
        """Close it at once; what the upstream still does for this request is not wanted."""


class Transport(Protocol):
    """Where connections come from."""

    def connect(self, upstream: Upstream, exchange: Exchange, *, fresh: bool) -> None:
        """Call `upstream_connected` or `upstream_unreachable`, now or later; `fresh` reuses none."""


class Timer(Protocol):
    """What `Clock.call_later` gives."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Monotonic seconds, and timers."""

    @property
    def time(self) -> Callable[[], float]: ...

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer: ...


class Observer(Protocol):
    """Who counts and logs; called once at the start and once at the end."""

    def started(self, exchange: Exchange) -> None: ...

    def finished(self, exchange: Exchange) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest body in bytes, and the time limits in seconds."""

    max_body: int
    first_token: float
    idle: float
    total: float
    body: float


@dataclass(frozen=True, slots=True)
class DataPath:
    """What all exchanges of one gateway share. `authorization` is the upstreams' key, as a header's value."""

    pool: UpstreamPool
    transport: Transport
    clock: Clock
    observer: Observer
    limits: Limits
    model: str | None
    style: Style
    system_role: Literal["system", "merge"]
    whole: bool
    authorization: bytes | None


@dataclass(frozen=True, slots=True)
class Route:
    """A path that is relayed."""

    method: str
    path: str
    endpoint: Literal["chat", "completions", "models"]


ROUTES = (
    Route("POST", "/v1/chat/completions", "chat"),
    Route("POST", "/v1/completions", "completions"),
    Route("GET", "/v1/models", "models"),
)


# An exchange's state. No Enum: its members cost as much to look up as a call.
_RECEIVING = 0  # the request comes in
_CONNECTING = 1  # a connection is awaited
_WAITING = 2  # the request is sent, no answer yet
_ANSWERING = 3  # the answer's head is there
_ENDED = 4


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """The client's request id if it is sane, else a new one; unique, but no secret."""
    given = headers.get(b"x-request-id")
    return (given and sane_request_id(given)) or f"{getrandbits(128):032x}"


class Exchange:
    """One request and its answer. Attributes without an underscore are for observers to read.

    Times are the clock's seconds, None for what has not happened. `form` is `simplified`, `openai`
    or, where it is not known, empty. `outcome` is `done`, `client_left`, `upstream_error` or
    `timeout:<which>`. `usage` is prompt and completion tokens, where vLLM reported them.
    """

    __slots__ = (
        "_before_last",
        "_client",
        "_collected",
        "_connection",
        "_content",
        "_cut_event",
        "_due",
        "_headers",
        "_held",
        "_last",
        "_last_read_at",
        "_on_body",
        "_path",
        "_paused",
        "_query",
        "_repr",
        "_retried",
        "_sent",
        "_simplified",
        "_size",
        "_sse",
        "_started",
        "_state",
        "_timer",
        "bytes_out",
        "ended_at",
        "events",
        "first_byte_at",
        "form",
        "model",
        "outcome",
        "received_at",
        "request_id",
        "route",
        "sent_at",
        "started_at",
        "status",
        "streaming",
        "upstream",
        "upstream_ended_at",
        "usage",
    )

    def __init__(self, path: DataPath, client: Client, route: Route, query: bytes, headers: list[Header]) -> None:
        """`headers` are the request's, names in lower case; the list is not kept nor changed."""
        self.route = route
        self._sent = by_name(headers)
        self._headers = forwarded(headers, self._sent, NOT_TO_UPSTREAM)
        self.request_id = request_id_of(self._sent)
        self.form = ""
        self.model: str | None = None
        self.upstream: Upstream | None = None
        self.status = 0
        self.streaming = False
        self.outcome = ""
        self.events = 0
        self.bytes_out = 0
        self.started_at = path.clock.time()
        self.received_at: float | None = None
        self.sent_at: float | None = None
        self.first_byte_at: float | None = None
        self.upstream_ended_at: float | None = None
        self.ended_at: float | None = None
        self.usage: tuple[int, int] | None = None
        self._path = path
        self._client = client
        self._query = query
        self._state = _RECEIVING
        self._content: list[bytes] = []
        self._size = 0
        self._simplified: simplified.Simplified | None = None
        self._connection: Connection | None = None
        self._retried = False
        self._started = False
        self._paused = False
        self._sse = False
        self._on_body: Callable[[bytes], None] | None = None
        self._collected: list[bytes] = []
        self._repr: simplified.ReprStream | None = None
        self._held = b""
        self._cut_event = False
        self._last = b""
        self._before_last = b""
        self._last_read_at = self.started_at
        self._timer: Timer | None = None
        self._due = 0.0

    # The request

    def begin(self) -> None:
        """The request's head is there."""
        self._path.observer.started(self)
        limits, sent = self._path.limits, self._sent
        self._arm(min(limits.body, limits.total), self.started_at)
        encoding = sent.get(b"content-encoding")
        length = sent.get(b"content-length", b"0")
        if encoding is not None and encoding.lower() != b"identity":
            self.fail(
                UnsupportedEncoding(
                    f"Content-Encoding must be absent or identity, but it is {encoding.decode('latin-1')[:40]!r}: "
                    "send the body uncompressed."
                )
            )
        elif length.isdigit() and int(length) > limits.max_body:
            self.fail(self._too_large())

    def request_body(self, data: bytes) -> None:
        """A piece of the request's body."""
        if self._state is not _RECEIVING:
            return
        self._last_read_at = self._path.clock.time()
        self._size += len(data)
        if self._size > self._path.limits.max_body:
            self.fail(self._too_large())
        else:
            self._content.append(data)

    def request_end(self) -> None:
        """The request is complete."""
        if self._state is not _RECEIVING:
            return
        self.received_at = self._path.clock.time()
        try:
            self._content = [self._to_upstream_body(b"".join(self._content))]
        except GatewayError as error:
            self.fail(error)
        else:
            if self.streaming:  # else the timer that runs will do
                self._arm(self._limit_after(self.received_at), self.received_at)
            self._connect(without=None)

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The request's body must be at most {self._path.limits.max_body} bytes (GATEWAY_MAX_BODY_BYTES)."
        )

    def _to_upstream_body(self, content: bytes) -> bytes:
        """What goes to the upstream: the bytes that came, or, for the simplified form, a chat call."""
        if self.route.endpoint == "models":
            return b""
        body = to_object(content)
        if self.route.endpoint == "chat":
            if simplified.is_simplified(body):
                return self._from_simplified(body)
            if not isinstance(body.get("messages"), list):
                raise BadRequest(
                    "messages must be an object with system and user, a string, or OpenAI's array of messages, but "
                    f"it is {simplified.kind_of(body.get('messages'))}.",
                    param="messages",
                )
        self.form = "openai"
        self.streaming = body.get("stream") is True
        model = body.get("model")
        self.model = model if isinstance(model, str) else None
        return content

    def _from_simplified(self, body: dict[str, Any]) -> bytes:
        self.form = "simplified"
        path = self._path
        request = simplified.from_body(body, path.style, path.system_role, whole=path.whole)
        self._simplified = request
        self.streaming = request.streaming
        self.model = self._served(request.model or path.model)
        return simplified.to_chat_call(request, self.model)

    def _served(self, model: str | None) -> str:
        served = self._path.pool.models
        if model is None:
            if not served:
                raise NoneReady("No model server has answered yet: it may still be loading. Try again soon.")
            return served[0]
        if served and model not in served:
            raise ModelNotFound(f"The model {model[:200]!r} is not served; served: {', '.join(served)}.", param="model")
        return model

    # The upstream

    def _connect(self, *, without: Upstream | None, fresh: bool = False) -> bool:
        """Ask for a connection; False where there is no upstream left to ask."""
        path = self._path
        upstream = self.upstream if fresh else path.pool.choose(self.model, path.clock.time(), without=without)
        if upstream is None:
            return False
        self._state = _CONNECTING
        if upstream is not self.upstream:
            if self.upstream is not None:
                self.upstream.in_flight -= 1
            self.upstream = upstream
            upstream.in_flight += 1
        path.transport.connect(upstream, self, fresh=fresh)
        return True

    def upstream_connected(self, connection: Connection) -> None:
        """A connection is there; one that comes too late goes to the idle ones."""
        if self._state is not _CONNECTING:
            connection.release()
            return
        self._state = _WAITING
        self._connection = connection
        self.sent_at = self._path.clock.time()
        if self._paused:
            connection.pause()
        connection.send(self._request_head() + self._content[0])

    def _request_head(self) -> bytes:
        route, upstream, headers = self.route, self.upstream, self._headers
        assert upstream is not None
        target = f"{route.method} {upstream.prefix}{route.path}".encode()
        if self._query:
            target += b"?" + self._query
        head = b"%b HTTP/1.1\r\nhost: %b\r\nx-request-id: %b\r\n" % (
            target,
            upstream.authority,
            self.request_id.encode(),
        )
        if self._path.authorization:
            head += b"authorization: %b\r\n" % self._path.authorization
        if route.method == "POST":
            head += b"content-length: %d\r\n" % len(self._content[0])
            # Plain `curl -d` says that it sends a form; vLLM takes nothing but JSON's own type.
            kind = self._sent.get(b"content-type", b"")
            if kind[:16].lower() != b"application/json":
                head += b"content-type: application/json\r\n"
                headers = [header for header in headers if header[0] != b"content-type"]
        if self._simplified is not None:
            # An answer that is rewritten here must not come compressed.
            headers = [header for header in headers if header[0] != b"accept-encoding"]
        return head + b"".join(map(LINE, headers)) + b"\r\n"

    def upstream_unreachable(self, why: str, *, timed_out: float | None = None) -> None:
        """No connection: `why`, or the limit in seconds that passed."""
        if self._state is not _CONNECTING:
            return
        upstream = self.upstream
        assert upstream is not None
        upstream.broke(self._path.clock.time())
        retry, self._retried = not self._retried, True
        if retry and self._connect(without=upstream):
            return
        if timed_out is not None:
            self.fail(UpstreamTimeout("connect", timed_out))
        elif not upstream.ever_served:
            self.fail(NoneReady("The model server is not up yet: it may still be loading. Try again soon."))
        else:
            self.fail(UpstreamUnreachable(f"The model server cannot be reached: {why}."))

    def upstream_head(self, status: int, headers: list[Header]) -> None:
        """The head of the answer; it goes out with the first byte of the body."""
        if self._state is not _WAITING:
            return
        self._state = _ANSWERING
        self._content = []
        self._size = 0
        self.status = status
        known = by_name(headers)
        self._headers = forwarded(headers, known, NOT_TO_CLIENT)
        # What is compressed cannot be read, and is relayed as the bytes that it is.
        kind = known.get(b"content-type", b"")[:17].lower()
        self._sse = kind == b"text/event-stream" and not known.get(b"content-encoding")
        rewritten = self._simplified if status == 200 else None
        if rewritten is None or (self._sse and rewritten.style == "openai"):
            self._on_body = self._relay_events if self._sse else self._relay
        elif self._sse:
            self._repr = simplified.ReprStream()
            self._on_body = self._relay_events
        else:
            self._on_body = self._collect

    def upstream_body(self, data: bytes) -> None:
        """What one read brought of the answer's body."""
        if self._on_body is None:
            return
        self._last_read_at = self._path.clock.time()
        if self.first_byte_at is None:
            self.first_byte_at = self._last_read_at
        self._on_body(data)

    def upstream_end(self) -> None:
        """The answer is complete."""
        if self._state is not _ANSWERING:
            return
        connection, self._connection = self._connection, None
        self.upstream_ended_at = self._path.clock.time()
        if connection is not None:
            connection.release()
        try:
            self._complete()
        except GatewayError as error:
            self._upstream_failed(error)

    def upstream_lost(self, why: str, *, answered: bool) -> None:
        """The connection is gone before the answer's end; `answered` once any byte of it had come."""
        if self._state not in (_WAITING, _ANSWERING):
            return
        connection, self._connection = self._connection, None
        now = self._path.clock.time()
        stale = (
            connection is not None
            and connection.reused
            and not answered
            and self.sent_at is not None
            and now - self.sent_at <= STALE_WITHIN
        )
        if stale and not self._retried:
            self._retried = True
            self._connect(without=None, fresh=True)
        else:
            self._upstream_failed(UpstreamBroken(f"The model server broke off: {why}."))

    # The answer

    def _relay(self, data: bytes) -> None:
        self._before_last, self._last = self._last, data
        self._send(data)

    def _relay_events(self, data: bytes) -> None:
        if self._held:
            data = self._held + data
            self._held = b""
        if not data.endswith(b"\n\n"):
            end = sse.end_of_last_event(data)
            if len(data) - end > HELD_EVENT:
                self._cut_event = True
            else:
                data, self._held = data[:end], data[end:]
                self._cut_event = self._cut_event and not data
            if not data:
                return
        elif self._cut_event:
            self._cut_event = False
        self._send_events(data)

    def _send_events(self, data: bytes) -> None:
        self.events += data.count(b"\n\n")
        self._before_last, self._last = self._last, data
        if self._repr is not None:
            try:
                data = self._repr.feed(data)
            except GatewayError as error:
                self._upstream_failed(error)
                return
            if not data:
                return
        if not self._started:
            self._start()
        self.bytes_out += len(data)
        self._client.body(data)

    def _collect(self, data: bytes) -> None:
        self._collected.append(data)
        self._size += len(data)
        if self._size > COLLECTED:
            self._upstream_failed(UpstreamBroken(f"The model server's answer is larger than {COLLECTED} bytes."))

    def _complete(self) -> None:
        if self._on_body == self._collect:
            assert self._simplified is not None
            answer = b"".join(self._collected)
            reply = simplified.to_reply(self._simplified, answer)
            self._last = answer
            self._headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(reply))]
            self._send(reply)
        elif self._sse:
            if self._held and (self.status != 200 or sse.has_done(self._held)):
                # The last event lacks its blank line, but nothing else.
                self._send_events(self._held if self._repr is None else self._held + b"\n\n")
            if self.status == 200 and not sse.has_done(self._before_last + self._last):
                raise UpstreamBroken("The model server ended its stream without [DONE].")
        if self._state is _ENDED:  # the client has left while it was written to, or what it got was an error
            return
        if not self._started:
            self._start()
        failed = self.status >= 500 or (self._sse and b'data: {"error"' in self._before_last + self._last)
        self._judge(broken=failed)
        self._finish("upstream_error" if failed else "done")
        self._client.end()

    def _send(self, data: bytes) -> None:
        if not self._started:
            self._start()
        self.bytes_out += len(data)
        self._client.body(data)

    def _start(self) -> None:
        self._started = True
        headers = self._headers
        if self._sse:
            # An error event may have to be added, so no length can be promised.
            headers = [header for header in headers if header[0] != b"content-length"]
        if self._repr is not None:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        self._client.start(self.status, [*headers, (b"x-request-id", self.request_id.encode())])

    # The client

    def client_paused(self) -> None:
        """The client reads more slowly than the upstream writes."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def client_resumed(self) -> None:
        """The client has caught up."""
        self._paused = False
        self._last_read_at = self._path.clock.time()
        if self._connection is not None:
            self._connection.resume()

    def client_gone(self) -> None:
        """The client has left; the upstream is told at once, by a closed connection."""
        if self._state is _ENDED:
            return
        self._drop_connection()
        if not self._started:
            self.status = CLIENT_LEFT
        self._finish("client_left")

    # Time

    def timer(self) -> None:
        """The timer has run: a limit has passed, or the next one is waited for."""
        self._timer = None
        if self._state is _ENDED:
            return
        now = self._path.clock.time()
        limits = self._path.limits
        if self._state is _RECEIVING:
            if now - self._last_read_at >= limits.body:
                self.fail(RequestTimeout(f"The request's body stopped for {limits.body:g} s (GATEWAY_BODY_TIMEOUT)."))
            elif now - self.started_at >= limits.total:
                self.fail(RequestTimeout(f"The request took longer than {limits.total:g} s (GATEWAY_TOTAL_TIMEOUT)."))
            else:
                self._arm(min(self._last_read_at + limits.body, self.started_at + limits.total) - now, now)
        elif now - self.started_at >= limits.total:
            self._upstream_failed(UpstreamTimeout("total", limits.total))
        elif self.streaming and (late := self._late(now)):
            self._upstream_failed(late)
        else:
            self._arm(self._limit_after(now), now)

    def _late(self, now: float) -> UpstreamTimeout | None:
        limits = self._path.limits
        if self.first_byte_at is None:
            late = self.received_at is not None and now - self.received_at >= limits.first_token
            return UpstreamTimeout("first_token", limits.first_token) if late else None
        late = not self._paused and now - self._last_read_at >= limits.idle
        return UpstreamTimeout("idle", limits.idle) if late else None

    def _limit_after(self, now: float) -> float:
        """Seconds until a limit may pass. At most an idle gap, so that the first byte need not move the timer."""
        limits = self._path.limits
        left = self.started_at + limits.total - now
        if not self.streaming:
            return left
        if self.first_byte_at is None:
            waited = now - (self.received_at or now)
            return min(left, limits.idle, limits.first_token - waited)
        return min(left, limits.idle if self._paused else self._last_read_at + limits.idle - now)

    def _arm(self, seconds: float, now: float) -> None:
        """Have the timer run by then. One that runs earlier is left, as it looks again: new ones are dear."""
        due = now + max(seconds, 0.001)
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = self._path.clock.call_later(due - now, self.timer)

    # The end

    def _judge(self, *, broken: bool) -> None:
        if self.upstream is not None:
            if broken:
                self.upstream.broke(self._path.clock.time())
            else:
                self.upstream.succeeded()

    def _upstream_failed(self, error: GatewayError) -> None:
        self._judge(broken=True)
        self.fail(error)

    def fail(self, error: GatewayError) -> None:
        """End with an error of our own: an answer, an event in a stream, or, where neither is possible, a cut."""
        if self._state is _ENDED:
            return
        self._drop_connection()
        client = self._client
        if not self._started:
            content = error.envelope(self.request_id)
            self.status = error.status
            self.bytes_out = len(content)
            self._finish(error.outcome)
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
            client.start(error.status, [*headers, *error.headers, (b"x-request-id", self.request_id.encode())])
            client.body(content)
            client.end()
        elif self._sse and not self._cut_event:
            self._finish(error.outcome)
            client.body(error.event(self.request_id))
            client.end()
        else:
            self._finish(error.outcome)
            client.abort()

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.discard()

    def _finish(self, outcome: str) -> None:
        self._state = _ENDED
        self._on_body = None
        self.outcome = outcome
        self.ended_at = self._path.clock.time()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.upstream is not None:
            self.upstream.in_flight -= 1
        self.usage = usage_in(self._before_last + self._last)
        self._path.observer.finished(self)
