"""The gateway under a real uvicorn on a real socket, in a thread and loop of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn
import uvloop

from gateway import housekeeping
from gateway.app import create_app
from gateway.config.secrets import Secrets, read_secrets
from gateway.config.settings import Settings, names_of
from gateway.observability import logs
from gateway.observability.logs import LineWriter
from gateway.server.context import Parts
from gateway.server.listener import listen
from gateway.server.uvicorn_server import Server, create_server
from tests.support.paths import AUTHORITY

# Lines are written and limits looked at ten times a second, for which hundreds of tests would wait.
logs._TOGETHER = 0.01
housekeeping._LOOK_AFTER = 0.02


class _Quick:
    """asyncio for uvicorn's server, whose looks at its end are a tenth of a second apart."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.01))


vars(uvicorn.server)["asyncio"] = _Quick()

# To read all of the system's certificates takes a client longer than most tests.
_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


# Which way in a gateway takes unless its settings say; the `way` fixture sets it.
SHORTCUT = True


@dataclass
class Gateway:
    """A running gateway: its address, and its log as it was written."""

    host: str
    port: int
    _log: int
    _server: uvicorn.Server
    _tls: ssl.SSLContext | None

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http{'s' if self._tls else ''}://{self.host}:{self.port}"

    def client(self, **options: Any) -> httpx.Client:
        """An HTTP client for it."""
        trusts = self._tls or _NOBODY
        return httpx.Client(base_url=self.url, **{"trust_env": False, "timeout": 20, "verify": trusts, **options})

    def connect(self) -> socket.socket:
        """A bare connection to it, in TLS where it speaks that."""
        connection = socket.create_connection((self.host, self.port), timeout=20)
        return self._tls.wrap_socket(connection, server_hostname=self.host) if self._tls else connection

    def signal(self) -> None:
        """As a signal to end."""
        self._server.handle_exit(signal.SIGTERM, None)

    def becomes(self, status: int, path: str = "/v1/health_check") -> httpx.Response:
        """The first answer of this status; probes, on which a health check rests, come in their own time."""
        until = time.monotonic() + 20
        with self.client() as client:
            while (got := client.get(path)).status_code != status:
                assert time.monotonic() < until, f"{path} stays {got.status_code}: {got.text}"
                time.sleep(0.01)
        return got

    def hang_up(self) -> None:
        """As SIGHUP."""
        assert isinstance(self._server, Server)
        self._server.handle_hangup(signal.SIGHUP, None)

    def log(self, count: int) -> list[dict[str, Any]]:
        """The next so many request lines; waits for them."""
        text = b""
        while text.count(b"\n") < count:
            text += os.read(self._log, 1)
        return [json.loads(line) for line in text.splitlines()]


def _wait_until_probed(server: Server, thread: threading.Thread) -> None:
    """Return when each upstream was probed once, or hangs: a health check says 503 of a slow one, and logs that."""
    while thread.is_alive() and not server.started:
        time.sleep(0.002)
    parts: Parts = server.lifespan.state["parts"]
    until = time.monotonic() + 2
    while time.monotonic() < until and any(one.why == "not probed yet" for one in parts.data_path.pool):
        time.sleep(0.002)


@contextlib.contextmanager
def running(*upstreams: str, **settings: Any) -> Iterator[Gateway]:
    """A gateway in front of these upstreams; it is up when this returns, its upstreams have been probed once."""
    given = {"upstreams": upstreams, "port": 0, "drain_timeout": 2, "shortcut": SHORTCUT, **settings}
    chosen = Settings(**{names_of(field)[0]: value for field, value in given.items()})
    with running_as(chosen, read_secrets(chosen)) as gateway:
        yield gateway


@contextlib.contextmanager
def running_as(settings: Settings, secrets: Secrets) -> Iterator[Gateway]:
    """The same, with these settings and what they name."""
    trusts = ssl.create_default_context(cafile=AUTHORITY) if settings.tls_cert_file is not None else None
    read, write = os.pipe()
    writer = LineWriter(write)
    listeners = [listen("127.0.0.1", port) for port in (0, settings.metrics_port) if port is not None]
    server = create_server(settings, secrets, create_app(settings, secrets, writer))

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(server.serve(sockets=listeners))

    thread = threading.Thread(target=run)
    thread.start()
    gateway = Gateway("127.0.0.1", listeners[0].getsockname()[1], read, server, trusts)
    try:
        _wait_until_probed(server, thread)
        with gateway.client() as client:
            client.get("/v1/health_check")
        yield gateway
    finally:
        server.should_exit = True
        thread.join()
        os.close(read)  # first: it may be full, and the writer wait for somebody to read
        writer.close()
        os.close(write)
