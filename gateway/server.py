"""uvicorn, run plainly with uvloop and httptools."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from gateway.app import create_app
from gateway.config import Settings
from gateway.logs import LineWriter, configure

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
        config = uvicorn.Config(
            create_app(settings, writer),
            loop="uvloop",
            http="httptools",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=round(settings.drain_timeout),
        )
        host, port = listener.getsockname()[:2]
        _log.info("listening on http://%s:%d, in front of %s", host, port, ", ".join(settings.upstreams))
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        writer.close()


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
