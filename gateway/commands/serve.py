"""Serves until a signal: the ports, the log and the server, in their order."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

from gateway.app import create_app
from gateway.config.secrets import Secrets
from gateway.config.settings import Settings, is_loopback
from gateway.observability.logs import LineWriter, configure
from gateway.server.listener import listen
from gateway.server.memory import share_heap
from gateway.server.uvicorn_server import create_server

_log = logging.getLogger(__name__)


def serve(settings: Settings, secrets: Secrets, warnings: list[str]) -> None:
    """Serve until SIGINT or SIGTERM. Raises listening.CannotListen."""
    share_heap()
    listeners = [listen(settings.host, settings.port)]
    if settings.health_port not in (None, settings.port):
        listeners.append(listen(settings.host, settings.health_port, "GATEWAY_HEALTH_PORT"))
    if settings.metrics_port is not None:
        listeners.append(listen(settings.host, settings.metrics_port, "GATEWAY_METRICS_PORT"))
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn, having ended in good order, raises the signal once more: the log is still to be written then.
        signal.signal(number, _exit)
    writer = LineWriter(sys.stdout.fileno())
    configure(writer, settings.log_format, settings.log_level)
    for warning in warnings:
        _log.warning(warning)
    try:
        server = create_server(settings, secrets, create_app(settings, secrets, writer))
        signal.signal(signal.SIGHUP, server.handle_hangup)
        if secrets.client_keys is None and not is_loopback(settings.host):
            _log.warning(
                "anyone who reaches %s may call: set GATEWAY_API_KEYS or GATEWAY_API_KEYS_FILE, or "
                "GATEWAY_HOST=127.0.0.1 behind a proxy that asks for keys",
                settings.host,
            )
        if settings.tls_skip_verify:
            _log.warning(
                "upstreams' certificates are not looked at (GATEWAY_TLS_SKIP_VERIFY): anyone may stand in for one"
            )
        for listener in listeners:
            host, port = listener.getsockname()[:2]
            scheme = "http" if settings.tls_cert_file is None else "https"
            _log.info("listening on %s://%s:%d, in front of %s", scheme, host, port, ", ".join(settings.upstreams))
        server.run(sockets=listeners)
    finally:
        writer.close()


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(0)
