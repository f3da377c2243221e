"""uvicorn with uvloop, httptools and the shortcut."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.app import create_app
from gateway.config import Settings
from gateway.logs import LineWriter, configure
from gateway.memory import settle
from gateway.shortcut import Protocol, Shortcut, missing_in

_log = logging.getLogger(__name__)

# Longer than the idle limit of the usual load balancers (60 s), so that none reuses a closing connection.
_KEEP_ALIVE = 75
_BACKLOG = 2048


class CannotListen(Exception):
    """The address cannot be listened on; the text says why and what to do."""


def serve(settings: Settings, warnings: list[str]) -> None:
    """Serve until SIGINT or SIGTERM. Raises CannotListen."""
    listener = listen(settings.host, settings.port)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn, having ended in good order, raises the signal once more: the log is still to be written then.
        signal.signal(number, _exit)
    writer = LineWriter(sys.stdout.fileno())
    configure(writer, settings.log_format, settings.log_level)
    for warning in warnings:
        _log.warning(warning)
    try:
        server = create_server(settings, create_app(settings, writer))
        host, port = listener.getsockname()[:2]
        _log.info("listening on http://%s:%d, in front of %s", host, port, ", ".join(settings.upstreams))
        server.run(sockets=[listener])
    finally:
        writer.close()


def create_server(settings: Settings, app: Starlette) -> uvicorn.Server:
    """A server of `app` on both ways in, or, as `settings` say, through the app alone."""
    protocol: type[HttpToolsProtocol] = Shortcut if settings.shortcut else Protocol
    if missing := missing_in(HttpToolsProtocol):
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
        timeout_graceful_shutdown=round(settings.drain_timeout),
    )
    return _Server(config)


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        settle()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # uvicorn has cancelled its tasks; the shortcut has none.
        for connection in list(self.server_state.connections):
            if isinstance(connection, Protocol):
                connection.cut()
        await asyncio.sleep(0)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens: who connects before the server runs waits for it. Raises CannotListen."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise CannotListen(
            f"Cannot listen on {host} port {port} ({error.strerror}): set GATEWAY_HOST and GATEWAY_PORT to an "
            "address of this machine and a free port."
        ) from None
    return listener
