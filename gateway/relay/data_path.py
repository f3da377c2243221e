"""What all calls of one gateway share: routes, limits, upstreams, and how they are observed."""

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
    """What calls may take, by the settings' names: bytes and seconds.

    `max_connections` is the most clients at once. A `heartbeat_interval` of None: there are no heartbeats.
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
    """The gateway's end: `began` once no more is to come, and what still runs at `ends_at` is ended."""

    began: bool = False
    ends_at: float = math.inf


@dataclass(frozen=True, slots=True)
class DataPath:
    """What all exchanges of one gateway share.

    `routes` are those whose path is fixed, by method and path. `time` gives monotonic seconds, and `call_later` calls
    back so many seconds from now. `finished` is called with each call at its end. `in_flight` holds those that have
    begun and not ended, `arrivals` those of them that have not come whole, and `buffers` what is held of all; `work` is
    what takes long. `keys` are those that clients must bring, None where anyone may call; `salts_caches` says that
    each has its own part of vLLM's prefix cache. `owners` are whose calls are,
    by address. `proxies` are those whose word counts for who calls. `credentials` are what the upstreams are shown.
    `cors_origins` are those whose pages may call, which the application sees to. `allows_host` says whether a Host is
    one to call us by, None where any is. `forwarded_headers` are those of clients that go upstream though vLLM obeys
    them. `traced` puts what names a call's trace among the lines of the head that goes upstream, None where nothing is
    traced. `tells_route` has answers name the upstream and the model that they are of.
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
        """The calls of which a time limit may have passed.

        Polled by the periodic work: one timer per request would cost more than parsing its headers.
        """
        now = self.time()
        if now >= self.drain.ends_at:
            return [*self.queue, *self.in_flight]  # those first, lest they take the places of the others
        return [call for call in self.in_flight if call.deadline <= now]
