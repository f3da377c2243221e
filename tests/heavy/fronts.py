"""The same bytes behind nginx and HAProxy: with each the gateway agrees where a request ends, and whose an answer is.

Not among the tests that `make test` finds; `make test-smuggling` runs it. Needs nginx and HAProxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.smuggling.cases import CASES, Case
from tests.support.smuggling.lanes import Both, Way, answers, both, connect

# Plain ones, as they are copied from manuals; a line of log for each request, with whom it was passed to. Of two
# threads of HAProxy that write a line at once, one may lose it (haproxy/haproxy#1861).
NGINX = """
daemon off; master_process off;
pid {folder}/nginx.pid;
error_log {folder}/errors crit;
events {{ worker_connections 500; }}
http {{
  log_format passed "$upstream_addr";
  access_log {folder}/log passed;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream gateways {{ server 127.0.0.1:{gateway}; keepalive 16; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://gateways; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""
HAPROXY = """
global
  nbthread 1
  log stdout format raw local0
defaults
  mode http
  log global
  log-format "%s"
  timeout connect 5s
  timeout client 20s
  timeout server 20s
  http-reuse always
frontend clients
  bind 127.0.0.1:{port}
  default_backend gateways
backend gateways
  server 127.0.0.1:{gateway} 127.0.0.1:{gateway}
"""


@dataclass
class Front:
    """One that runs in front of a gateway."""

    port: int
    log: Path

    @property
    def passed(self) -> int:
        """How many requests it has passed on, each try counted."""
        return len(re.findall(r"127\.0\.0\.1:\d+", self.log.read_text()))


@contextlib.contextmanager
def front(name: str, gateway: int, folder: Path) -> Iterator[Front]:
    """nginx or HAProxy in front of this port."""
    program = shutil.which(name, path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    assert program, f"{name} is needed: install it (Debian: apt install nginx-light haproxy)"
    config, log, port = folder / "config", folder / "log", free_port()
    config.write_text((NGINX if name == "nginx" else HAPROXY).format(folder=folder, port=port, gateway=gateway))
    command = ["-c", str(config), "-p", str(folder)] if name == "nginx" else ["-db", "-f", str(config)]
    with (
        (folder / "output" if name == "nginx" else log).open("wb") as output,
        subprocess.Popen([program, *command], stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            until = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert time.monotonic() < until, f"{name} does not listen: {log.read_text()}"
                time.sleep(0.05)
            yield Front(port, log)
        finally:
            process.terminate()


class Behind:
    """A gateway on each way in, each behind a front of its own."""

    def __init__(self, ways: Both, fronts: dict[Way, Front]) -> None:
        self.ways = ways
        self._fronts = fronts
        self._canaries = 0

    async def canary(self, port: int) -> None:
        """A call on a connection of its own has its own answer."""
        self._canaries += 1
        body = b'{"messages":[],"canary":%d}' % self._canaries
        client = await connect(port)
        client.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        await client.until(1)
        ((status, _, content),) = answers(client.got)
        client.transport.abort()
        assert (status, body.replace(b'"', b'\\"') in content) == (200, True), (status, content)

    async def play(self, way: Way, case: Case) -> None:
        """Send what a case says through the front, then calls by others."""
        here, got = self._fronts[way], way.upstream.got
        got.clear()
        passed, handled = here.passed, way.handled
        client = await connect(here.port)
        for number, write in enumerate(case.writes):
            if number:
                await client.rest(0.02)
            client.send(write)
        await client.rest(0.03)
        await asyncio.gather(*(self.canary(here.port) for _ in range(2)))
        client.transport.abort()
        await self.canary(here.port)
        for _ in range(1000):  # lines are written once answers have gone out
            if here.passed - passed >= max(way.handled - handled, 3):
                break
            await asyncio.sleep(0.005)
        assert way.handled - handled <= here.passed - passed, "the gateway has made more requests of what was passed"
        own = [one.asked for one in got if b'"canary"' not in one.body]
        assert len(own) <= here.passed - passed - 3, f"more went upstream than was passed: {own}"
        assert len(got) - len(own) == 3


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def behind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    with contextlib.ExitStack() as stack:
        ways = stack.enter_context(both())
        fronts = {
            way: stack.enter_context(front(request.param, way.port, tmp_path_factory.mktemp(request.param)))
            for way in ways.ways
        }
        yield Behind(ways, fronts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whoever_shares_a_connection_with_it_gets_answers_of_their_own(behind: Behind, case: Case) -> None:
    behind.ways.run(lambda way: behind.play(way, case))
