"""Stand-ins for everything around an exchange: they record what it does, and hold it to its contract as it acts."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from gateway.admission.admission_queue import AdmissionQueue
from gateway.admission.arrivals import Arrivals
from gateway.admission.buffers import Buffers
from gateway.admission.owners import Owner, Owners
from gateway.admission.work_in_steps import WorkInSteps
from gateway.dialects.body_limits import BodyLimits
from gateway.dialects.reader import BodyReader
from gateway.pool.aliases import Alias, from_words
from gateway.pool.upstream_pool import Upstream, UpstreamPool
from gateway.relay.buffered_call import BufferedCall
from gateway.relay.data_path import CallLimits, DataPath, Drain
from gateway.relay.exchange import HELD_EVENT, Exchange
from gateway.relay.interfaces import Caller
from gateway.relay.record import Record
from gateway.relay.upload import Upload
from gateway.upstream.credentials import FixedKey
from gateway.wire.errors import GatewayError
from gateway.wire.heads import AnswerHead, Header, HeadLimits, RequestHead, answer_head
from gateway.wire.routes import ROUTES, Route

_BY_PATH = {route.path: route for route in ROUTES}
CHAT, COMPLETIONS, MODELS = (_BY_PATH[f"/v1/{path}"] for path in ("chat/completions", "completions", "models"))
RESPONSES, MESSAGES = _BY_PATH["/v1/responses"], _BY_PATH["/v1/messages"]
GENERATE, ASK = _BY_PATH["/generate"], _BY_PATH["/api/v1/ask"]
TRANSCRIPTIONS = _BY_PATH["/v1/audio/transcriptions"]
# No limit is a multiple of another, so that none is kept by chance.
LIMITS = CallLimits(
    max_connections=1000,
    max_body_bytes=100_000,
    queue_timeout=7,
    first_token_timeout=32,
    idle_timeout=5,
    total_timeout=103,
    header_timeout=13,
    body_timeout=11,
    client_write_timeout=17,
)


# How often the exchanges are looked at, in seconds; a binary fraction, so that sums are exact.
TICK = 0.0625


class FakeClock:
    """Time that passes only when a test says so, and the timers that run meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._waiting: list[tuple[float, int, FakeTimer]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        assert delay >= 0
        timer = FakeTimer(callback)
        heapq.heappush(self._waiting, (self.now + delay, next(self._numbers), timer))
        return timer

    @property
    def timers(self) -> list[FakeTimer]:
        """Those that would still run."""
        return [timer for _, _, timer in self._waiting if timer.callback is not None]

    def advance(self, seconds: float) -> None:
        """Let time pass; each timer runs when it is due."""
        end = self.now + seconds
        while self._waiting and self._waiting[0][0] <= end:
            due, _, timer = heapq.heappop(self._waiting)
            self.now = max(self.now, due)
            timer.run()
        self.now = end


class FakeTimer:
    """One timer of the clock."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None

    def run(self) -> None:
        callback, self.callback = self.callback, None
        if callback is not None:
            callback()


class ClientRecorder:
    """The client: what it got. `during_body` is called inside each `body`, as a write may call back at once."""

    address = "192.0.2.1"
    chunk: Callable[[bytes], None] | None = None

    def __init__(self) -> None:
        self.owner = Owner()
        self.status = 0
        self.headers: list[Header] = []
        self.pieces: list[bytes] = []
        self.ending = ""
        self.gone = False
        self._waits = False
        self.during_body: Callable[[], None] | None = None

    def start(self, head: AnswerHead, length: bytes | None, request_id: str) -> None:
        assert not self.status, "the answer started twice"
        self._still_there()
        self.status, self.headers = head.status, head.headers[:]
        if length is not None:
            self.headers.append((b"content-length", length))
        self.headers.append((b"x-request-id", request_id.encode()))

    def body(self, data: bytes) -> None:
        assert self.status, "a body before the head"
        assert data, "an empty piece, which is the end of a chunked body"
        self._still_there()
        self.pieces.append(data)
        if self.during_body is not None:
            self.during_body()

    def end(self) -> None:
        assert self.status, "an end before the head"
        self._still_there()
        self.ending = "end"

    def whole(self, head: AnswerHead, content: bytes, request_id: str) -> None:
        self.start(head, b"%d" % len(content), request_id)
        if content:
            self.body(content)
        if not self.gone:
            self.end()

    def abort(self) -> None:
        self._still_there()
        self.ending = "abort"

    def pause(self) -> None:
        self._still_there()
        self._waits = True

    def resume(self) -> None:
        self._still_there()
        self._waits = False

    def waits(self) -> bool:
        """Whether it was told to send no more."""
        return self._waits

    def is_gone(self) -> bool:
        """Whether it has left, or was cut off."""
        return self.gone or self.ending == "abort"

    def _still_there(self) -> None:
        assert not self.ending, f"something after the {self.ending}"
        assert not self.gone, "something for a client that has gone"

    @property
    def content(self) -> bytes:
        """The body so far."""
        return b"".join(self.pieces)

    @property
    def error(self) -> Any:
        """The error object of a whole answer."""
        return orjson.loads(self.content)["error"]

    def header(self, name: bytes) -> bytes | None:
        """A header that may stand there once."""
        values = [value for header, value in self.headers if header == name]
        assert len(values) <= 1, f"{name!r} stands there more than once"
        return values[0] if values else None


class ConnectionRecorder:
    """A connection to an upstream: what was sent, and how it was given back; `pieces` where that may be in pieces.

    `sent_at_once` are those of a large request. `during_send` is called inside each `send`, as a write may call back at
    once.
    """

    def __init__(self, *, reused: bool = False, pieces: bool = False) -> None:
        self.reused = reused
        self.pieces = pieces
        self.during_send: Callable[[], None] | None = None
        self.sent = b""
        self.sent_at_once: tuple[bytes | bytearray, ...] = ()
        self.paused = False
        self.given_back = ""
        self.is_lost = False

    def send(self, request: bytes | bytearray) -> None:
        self._still_lent()
        assert self.pieces or not self.sent, "a second request on one connection"
        self.sent += request
        if self.during_send is not None:
            self.during_send()

    def send_pieces(self, pieces: Iterable[bytes | bytearray]) -> None:
        self.sent_at_once = tuple(pieces)
        self.send(b"".join(self.sent_at_once))

    def pause(self) -> None:
        self._still_lent()
        self.paused = True

    def resume(self) -> None:
        self._still_lent()
        self.paused = False

    def release(self) -> None:
        self._still_lent()
        self.given_back = "released"

    def unsent(self) -> int:
        return 0

    def discard(self) -> None:
        self._still_lent()
        self.given_back = "discarded"

    def _still_lent(self) -> None:
        assert not self.given_back, f"something for a connection that was {self.given_back}"
        assert not self.is_lost, "something for a connection that is lost"

    @property
    def request_line(self) -> bytes:
        """The first line of what was sent."""
        return self.sent.split(b"\r\n", 1)[0]

    @property
    def request_headers(self) -> list[Header]:
        """The headers of what was sent."""
        head = self.sent.split(b"\r\n\r\n", 1)[0]
        pairs = [line.partition(b": ") for line in head.split(b"\r\n")[1:]]
        return [(name, value) for name, _, value in pairs]

    @property
    def request_body(self) -> bytes:
        """The body of what was sent."""
        return self.sent.split(b"\r\n\r\n", 1)[1]


class TransportRecorder:
    """Where connections come from: what was asked for; a test answers."""

    def __init__(self) -> None:
        self.asked: list[tuple[Upstream, bool]] = []

    def connect(self, upstream: Upstream, exchange: Caller, *, fresh: bool) -> None:
        self.asked.append((upstream, fresh))


class CredentialsRecorder:
    """Credentials that can be renewed: what was refused, and who waits for others; a test tells."""

    def __init__(self, value: str | None = "Bearer one") -> None:
        self.value = value
        self.refused: list[str | None] = []
        self._waiting: list[Callable[[GatewayError | None], None]] = []

    def renew(self, refused: str | None, told: Callable[[GatewayError | None], None]) -> bool:
        self.refused.append(refused)
        self._waiting.append(told)
        return True

    def tell(self, error: GatewayError | None = None) -> None:
        """There are others, or none."""
        if error is None:
            self.value = "Bearer two"
        waiting, self._waiting = self._waiting, []
        for told in waiting:
            told(error)


def aliases_of(meant: Mapping[str, str]) -> dict[str, Alias]:
    """Other names of models, each with what stands behind its `=`."""
    words = (f"{name}={models}".split(",") for name, models in meant.items())
    return {name: Alias(name, weights) for one in words for name, weights in from_words(one).items()}


def body_limits(**limits: Any) -> BodyLimits:
    """The settings' defaults, but for these."""
    defaults: dict[str, Any] = {
        "max_n": 128,
        "max_new_tokens": None,
        "max_messages": 2048,
        "max_inputs": 2048,
        "max_json_depth": 1024,
        "max_json_values": 1_000_000,
        "max_json_bytes": 3 * 1024 * 1024,
        "refused_fields": ("kv_transfer_params", "ec_transfer_params", "uuid"),
    }
    return BodyLimits(**{**defaults, **limits})


class Conversation:
    """An exchange among recorders. `settings` are the data path's and its reader's; the upstreams serve `models`."""

    def __init__(
        self,
        *,
        upstreams: int = 1,
        models: tuple[str, ...] = ("demo",),
        route: Route = CHAT,
        query: str = "",
        headers: tuple[Header, ...] = (),
        limits: CallLimits = LIMITS,
        max_in_flight: float = 4,
        max_in_flight_per_upstream: float = 4,
        max_queue: int = 2,
        max_arriving: int = 8,
        max_buffered_bytes: int = 1024**3,
        **settings: Any,
    ) -> None:
        self.upstreams = [Upstream.from_url(f"http://vllm-{number}:8008") for number in range(upstreams)]
        for upstream in self.upstreams:
            upstream.models = models
            upstream.state = "serving" if models else "loading"
        self.others = 0
        self.clock = FakeClock()
        self.client = ClientRecorder()
        self.transport = TransportRecorder()
        self.finished: list[Record] = []
        self.connections: list[ConnectionRecorder] = []
        defaults: dict[str, Any] = {
            "keys": None,
            "salts_caches": False,
            "owners": Owners(),
            "proxies": (),
            "forwarded_headers": frozenset(),
            "head_limits": HeadLimits(8192, 100, 1024),
            "cors_origins": frozenset(),
            "allows_host": None,
            "traced": None,
            "credentials": FixedKey(),
        }
        reading: dict[str, Any] = {
            "body_limits": body_limits(),
            "media_domains": frozenset(),
            "model": None,
            "stream_style": "openai",
            "system_role": "system",
            "disable_streaming": False,
            "connector": "generic",
            "compat": None,
            "forward_sampling": False,
            "model_aliases": {},
            "counts_tokens": False,
            "counts_all": False,
        }
        reading |= {name: settings.pop(name) for name in reading if name in settings}
        reading["model_aliases"] = aliases_of(reading["model_aliases"])
        pool = UpstreamPool(
            tuple(self.upstreams), max_in_flight=max_in_flight, max_in_flight_per_upstream=max_in_flight_per_upstream
        )
        self.buffers = Buffers(max_buffered_bytes)
        self.path = DataPath(
            routes={},
            pool=pool,
            reader=BodyReader(models=pool, **reading),
            transport=self.transport,
            time=self.clock.time,
            call_later=self.clock.call_later,
            in_flight=set(),
            queue=AdmissionQueue(max_queue),
            buffers=self.buffers,
            arrivals=Arrivals(max_arriving, self.buffers, self.clock.time),
            work=WorkInSteps(self.clock.call_later, self.clock.time),
            drain=Drain(),
            finished=self._finish,
            limits=limits,
            **{**defaults, **settings},
        )
        self.request_head = RequestHead(list(headers))
        kind = Upload if route.body == "upload" else BufferedCall
        self.exchange = kind(self.path, self.client, route, route.path + query, self.request_head)
        self._look()

    def crowd(self, others: int) -> None:
        """So many calls of others on each upstream, from now on."""
        for upstream in self.upstreams:
            upstream.in_flight += others - self.others
        self.others = others

    def _look(self) -> None:
        for call in self.path.overdue():
            call.check_timeouts()
        self.clock.call_later(TICK, self._look)

    def _finish(self, record: Record) -> None:
        assert isinstance(record, Exchange)
        assert record not in self.path.in_flight, "in flight after its end"
        assert record not in self.finished, "finished twice"
        self.finished.append(record)

    def begin(self) -> None:
        """The client sends its request's head."""
        self.exchange.begin(self.request_head.length)
        assert self.client.ending or self.path.in_flight == {self.exchange}

    def head(self, status: int, headers: list[Header]) -> None:
        """The upstream sends its answer's head."""
        self.exchange.upstream_head(*answer_head(status, headers))

    def ask(self, body: object) -> None:
        """The client sends its whole request; what is not bytes goes as JSON."""
        self.begin()
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        if content:
            self.exchange.request_body(content)
        self.exchange.request_end()

    def connect(self, *, reused: bool = False, during_send: Callable[[], None] | None = None) -> ConnectionRecorder:
        """A connection is there."""
        pieces = self.exchange.route.body == "upload" or self.buffers.held > HELD_EVENT
        connection = ConnectionRecorder(reused=reused, pieces=pieces)
        connection.during_send = during_send
        self.connections.append(connection)
        self.exchange.upstream_connected(connection)
        return connection

    def lose(self, *, answered: bool, why: str = "it closed the connection") -> None:
        """The newest connection breaks."""
        self.connections[-1].is_lost = True
        self.exchange.upstream_lost(why, answered=answered)

    def leave(self) -> None:
        """The client goes."""
        self.client.gone = True
        self.exchange.client_gone()

    def assert_settled(self) -> None:
        """Nothing is left of the exchange, whatever happened."""
        assert self.client.ending or self.client.gone
        assert self.exchange.outcome
        assert self.finished == [self.exchange]
        assert not self.path.in_flight
        assert not self.path.queue
        assert not self.path.arrivals
        assert self.buffers.held == 0
        assert [upstream.in_flight for upstream in self.upstreams] == [self.others] * len(self.upstreams)
        assert all(connection.given_back or connection.is_lost for connection in self.connections)
