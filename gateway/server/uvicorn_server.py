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
    """A server of `app` on both ways in, or, as `settings` say, through the app alone."""
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
        # Calls end by a limit of their own, with an error; this one is for what does not.
        timeout_graceful_shutdown=round(settings.drain_timeout) + CLOSING_TIME,
        ssl_context_factory=_as_factory(secrets.own_tls),
    )
    return Server(config, settings)


def _as_factory(tls: ssl.SSLContext | None) -> Callable[..., ssl.SSLContext] | None:
    return None if tls is None else lambda config, default: tls


# So many clients are accepted in a turn of the loop. libuv accepts one of each listening descriptor (libuv/libuv#3696),
# so that who connects behind some hundreds would wait for as many turns; with one more descriptor it is one more.
_ACCEPTS = 4


class Server(uvicorn.Server):
    """uvicorn's, with an end in three steps: say so, accept no more, end what runs. At SIGHUP it has files read."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self.server_state = self._shared = SharedState()
        self._settings = settings
        self._drain_delay = settings.drain_delay
        self._drain_timeout = settings.drain_timeout
        self._signalled_at: float | None = None
        self._hung_up = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second one is not to be argued with."""
        if self._signalled_at is None:
            self._captured_signals.append(sig)
            self._signalled_at = time.monotonic()
        else:
            self.should_exit = self.force_exit = True

    def handle_hangup(self, sig: int, frame: FrameType | None) -> None:
        """A file has changed that the settings name."""
        self._hung_up = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
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
        """At a tenth of the connections, so that each has its turn once a second: all at once would hold up events."""
        now = asyncio.get_running_loop().time()
        self._shared.bulk_reads.tick()
        for connection in list(self._shared.sweep_groups[counter % 10]):
            try:
                connection.check_timeouts(now)
            except Exception:
                # A bug of ours, which must not be the end of the server.
                _log.exception("the look at a connection failed")

    async def _check_connections_periodically(self) -> None:
        for counter in itertools.count():
            await asyncio.sleep(0.1)
            self._check_connections(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # which gives a handshake a minute
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
        """Stop listening, but for what has connected by then: closing a listener resets those in its queue."""
        loop = asyncio.get_running_loop()
        connecting: list[Awaitable[object]] = []
        with contextlib.ExitStack() as kept:
            last = [kept.enter_context(listener.dup()) for listener in listeners]
            for server in self.servers:
                server.close()
            await asyncio.sleep(0)  # those that were accepted in this turn become connections
            for listener in last:
                for connection in accept_the_last(listener):
                    connecting.append(loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl))
        # In TLS they shake hands first: one that does not, or does it wrong, is not to hold up or end the others.
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
        """After a second signal, or for what no limit has ended: each gets its error, and its log line."""
        self._drain.ends_at = time.monotonic()
        for call in self._parts.data_path.overdue():
            call.check_timeouts()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=1)
        await asyncio.sleep(0)  # for what the system did not take at once
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpProtocol):
                connection.cut()
        await asyncio.sleep(0)
        self._parts.flush()
