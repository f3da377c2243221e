"""uvicorn with uvloop, httptools and the shortcut."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from types import FrameType
from typing import cast

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.config.secrets import Secrets
from gateway.config.settings import CLOSING_TIME, Settings
from gateway.relay.data_path import Drain
from gateway.server.context import Parts
from gateway.server.http_protocol import DRAIN_GRACE, HttpProtocol, SharedState, missing_names
from gateway.server.listener import BACKLOG, accept_the_last
from gateway.server.memory import settle
from gateway.server.shortcut import Shortcut
from gateway.wire.heads import lines

_log = logging.getLogger(__name__)

# Longer than the idle limit of the usual load balancers (60 s), so that none reuses a closing connection.
_KEEP_ALIVE = 75


def create_server(settings: Settings, secrets: Secrets, app: Starlette) -> Server:
    """A server of `app` with the shortcut, or through the app alone if `settings` disable the shortcut."""
    protocol: type[HttpToolsProtocol] = Shortcut if settings.shortcut else HttpProtocol
    if missing := missing_names(HttpToolsProtocol):
        _log.warning(
            "uvicorn %s is not the one that the shortcut was made for (it lacks %s): every request goes through the "
            "app; install the version that pyproject.toml names.",
            uvicorn.__version__,
            ", ".join(missing),
        )
        protocol = HttpToolsProtocol
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        # Calls end with an error by their own limit; this timeout is for anything that does not.
        timeout_graceful_shutdown=round(settings.drain_timeout) + CLOSING_TIME,
        ssl_context_factory=_as_factory(secrets.own_tls),
    )
    return Server(config, settings)


def _as_factory(tls: ssl.SSLContext | None) -> Callable[..., ssl.SSLContext] | None:
    return None if tls is None else lambda config, default: tls


# So many clients are accepted per loop turn. libuv accepts one client per listening descriptor (libuv/libuv#3696), so
# a client behind some hundreds of others would wait for as many turns; each more descriptor accepts one more.
_ACCEPTS = 4


class Server(uvicorn.Server):
    """uvicorn's server with a shutdown in three steps: announce it, stop accepting, drain. SIGHUP rereads the files."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self.server_state = self._shared = SharedState()
        self._settings = settings
        self._drain_delay = settings.drain_delay
        self._drain_timeout = settings.drain_timeout
        self._signalled_at: float | None = None
        self._hung_up = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second signal: exit now."""
        if self._signalled_at is None:
            self._captured_signals.append(sig)
            self._signalled_at = time.monotonic()
        else:
            self.should_exit = self.force_exit = True

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """Reread the files that the settings name, at the next tick."""
        self._hung_up = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if self._hung_up:
            self._hung_up = False
            self._parts.reread()
        self._check_connections(counter)
        if self._signalled_at is not None:
            self._drain.began = True
            if time.monotonic() - self._signalled_at >= self._drain_delay:
                self.should_exit = True
        stop = await super().on_tick(counter)
        self._shared.default_lines = lines(self._shared.default_headers)
        return stop

    @property
    def _parts(self) -> Parts:
        parts: Parts = self.lifespan.state["parts"]
        return parts

    @property
    def _drain(self) -> Drain:
        return self._parts.data_path.drain

    def _check_connections(self, counter: int) -> None:
        """Check a tenth of the connections, each one once a second: checking all at once would delay events."""
        now = asyncio.get_running_loop().time()
        self._shared.bulk_reads.tick()
        for connection in list(self._shared.sweep_groups[counter % 10]):
            try:
                connection.check_timeouts(now)
            except Exception:
                # A bug in the gateway, which must not end the server.
                _log.exception("the look at a connection failed")

    async def _check_connections_periodically(self) -> None:
        for counter in itertools.count():
            await asyncio.sleep(0.1)
            self._check_connections(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # with sockets it would allow a TLS handshake one minute
        loop, tls = asyncio.get_running_loop(), self.config.ssl
        within = None if tls is None else self._settings.header_timeout
        for listener in sockets or ():
            for one in (listener, *(listener.dup() for _ in range(_ACCEPTS - 1))):
                server = await loop.create_server(
                    self._protocol, sock=one, ssl=tls, ssl_handshake_timeout=within, backlog=BACKLOG
                )
                self.servers.append(server)
        settle()

    async def _accept_the_last(self, listeners: Iterable[socket.socket]) -> None:
        """Stop listening, but first accept the waiting connections: closing a listener resets those in its backlog."""
        loop = asyncio.get_running_loop()
        connecting: list[Awaitable[object]] = []
        with contextlib.ExitStack() as kept:
            last = [kept.enter_context(listener.dup()) for listener in listeners]
            for server in self.servers:
                server.close()
            await asyncio.sleep(0)  # connections accepted in this turn reach their protocol
            for listener in last:
                for connection in accept_the_last(listener):
                    connecting.append(loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl))
        # In TLS they do the handshake first: one that stalls or fails must not delay or end the others.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_GRACE):
                await asyncio.gather(*connecting, return_exceptions=True)

    def _protocol(self) -> asyncio.Protocol:
        made = cast(type[HttpToolsProtocol], self.config.http_protocol_class)
        return made(self.config, self.server_state, self.lifespan.state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.began = True
        self._drain.ends_at = time.monotonic() + self._drain_timeout
        looking = asyncio.create_task(self._check_connections_periodically())
        await self._accept_the_last(sockets or ())
        await super().shutdown(sockets)
        looking.cancel()
        await self._end_what_still_runs()

    async def _end_what_still_runs(self) -> None:
        """End the remaining calls with an error and a log line: after a second signal, or if no timeout has."""
        self._drain.ends_at = time.monotonic()
        for call in self._parts.data_path.overdue():
            call.check_timeouts()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=1)
        await asyncio.sleep(0)  # lets pending writes reach the system
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpProtocol):
                connection.cut()
        await asyncio.sleep(0)
        self._parts.flush()
