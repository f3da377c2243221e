"""The command `serve`: opens the ports, starts the log and runs the server until a signal."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

from gateway.app import create_app
from gateway.config.memory_limit import default_max_buffered_bytes
from gateway.config.secrets import Secrets
from gateway.config.settings import Settings
from gateway.config.urls import authority, is_loopback
from gateway.observability.logs import LineWriter, configure
from gateway.observability.own_version import own_build, own_version
from gateway.server.listener import listen, most_connections, raise_descriptor_limit
from gateway.server.memory import share_heap
from gateway.server.uvicorn_server import create_server
from gateway.upstream.keepalive import end_silent_peers

_log = logging.getLogger(__name__)

# The words of the first log line.
_BUILDS = {"compiled": "compiled", "plain": "in plain Python"}


def serve(settings: Settings, secrets: Secrets, warnings: list[str]) -> None:
    """Serve until SIGINT or SIGTERM. Raises listener.CannotListen."""
    share_heap()
    warnings = [*warnings, *_limit_connections(settings), *_bodies_that_may_not_arrive(settings)]
    listeners = [listen(settings.host, settings.port)]
    if settings.health_port not in (None, settings.port):
        listeners.append(listen(settings.host, settings.health_port, "GATEWAY_HEALTH_PORT"))
    if settings.metrics_port is not None:
        listeners.append(listen(settings.host, settings.metrics_port, "GATEWAY_METRICS_PORT"))
    for listener in listeners:
        end_silent_peers(listener, settings.tcp_keepalive, unsent=settings.client_write_timeout)
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again after an orderly end, when the log is still to be written.
        signal.signal(number, _exit)
    writer = LineWriter(sys.stdout.fileno())
    configure(writer, settings.log_format, settings.log_level)
    _log.info("vllm-gateway %s begins, %s", own_version(), _BUILDS[own_build()])
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
            address = authority(*listener.getsockname()[:2])
            scheme = "http" if settings.tls_cert_file is None else "https"
            _log.info("listening on %s://%s, in front of %s", scheme, address, ", ".join(settings.upstreams))
        server.run(sockets=listeners)
    finally:
        writer.close()


def _limit_connections(settings: Settings) -> list[str]:
    """Limit connected clients by the descriptor limit, and warn if that is less than the settings promise."""
    descriptors = raise_descriptor_limit()
    most = most_connections(descriptors)
    wanted = settings.max_connections or settings.max_in_flight + settings.max_queue
    settings.max_connections = min(most, settings.max_connections or most)
    if most >= wanted:
        return []
    return [
        f"the process may open {descriptors} descriptors, which is enough for {most} clients, not for {wanted}: raise "
        "its hard limit (ulimit -Hn, or LimitNOFILE, or ulimits in Compose)"
    ]


def _bodies_that_may_not_arrive(settings: Settings) -> list[str]:
    """Warn if a body within the size limit could still be refused, even with no other body being sent."""
    held = settings.max_buffered_bytes or default_max_buffered_bytes()
    if 2 * settings.max_body_bytes <= held:
        return []
    return [
        f"GATEWAY_MAX_BODY_BYTES is {settings.max_body_bytes}, but requests that have not come whole may hold "
        f"{held // 2} bytes together, half of GATEWAY_MAX_BUFFERED_BYTES: larger ones are refused with 503"
    ]


def _exit(number: int, frame: FrameType | None) -> None:
    # Python restores the default signal actions before it has ended: a signal would then change the exit status.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    sys.exit(0)
