"""What all calls of one gateway share: routes, limits, upstreams, and how they are observed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gateway.dialects.reader import BodyReader
from gateway.pool.admission_queue import AdmissionQueue
from gateway.pool.keys import Keys
from gateway.pool.upstream_pool import UpstreamPool
from gateway.relay.interfaces import Call, Credentials, Transport
from gateway.relay.record import Record
from gateway.wire.heads import HeadLimits
from gateway.wire.routes import Route


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one call may take, by the settings' names: bytes and seconds; `max_requests` is the most at once."""

    max_body_bytes: int
    max_requests: float
    queue_timeout: float
    first_token_timeout: float
    idle_timeout: float
    total_timeout: float
    header_timeout: float
    body_timeout: float
    client_write_timeout: float


@dataclass(slots=True)
class Drain:
    """The gateway's end: `began` once no more is to come, and what still runs at `ends_at` is ended."""

    began: bool = False
    ends_at: float = math.inf


@dataclass(frozen=True, slots=True)
class DataPath:
    """What all exchanges of one gateway share.

    `routes` are those whose path is fixed, by method and path. `time` gives monotonic seconds. `finished` is called
    with each call at its end. `in_flight` holds those that have begun and not ended. `keys` are those that clients must
    bring, None where anyone may call. `credentials` are what the upstreams are shown. `cross_origin` says that pages of
    other origins may call, which the application sees to. `traced` puts what names a call's trace among the lines of
    the head that goes upstream, None where nothing is traced.
    """

    routes: dict[tuple[bytes, bytes], Route]
    pool: UpstreamPool
    reader: BodyReader
    transport: Transport
    time: Callable[[], float]
    in_flight: set[Call]
    queue: AdmissionQueue[Call]
    drain: Drain
    finished: Callable[[Record], None]
    limits: CallLimits
    head_limits: HeadLimits
    keys: Keys | None
    credentials: Credentials
    cross_origin: bool
    traced: Callable[[Record, bytes], bytes] | None

    def overdue(self) -> list[Call]:
        """The calls of which a time limit may have passed.

        Polled by the periodic work: one timer per request would cost more than parsing its headers.
        """
        now = self.time()
        if now >= self.drain.ends_at:
            return [*self.queue, *self.in_flight]  # those first, lest they take the places of the others
        return [call for call in self.in_flight if call.deadline <= now]
