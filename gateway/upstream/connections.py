"""The pool of connections to the upstreams: it dials new ones and keeps idle ones for reuse."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from aiohappyeyeballs import start_connection

from gateway.admission.turns import BulkReads
from gateway.pool.upstream_pool import Upstream
from gateway.relay.interfaces import Caller
from gateway.upstream.connect_errors import describe_error
from gateway.upstream.connection import UpstreamConnection
from gateway.upstream.keepalive import end_silent_peers
from gateway.upstream.resolver import Address, Resolver
from gateway.wire.errors import is_shortage

# vLLM closes a connection that was idle for 5 s; a connection about to be closed must not get a request.
IDLE_FOR = 4.0
# The system's receive buffer for an unread response, in bytes; Linux reserves twice as much. One read returns at most
# that, and thousands of streams may each return as much in one loop turn.
_SYSTEM_BUFFER = 64 * 1024
# Seconds until the next of several addresses is tried (RFC 8305, 5).
_NEXT_ADDRESS = 0.25
# Maximum ages and request counts are multiplied by a random factor in this range.
_SPREAD = (0.9, 1.1)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Limits of a connection: time to connect, age, and silence of the peer (`keepalive`), in seconds.

    `max_requests` is the number of requests it may serve. Age and requests are randomized so that connections do not
    all end at once.
    """

    connect_timeout: float
    max_age: float
    max_requests: int
    keepalive: float


class ConnectionPool:
    """Idle connections per upstream, and the dials that make new ones: the exchanges' `Transport`.

    `resolver` resolves hosts, and `tls` says which certificates to trust. The pool uses the event loop that runs when
    it is created.
    """

    def __init__(self, limits: ConnectionLimits, resolver: Resolver, tls: ssl.SSLContext | None = None) -> None:
        self._limits = limits
        self._connect_timeout = limits.connect_timeout
        self._loop = asyncio.get_running_loop()
        self._resolver = resolver
        self._gone = resolver.gone
        resolver.on_gone = self._drop_gone
        self._idle: dict[Upstream, deque[UpstreamConnection]] = {}
        self._dials: set[asyncio.Task[None]] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False
        self._tls = tls
        self.bulk_reads = BulkReads(self._loop.call_soon)

    def connect(self, upstream: Upstream, exchange: Caller, *, fresh: bool) -> None:
        """Give the exchange an idle connection now, or a new one once it is dialled."""
        if not fresh and (idle := self._idle.get(upstream)):
            # The connection used last, because it will live longest; the others stay unused and close.
            connection = idle[-1]
            if connection.idle_since + IDLE_FOR >= self._loop.time():
                idle.pop()
                connection.idle_since = 0.0
                connection.exchange = exchange
                exchange.upstream_connected(connection)
                return
            self._drop_old()
        dial = self._loop.create_task(self._dial(upstream, exchange))
        self._dials.add(dial)
        dial.add_done_callback(partial(self._dialled, exchange))

    async def _dial(self, upstream: Upstream, exchange: Caller) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout):
                connection = await self._open(upstream)
        except TimeoutError:
            exchange.upstream_unreachable("it took no connection", timed_out=self._connect_timeout)
        except (OSError, ssl.CertificateError, UnicodeError) as error:
            if is_shortage(error):
                raise
            exchange.upstream_unreachable(describe_error(error))
        else:
            connection.exchange = exchange
            try:
                exchange.upstream_connected(connection)
            except Exception:
                connection.discard()
                raise

    async def _open(self, upstream: Upstream) -> UpstreamConnection:
        addresses = await self._resolver.addresses(upstream.at, upstream.port)
        connected = await start_connection(
            addresses, happy_eyeballs_delay=_NEXT_ADDRESS, interleave=1, socket_factory=self._socket
        )
        limits = self._limits
        spread = random.uniform(*_SPREAD)
        connection = UpstreamConnection(
            self,
            upstream,
            connected.getpeername()[0],
            self._loop.time() + spread * limits.max_age,
            round(spread * limits.max_requests),
        )
        await self._loop.create_connection(
            lambda: cast(asyncio.Protocol, connection),
            sock=connected,
            # True trusts the system's certificates.
            ssl=cast(Any, upstream.trust or self._tls or True) if upstream.tls else None,
            server_hostname=upstream.host if upstream.tls else None,
        )
        return connection

    def _socket(self, address: Address) -> socket.socket:
        made = socket.socket(address[0], address[1], address[2])
        # Bounded like a client's buffer: the system would hold megabytes of a stream that waits for its client.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SYSTEM_BUFFER)
        end_silent_peers(made, self._limits.keepalive)
        return made

    def _dialled(self, exchange: Caller, dial: asyncio.Task[None]) -> None:
        """A dial has ended; report an unexpected error, which would otherwise go unseen."""
        self._dials.discard(dial)
        if not dial.cancelled() and (error := dial.exception()) is not None:
            exchange.crashed(error)

    def keep(self, connection: UpstreamConnection) -> None:
        """Keep an idle connection if it may serve another request, else close it."""
        now = self._loop.time()
        connection.requests -= 1
        if (
            self._closed
            or connection.requests <= 0
            or now >= connection.ends_at
            or connection.upstream.gone
            or (self._gone and (connection.upstream.host, connection.address) in self._gone)
        ):
            connection.discard()
            return
        connection.idle_since = now
        if (idle := self._idle.get(connection.upstream)) is None:
            idle = self._idle[connection.upstream] = deque()
        idle.append(connection)
        if self._sweep is None:
            self._sweep = self._loop.call_later(IDLE_FOR, self._drop_old)

    def forget(self, connection: UpstreamConnection) -> None:
        """Remove an idle connection that its upstream has closed."""
        connection.idle_since = 0.0
        with contextlib.suppress(KeyError, ValueError):
            self._idle[connection.upstream].remove(connection)

    def leave(self, upstream: Upstream) -> None:
        """Close the idle connections to a removed upstream; those in use close when they become idle."""
        for connection in self._idle.pop(upstream, ()):
            connection.discard()

    def trust(self, tls: ssl.SSLContext | None) -> None:
        """Trust these certificates from now on, for upstreams without their own `trust`."""
        self._tls = tls
        for upstream in [*self._idle]:
            self.leave(upstream)

    def forget_hosts(self, hosts: Iterable[str]) -> None:
        """Stop resolving hosts that no upstream has any more."""
        for host in hosts:
            self._resolver.forget(host)

    def _drop_gone(self) -> None:
        """Close the idle connections to addresses that their host no longer has."""
        for upstream, idle in self._idle.items():
            for connection in [one for one in idle if (upstream.host, one.address) in self._gone]:
                idle.remove(connection)
                connection.discard()

    def _drop_old(self) -> None:
        """Close connections that were idle too long; schedule the next check while idle ones remain."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        now = self._loop.time()
        oldest = now
        for idle in self._idle.values():
            while idle and now - idle[0].idle_since >= IDLE_FOR:
                idle.popleft().discard()
            if idle:
                oldest = min(oldest, idle[0].idle_since)
        if any(self._idle.values()):
            self._sweep = self._loop.call_later(oldest + IDLE_FOR - now, self._drop_old)

    async def close(self) -> None:
        """Cancel all dials and close the idle connections; connections released later are closed, too."""
        self._closed = True
        for dial in self._dials:
            dial.cancel()
        await asyncio.gather(*self._dials, return_exceptions=True)
        await self._resolver.close()
        if self._sweep is not None:
            self._sweep.cancel()
        for idle in self._idle.values():
            while idle:
                idle.pop().discard()
