"""The objects that all calls of one gateway share: routes, limits, upstreams and observers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gateway.admission.admission_queue import AdmissionQueue
from gateway.admission.arrivals import Arrivals
from gateway.admission.buffers import Buffers
from gateway.admission.keys import Keys
from gateway.admission.owners import Owners
from gateway.admission.work_in_steps import WorkInSteps
from gateway.dialects.reader import BodyReader
from gateway.pool.upstream_pool import UpstreamPool
from gateway.relay.interfaces import Call, Credentials, Transport
from gateway.relay.record import Record
from gateway.wire.client_address import Network
from gateway.wire.heads import HeadLimits
from gateway.wire.routes import Route


@dataclass(frozen=True, slots=True)
class CallLimits:
    """The limits of calls in bytes and seconds, by the settings' names.

    `max_connections` is the most clients at once. With a `heartbeat_interval` of None there are no heartbeats.
    """

    max_connections: int | float
    max_body_bytes: int
    queue_timeout: float
    first_token_timeout: float
    idle_timeout: float
    total_timeout: float
    header_timeout: float
    body_timeout: float
    client_write_timeout: float
    heartbeat_interval: float | None = None


@dataclass(slots=True)
class Drain:
    """The gateway's shutdown: `began` once no new calls are expected; calls that still run at `ends_at` are ended."""

    began: bool = False
    ends_at: float = math.inf


@dataclass(frozen=True, slots=True)
class DataPath:
    """The objects that all exchanges of one gateway share.

    `routes` are the routes with a fixed path, by method and path. `time` returns monotonic seconds, and `call_later`
    calls back after so many seconds. `finished` is called with each call at its end. `in_flight` holds the calls that
    have begun and not ended, and `arrivals` those of them that have not arrived completely. `buffers` counts the bytes
    that all calls hold, and `work` runs long work in steps. `keys` are the keys that clients must send, None if anyone
    may call; `salts_caches` says that each key has its own part of vLLM's prefix cache. `owners` are the owners of
    calls by address. `proxies` are the networks of proxies that are trusted to name the client. `credentials` are the
    credentials for the upstreams. `cors_origins` are the origins whose pages may call; the application handles CORS.
    `allows_host` says whether a Host names this gateway, None if any does. `forwarded_headers` are request headers that
    are forwarded although vLLM obeys them. `traced` adds the headers of a call's trace to the lines of the upstream's
    request, None if nothing is traced. `tells_route` adds headers with the upstream and the model to answers.
    """

    routes: dict[tuple[bytes, bytes], Route]
    pool: UpstreamPool
    reader: BodyReader
    transport: Transport
    time: Callable[[], float]
    call_later: Callable[[float, Callable[[], None]], object]
    in_flight: set[Call]
    queue: AdmissionQueue[Call]
    buffers: Buffers
    arrivals: Arrivals[Call]
    work: WorkInSteps
    drain: Drain
    finished: Callable[[Record], None]
    limits: CallLimits
    head_limits: HeadLimits
    keys: Keys | None
    salts_caches: bool
    owners: Owners
    proxies: tuple[Network, ...]
    credentials: Credentials
    cors_origins: frozenset[bytes]
    allows_host: Callable[[bytes], object] | None
    forwarded_headers: frozenset[bytes]
    traced: Callable[[Record, bytes], bytes] | None
    tells_route: bool = False

    def overdue(self) -> list[Call]:
        """The calls whose time limits may have passed.

        Polled by the periodic work: one timer per request would cost more than parsing its headers.
        """
        now = self.time()
        if now >= self.drain.ends_at:
            return [*self.queue, *self.in_flight]  # queued calls first, or they would take the places of the others
        return [call for call in self.in_flight if call.deadline <= now]
