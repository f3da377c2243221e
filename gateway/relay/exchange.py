"""One data-path request's life: a state machine that does no I/O of its own.

Events come in as method calls, in any order that a network can bring about: the request's body
and end, the upstream connected or not, its head, body, end or loss, the client paused, resumed or
gone, the timer. Actions go out as direct calls on three small interfaces, `Client`, `Connection` and `Transport`.
State is changed first and acted on last, as an action may call back at once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import getrandbits
from typing import Any, ClassVar, Literal

from gateway.dialects import erag, media_urls, prompts, simplified
from gateway.dialects.body_limits import Bounds
from gateway.dialects.json_body import LONG_BODY, kind_of, to_object, without_long_strings
from gateway.dialects.langchain import Flattened
from gateway.dialects.text_stream import Style
from gateway.pool.admission_queue import Waiting
from gateway.pool.keys import Key, Keys
from gateway.pool.upstream_pool import Upstream, UpstreamPool
from gateway.relay.interfaces import Client, Connection, Credentials, Trace, TranslatedStream, Translation, Transport
from gateway.relay.usage import usage_in, usage_text
from gateway.wire import sse
from gateway.wire.errors import (
    BadRequest,
    Draining,
    GatewayError,
    ModelNotFound,
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
    UpstreamUnauthorized,
    UpstreamUnreachable,
)
from gateway.wire.heads import AnswerHead, HeadLimits, RequestHead
from gateway.wire.routes import Route

# An unfinished event is held back up to this size, so that an error event starts on a boundary.
HELD_EVENT = 64 * 1024
# What is kept of one that is larger: its first line names it.
_EVENT_NAME = 64
# A whole answer that has to be rewritten is collected up to this size.
COLLECTED = 64 * 1024 * 1024
# The slowest that a body may come, in bytes a second, past its time limit.
_BODY_RATE = 1024
# A reused connection that closes this soon after a request was already closing when it was sent.
STALE_WITHIN = 0.1

CLIENT_LEFT = 499  # as nginx logs it; never sent

LIMIT_HEADERS = ("x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests")
KEY_NEEDED = "A key is needed: send it as Authorization: Bearer KEY, or as x-api-key."
NO_TOKEN = "The gateway has no token for the model server yet: try again soon."
FAILED = "The gateway failed; its log says why under this request id."


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest body in bytes, most requests at once, and the time limits in seconds."""

    max_body: int
    max_requests: float
    queue: float
    first_token: float
    idle: float
    total: float
    header: float
    body: float
    client_write: float


@dataclass(slots=True)
class Drain:
    """The gateway's end: `began` once no more is to come, and what still runs at `ends_at` is ended."""

    began: bool = False
    ends_at: float = math.inf


@dataclass(frozen=True, slots=True)
class DataPath:
    """What all exchanges of one gateway share.

    `routes` are those whose path is fixed, by method and path. `time` gives monotonic seconds. `finished`
    is called with each exchange at its end. `in_flight` holds those that have begun and not ended. `keys`
    are those that clients must bring, None where anyone may call.
    `credentials` are what the upstreams are shown. `cross_origin` says that pages of other origins may
    call, which the application sees to. `traced` puts what names an exchange's trace among the lines of the head that
    goes upstream, None where nothing is traced.
    """

    routes: dict[tuple[bytes, bytes], Route]
    pool: UpstreamPool
    transport: Transport
    time: Callable[[], float]
    in_flight: set[Exchange]
    waiting: Waiting[Exchange]
    drain: Drain
    finished: Callable[[Exchange], None]
    limits: Limits
    head_limits: HeadLimits
    bounds: Bounds
    media_domains: frozenset[str]
    keys: Keys | None
    model: str | None
    style: Style
    system_role: Literal["system", "merge"]
    whole: bool
    flattens: bool
    release: erag.Release | None
    credentials: Credentials
    cross_origin: bool
    traced: Callable[[Exchange, bytes], bytes] | None

    def due(self) -> list[Exchange]:
        """The exchanges whose time limits are to be looked at, as one may have passed.

        To be asked for again and again: a timer of its own would cost a request more than its headers do.
        """
        now = self.time()
        if now >= self.drain.ends_at:
            return [*self.waiting, *self.in_flight]  # those first, lest they take the places of the others
        return [exchange for exchange in self.in_flight if exchange.due <= now]


# An exchange's state. No Enum: its members cost as much to look up as a call.
_RECEIVING = 0  # the request comes in
_QUEUED = 1  # there is no room upstream
_CONNECTING = 2  # a connection is awaited
_WAITING = 3  # the request is sent, no answer yet
_RENEWING = 4  # the upstream has refused what it was shown, and something else is awaited
_ANSWERING = 5  # the answer's head is there
_ENDED = 6

# What happens to the answer's body.
_RELAYED = 0  # piece by piece, as it comes
_IN_EVENTS = 1  # in whole events
_COLLECTED = 2  # rewritten at its end

_LINE_FEED = ord("\n")
_JSON = (b"content-type", b"application/json")
_REPLY = AnswerHead(200, [_JSON])


def new_request_id() -> str:
    """Unique, but no secret."""
    return getrandbits(128).to_bytes(16).hex()


class Exchange:
    """One request and its answer. Attributes without an underscore are for observers to read.

    Times are the clock's seconds, None for what has not happened. `form` is `simplified`, `openai`
    or, where it is not known, empty. `target` is what the upstream is asked for. `trace` is there once something
    traces it. `outcome` is `done`, `client_left`, `refused`,
    `upstream_error`, `drained` or `timeout:<which>`. No limit can have passed before `due`.
    """

    __slots__ = (
        "_before_last",
        "_begun_at",
        "_client",
        "_connection",
        "_content",
        "_cut_event",
        "_cut_head",
        "_head",
        "_held",
        "_last",
        "_last_read_at",
        "_length",
        "_path",
        "_paused",
        "_pieces",
        "_refusal",
        "_renewed",
        "_request",
        "_retried",
        "_shown",
        "_size",
        "_sse",
        "_started",
        "_state",
        "_stream",
        "_translated",
        "_usage",
        "_usage_text",
        "_way",
        "_write_chunk",
        "bytes_out",
        "due",
        "ended_at",
        "events",
        "first_byte_at",
        "form",
        "key",
        "model",
        "outcome",
        "received_at",
        "request_id",
        "route",
        "sent_at",
        "started_at",
        "status",
        "streaming",
        "target",
        "trace",
        "upstream",
        "upstream_ended_at",
    )

    # Whether an upstream is needed that takes speech.
    _hears: ClassVar[bool] = False

    def __init__(self, path: DataPath, client: Client, route: Route, target: str, head: RequestHead) -> None:
        started_at = path.time()
        self.route = route
        self.target = target
        self.trace: Trace | None = None
        self.request_id = head.request_id or new_request_id()
        self.form = ""
        self.key: Key | None = None
        self.model: str | None = None
        self.upstream: Upstream | None = None
        self.status = 0
        self.streaming = False
        self.outcome = ""
        self.events = 0
        self.bytes_out = 0
        self.started_at = started_at
        self.received_at: float | None = None
        self.sent_at: float | None = None
        self.first_byte_at: float | None = None
        self.upstream_ended_at: float | None = None
        self.ended_at: float | None = None
        self.due = started_at
        self._path = path
        self._client = client
        self._request = head
        self._head: AnswerHead | None = None
        self._length: bytes | None = None
        self._state = _RECEIVING
        self._pieces: list[bytes] = []
        self._size = 0
        self._content = b""
        self._translated: Translation | None = None
        self._connection: Connection | None = None
        self._retried = False
        self._shown: str | None = None
        self._renewed = False
        self._refusal: bytes | None = None
        self._started = False
        self._paused = False
        self._sse = False
        self._way = _RELAYED
        self._write_chunk: Callable[[bytes], None] | None = None
        self._stream: TranslatedStream | None = None
        self._held = b""
        self._cut_event = False
        self._cut_head = b""
        self._last = b""
        self._before_last = b""
        self._begun_at = started_at  # upstream
        self._last_read_at = started_at
        self._usage: tuple[int, int] | None = None
        self._usage_text = b""

    @property
    def usage(self) -> tuple[int, int] | None:
        """Prompt and completion tokens, where vLLM has reported them."""
        if self._usage_text:
            self._usage = usage_in(self._usage_text)
            self._usage_text = b""
        return self._usage

    @property
    def lines(self) -> bytes:
        """The headers of the request that may go to an upstream."""
        return self._request.lines

    # The request

    def begin(self, length: int) -> None:
        """The request's head is there, and its body so long, as far as it is known."""
        path = self._path
        limits = path.limits
        path.in_flight.add(self)
        self.due = self.started_at + (limits.body if limits.body < limits.total else limits.total)
        if path.keys is not None and (refusal := self._refusal_of(path.keys)):
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
        elif length > limits.max_body:
            self.fail(self._too_large())
        elif len(path.in_flight) > limits.max_requests:
            self.fail(TooMany("Too many requests run and wait already: try again soon."))
        elif path.credentials.value is None:
            self.fail(NoneReady(NO_TOKEN))

    def _refusal_of(self, keys: Keys) -> GatewayError | None:
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

    def request_body(self, data: bytes) -> None:
        """A piece of the request's body."""
        if self._state is not _RECEIVING:
            return
        self._last_read_at = self._path.time()
        self._size += len(data)
        if self._size > self._path.limits.max_body:
            self.fail(self._too_large())
        else:
            self._pieces.append(data)

    def request_end(self) -> None:
        """The request is complete."""
        if self._state is _RECEIVING:
            content = b"".join(self._pieces)
            self._pieces = []
            self._pass_on(content, self._path.time())

    def request(self, content: bytes) -> None:
        """The whole request is there."""
        self.begin(len(content))
        if self._state is _RECEIVING:
            self._pass_on(content, self.started_at)

    def _pass_on(self, content: bytes, now: float) -> None:
        self.received_at = now
        try:
            self._content = self._to_upstream_body(content)
        except GatewayError as error:
            self.fail(error)
        else:
            if not self._begins(now):
                self._wait(now)

    def _wait(self, now: float) -> None:
        self._state = _QUEUED
        path = self._path
        if path.waiting.add(self):
            self.due = min(now + path.limits.queue, self.started_at + path.limits.total)
        else:
            self.fail(TooMany(f"There is no room, and {path.waiting.most} requests wait already: try again soon."))

    def room(self) -> bool:
        """There may be room upstream; True if it was taken."""
        return self._state is not _QUEUED or self._begins(self._path.time())

    def _begins(self, now: float) -> bool:
        path = self._path
        upstream = path.pool.choose(self.model, now, hears=self._hears)
        if upstream is None:
            return False
        if self._state is _QUEUED:
            path.waiting.leave(self)
        self._begun_at = now
        self.due = self._next_limit(now) if self.streaming else self.started_at + path.limits.total
        self._connect(upstream, fresh=False)
        return True

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"The request's body must be at most {self._path.limits.max_body} bytes (GATEWAY_MAX_BODY_BYTES)."
        )

    def _to_upstream_body(self, content: bytes) -> bytes:
        """What goes to the upstream: the bytes that came, or, for the simplified form, a chat call."""
        kind = self.route.body
        if kind == "none":
            return b""
        if len(content) >= LONG_BODY:
            # What cannot be told so is told by the whole of it.
            with contextlib.suppress(BadRequest):
                if self._goes_as_it_came(to_object(without_long_strings(content))) and self.model != "":
                    return content
        body = to_object(content)
        if self._goes_as_it_came(body):
            return content
        path = self._path
        if kind == "generate":
            return self._translate(prompts.from_generate(body, whole=path.whole), kind)
        if kind == "ask":
            return self._translate(prompts.from_ask(body, self._most_tokens), kind)
        request = simplified.from_body(
            body, path.style, path.system_role, whole=path.whole, most_tokens=path.bounds.tokens
        )
        translation: simplified.Simplified | Flattened = Flattened(request) if path.flattens else request
        if path.release:
            return self._translate(erag.Released(translation, path.release), "simplified")
        return self._translate(translation, "simplified")

    def _goes_as_it_came(self, body: dict[str, Any]) -> bool:
        """Whether it is in the form that the upstream takes; raises BadRequest for what it must not have."""
        kind = self.route.body
        self._path.bounds.check(body)
        if kind in ("generate", "ask"):
            return False
        if kind == "chat":
            media_urls.check_chat(body, self._path.media_domains)
            if simplified.is_simplified(body):
                return False
            if not isinstance(body.get("messages"), list):
                raise BadRequest(
                    "messages must be an object with system and user, a string, or OpenAI's array of messages, but "
                    f"it is {kind_of(body.get('messages'))}.",
                    param="messages",
                )
        else:
            media_urls.check_any(body, self._path.media_domains)
        self.form = "openai"
        self.streaming = body.get("stream") is True
        model = body.get("model")
        self.model = model if isinstance(model, str) else None
        return True

    def _most_tokens(self, model: str) -> float:
        return min(self._path.pool.context(model), self._path.bounds.tokens)

    def _translate(self, request: Translation, form: str) -> bytes:
        self.form = form
        path = self._path
        self._translated = request
        self.target = request.target
        self.streaming = request.streaming
        model, served = request.model or path.model, path.pool.models
        if model is None:
            if not served:
                raise NoneReady("No model server has answered yet: it may still be loading. Try again soon.")
            model = served[0]
        elif served and model not in served:
            raise ModelNotFound(f"The model {model[:200]!r} is not served; served: {', '.join(served)}.", param="model")
        self.model = model
        return request.to_call(model)

    # The upstream

    def _connect(self, upstream: Upstream, *, fresh: bool) -> None:
        """Ask for a connection to this upstream, the request's second one if there was one before."""
        self._state = _CONNECTING
        before = self.upstream
        if upstream is not before:
            self.upstream = upstream
            upstream.in_flight += 1
            if before is not None:
                before.in_flight -= 1
        self._path.transport.connect(upstream, self, fresh=fresh)
        if before is not None and upstream is not before and self._path.waiting:
            self._path.waiting.room()

    def _ask_another(self, *, ready: bool) -> bool:
        """Whether another upstream is asked in the place of this one, which did not begin; once a request."""
        upstream = self.upstream
        assert upstream is not None
        if self._retried:
            return False
        other = self._path.pool.another(
            self.model, self._path.time(), instead_of=upstream, ready=ready, hears=self._hears
        )
        if other is None:
            return False
        self._retried = True
        self._connect(other, fresh=False)
        return True

    def upstream_connected(self, connection: Connection) -> None:
        """A connection is there; one that comes too late goes to the idle ones."""
        if self._state is not _CONNECTING:
            connection.release()
            return
        self._shown = self._path.credentials.value
        if self._shown is None:  # it has run out since this began
            connection.release()
            self.fail(NoneReady(NO_TOKEN))
            return
        self._state = _WAITING
        self._connection = connection
        self.sent_at = self._path.time()
        if self._paused:
            connection.pause()
        connection.send(self._to_upstream())

    def _to_upstream(self) -> bytes:
        """The whole request as it goes out."""
        route, upstream, content, request = self.route, self.upstream, self._content, self._request
        assert upstream is not None
        head = (
            f"{route.method} {upstream.prefix}{self.target} HTTP/1.1\r\n"
            f"host: {upstream.authority}\r\nx-request-id: {self.request_id}\r\n"
        )
        if route.method == "POST":
            head += f"content-length: {len(content)}\r\n"
            if not request.json:
                head += "content-type: application/json\r\n"
        if self._shown:
            head += f"authorization: {self._shown}\r\n"
        lines = request.lines if self._translated is None else request.lines_rewritten
        traced = self._path.traced
        if traced is not None:
            lines = traced(self, lines)
        return b"".join((head.encode("latin-1"), lines, b"\r\n", content))

    def upstream_unreachable(self, why: str, *, timed_out: float | None = None) -> None:
        """No connection: `why`, or the limit in seconds that passed."""
        if self._state is not _CONNECTING:
            return
        upstream = self.upstream
        assert upstream is not None
        upstream.broke(self._path.time())
        if self._ask_another(ready=False):
            return
        if self._refusal is not None:
            self.fail(NoneReady("No model server takes requests now: try again later.", retry_after=self._refusal))
        elif timed_out is not None:
            self.fail(UpstreamTimeout("connect", timed_out))
        elif not upstream.ever_served:
            self.fail(NoneReady("The model server is not up yet: it may still be loading. Try again soon."))
        else:
            self.fail(UpstreamUnreachable(f"The model server cannot be reached: {why}."))

    def upstream_head(self, head: AnswerHead, length: bytes | None) -> None:
        """The head of the answer; it goes out with the first byte of the body."""
        if self._state is not _WAITING or (head.status >= 400 and self._tried_again(head)):
            return
        self._state = _ANSWERING
        self._content = b""
        self.status = head.status
        self._head = head
        rewritten = self._translated if head.status == 200 else None
        if head.streams and rewritten is not None and not rewritten.streaming:
            self._upstream_failed(UpstreamBroken("The model server streams an answer that was to be whole."))
        elif head.streams:
            if self.route.body in ("none", "upload"):  # a stream is asked for in the query, or in a form's field
                self.streaming = True
                self.due = self._next_limit(self._last_read_at)
            # An error event may have to be added, so no length can be promised.
            self._sse = True
            self._way = _IN_EVENTS
            if rewritten is not None and (stream := rewritten.to_stream()):
                self._stream = stream
                self._head = stream.head
        elif rewritten is not None or self._tells_as_released():
            self._way = _COLLECTED
            self._size = 0
        else:
            self._length = length

    def _tried_again(self, refusal: AnswerHead) -> bool:
        """Whether what the upstream says before it has begun is not the answer."""
        if refusal.status == 401:
            return self._shown_anew()
        return refusal.status == 503 and self._taken_over(refusal)

    def _shown_anew(self) -> bool:
        """Whether the upstream may be shown something else: what it says of ours is no client's to see."""
        connection, self._connection = self._connection, None
        if self._renewed:
            self._upstream_failed(UpstreamUnauthorized())
        else:
            self._state = _RENEWING
            if not self._path.credentials.renew(self._shown, self.credentials_renewed):
                self._state, self._connection = _WAITING, connection
                return False
        if connection is not None:
            connection.discard()  # what else it says of it
        return True

    def credentials_renewed(self, error: GatewayError | None) -> None:
        """There is something else to show, unless there is an error; once a request."""
        if self._state is not _RENEWING:
            return
        if error is not None:
            self._upstream_failed(error)
            return
        assert self.upstream is not None
        self._renewed = True
        self._connect(self.upstream, fresh=False)

    def _taken_over(self, refusal: AnswerHead) -> bool:
        """Whether another upstream, that is ready, takes what this one refuses before it has begun."""
        upstream = self.upstream
        connection, self._connection = self._connection, None
        if self._ask_another(ready=True):
            assert upstream is not None
            upstream.broke(self._path.time())
            self._refusal = dict(refusal.headers).get(b"retry-after", b"2")
            if connection is not None:
                connection.discard()  # what else it says of it
            return True
        self._connection = connection
        return False

    def upstream_body(self, data: bytes) -> None:
        """What one read brought of the answer's body."""
        if self._state is not _ANSWERING:
            return
        self._last_read_at = self._path.time()
        if self.first_byte_at is None:
            self.first_byte_at = self._last_read_at
        if self._way is _IN_EVENTS:
            if self._held or self._cut_event or data[-2:] != b"\n\n":
                data = self._in_whole_events(data)
                if not data:
                    return
            self.events += data.count(b"\n\n")
        elif self._way is _COLLECTED:
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
        if self._way is _IN_EVENTS and self._stream is None:
            self._write_chunk = self._client.chunk

    def upstream_chunk(self, chunk: bytes, size: int) -> None:
        """What one read brought, where that was one HTTP chunk of `size` bytes that ends in a blank line.

        That is how most events come; they cost least by going on as they are.
        """
        write = self._write_chunk
        if write is None or self._held or self._cut_event:
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
        if self._state is not _ANSWERING:
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
        return self._sse and self.status == 200 and not self._has_end(self._before_last + self._last + self._held)

    def _has_end(self, tail: bytes) -> bool:
        """Whether the stream's end is in its last bytes; an end that is too large to be held began before them."""
        return sse.has_end(self._cut_head + tail, self.route.ends)

    def upstream_answer(self, head: AnswerHead, content: bytes) -> None:
        """The whole answer is there, at once."""
        if head.streams:
            self.upstream_head(head, None)
            if content:
                self.upstream_body(content)
            self.upstream_end()
        elif self._state is _WAITING:
            if head.status >= 400 and self._tried_again(head):
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
        if self._state not in (_WAITING, _ANSWERING):
            return
        connection, self._connection = self._connection, None
        now = self._path.time()
        stale = (
            connection is not None
            and connection.reused
            and not answered
            and self.sent_at is not None
            and now - self.sent_at <= STALE_WITHIN
        )
        if stale and not self._retried:
            self._retried = True
            assert self.upstream is not None
            self._connect(self.upstream, fresh=True)
        else:
            self._upstream_failed(UpstreamBroken(f"The model server broke off: {why}."))

    # The answer

    def _in_whole_events(self, data: bytes) -> bytes:
        """What can be sent; the beginning of an event waits for its end, unless it is too large to be held back."""
        if self._held:
            data = self._held + data
            self._held = b""
        end = sse.end_of_last_event(data)
        if len(data) - end > HELD_EVENT:
            if end or not self._cut_event:
                self._cut_head = data[end : end + _EVENT_NAME]
            self._cut_event = True
            return data
        self._held = data[end:]
        self._cut_event = self._cut_event and not end
        return data[:end]

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
        self._pieces.append(data)
        self._size += len(data)
        if self._size > COLLECTED:
            self._upstream_failed(UpstreamBroken(f"The model server's answer is larger than {COLLECTED} bytes."))

    def _complete(self) -> None:
        if self._way is _COLLECTED:
            assert self._head is not None
            self._answer(self._head, b"".join(self._pieces))
            return
        failed = self.status >= 500
        if self._sse:
            if self._held and (self.status != 200 or self._has_end(self._held)):
                # The last event lacks its blank line, but nothing else.
                self._way = _RELAYED
                self.upstream_body(self._held if self._stream is None else self._held + b"\n\n")
            end = self._before_last + self._last
            if self._lacks_end():
                end_name = sse.END_NAMES[self.route.ends]
                self._upstream_failed(UpstreamBroken(f"The model server ended its stream without {end_name}."))
            failed = failed or sse.has_error(end)
        if self._state is _ENDED:  # the client has left while it was written to, or what it got was an error
            return
        client = self._client
        if not self._started:
            self._start()
        self._answered(failed=failed)
        client.end()

    def _answer(self, head: AnswerHead, content: bytes) -> None:
        """Answer with all of it at once, in the simplified form where that was asked for."""
        self._last = content
        if self._translated is not None and head.status == 200:
            try:
                head, content = _REPLY, self._translated.to_reply(content)
            except GatewayError as error:
                self._upstream_failed(error)
                return
        elif head.status >= 400 and self._tells_as_released():
            rest = [header for header in head.headers if header[0] != b"content-type"]
            head, content = AnswerHead(head.status, [_JSON, *rest]), erag.to_error(content)
        self.bytes_out = len(content)
        if self.key is not None:
            head = self._with_limits(head, self.key)
        self._answered(failed=head.status >= 500)
        self._client.whole(head, content, self.request_id)

    def _answered(self, *, failed: bool) -> None:
        upstream = self.upstream
        assert upstream is not None
        if failed:
            upstream.broke(self._path.time())
            self._finish("upstream_error")
        else:
            if upstream.broken_in_a_row:
                upstream.succeeded()
            self._finish("done")

    def upstream_paused(self) -> None:
        """The upstream takes a request more slowly than it was written, which is of interest where more is to come."""

    def upstream_resumed(self) -> None:
        """It has caught up."""

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
        if self._state is _ENDED:
            return
        self._drop_connection()
        if not self._started:
            self.status = CLIENT_LEFT
        self._finish(outcome)

    # Time

    def look_at_limits(self) -> None:
        """End with what is due if a limit has passed, or set `due` to when one may."""
        if self._state is _ENDED:
            return
        now = self._path.time()
        limits = self._path.limits
        if now >= self._path.drain.ends_at:
            self.fail(Draining("The gateway ends, and the time for what was still running is over: try again."))
        elif self._state is _QUEUED and now - self.started_at < limits.total:
            self.fail(TooMany(f"There was no room for {limits.queue:g} s (GATEWAY_QUEUE_TIMEOUT): try again later."))
        elif self._state is _RECEIVING:
            if late_body := self._late_body(now, self.started_at):
                self.fail(late_body)
            else:
                self.due = self._body_due(self.started_at)
        elif now - self.started_at >= limits.total:
            self._took_too_long(now)
        elif self.streaming and (late := self._late(now)):
            self._upstream_failed(late)
        else:
            self.due = self._next_limit(now)

    def _late_body(self, now: float, since: float) -> RequestTimeout | None:
        """What is wrong with the time in which the request's body has come since then."""
        limits = self._path.limits
        if now - self._last_read_at >= limits.body:
            return RequestTimeout(f"The request's body stopped for {limits.body:g} s (GATEWAY_BODY_TIMEOUT).")
        if now - self.started_at >= limits.total:
            return RequestTimeout(f"The request took longer than {limits.total:g} s (GATEWAY_TOTAL_TIMEOUT).")
        if now - since >= limits.body + self._size / _BODY_RATE:
            return RequestTimeout(f"The request's body came more slowly than {_BODY_RATE} bytes a second.")
        return None

    def _body_due(self, since: float) -> float:
        """When `_late_body` may find something."""
        limits = self._path.limits
        slowest = since + limits.body + self._size / _BODY_RATE
        return min(self._last_read_at + limits.body, slowest, self.started_at + limits.total)

    def _took_too_long(self, now: float) -> None:
        limit = self._path.limits.total
        error = UpstreamTimeout("total", limit)
        silent = self.first_byte_at is None or not self.streaming
        if silent and not self._paused and now - self._begun_at >= limit / 2:
            self._upstream_failed(error)
        else:
            self.fail(error)  # a long stream, a slow reader or a slow upload is no fault of the upstream's

    def _late(self, now: float) -> UpstreamTimeout | None:
        limits = self._path.limits
        if self._paused:
            return None
        if self.first_byte_at is None:
            late = now - max(self._begun_at, self._last_read_at) >= limits.first_token
            return UpstreamTimeout("first_token", limits.first_token) if late else None
        late = now - self._last_read_at >= limits.idle
        return UpstreamTimeout("idle", limits.idle) if late else None

    def _next_limit(self, now: float) -> float:
        """When a limit may pass. At most an idle gap from now, so that the first byte need not set it anew."""
        limits = self._path.limits
        end = self.started_at + limits.total
        if not self.streaming:
            return end
        if self._paused:
            return min(end, now + limits.idle)
        if self.first_byte_at is None:
            return min(end, now + limits.idle, max(self._begun_at, self._last_read_at) + limits.first_token)
        return min(end, self._last_read_at + limits.idle)

    # The end

    def _upstream_failed(self, error: GatewayError) -> None:
        silent = self.route.replays and isinstance(error, UpstreamTimeout)
        if self.upstream is not None and not silent:
            self.upstream.broke(self._path.time())
        self.fail(error)

    def fail(self, error: GatewayError) -> None:
        """End with an error of our own: an answer, an event in a stream, or, where neither is possible, a cut."""
        if self._state is _ENDED:
            return
        self._drop_connection()
        client = self._client
        if not self._started:
            if self._tells_as_released():
                content = erag.detail(error.message)
            else:
                content = error.envelope(self.request_id, self.route.ends)
            self.status = error.status
            self.bytes_out = len(content)
            self._finish(error.outcome)
            head = AnswerHead(error.status, [_JSON, *error.headers])
            if self.key is not None:
                head = self._with_limits(head, self.key)
            client.whole(head, content, self.request_id)
        elif self._sse and not self._cut_event:
            tail = self._before_last + self._last
            done = self.status == 200 and self._has_end(tail)  # and so it has all of it
            self._finish(error.outcome)
            if not done:
                client.body(self._event_of(error, tail))
            client.end()
        else:
            self._finish(error.outcome)
            client.abort()

    def _tells_as_released(self) -> bool:
        """Whether an error is told in a release's words: that of a chat call that is not known to be OpenAI's."""
        return self._path.release is not None and self.route.body == "chat" and self.form != "openai"

    def _event_of(self, error: GatewayError, tail: bytes) -> bytes:
        if self._stream is not None:
            return self._stream.failed(error.envelope(self.request_id))
        return error.event(self.request_id, self.route.ends, sse.next_sequence_number(tail))

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.discard()

    def _finish(self, outcome: str) -> None:
        self._state = _ENDED
        self.outcome = outcome
        path = self._path
        self.ended_at = path.time()
        path.in_flight.discard(self)
        if self.upstream is not None:
            self.upstream.in_flight -= 1
        self._usage_text = usage_text(self._before_last + self._last)
        # Whoever counts and logs it may keep it for a while.
        self._content = self._held = self._last = self._before_last = b""
        self._pieces = []
        self._translated = None
        self._write_chunk = None
        path.finished(self)
        if path.waiting:
            path.waiting.leave(self)
            if self.upstream is not None:  # else it makes no room, and refusals must not cost a look at all that wait
                path.waiting.room()
