"""What stands before and behind the gateway is the real thing, and is restarted: needs nginx and the real vLLM.

Not among the tests that `make test` finds; `make test-restarts` runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import orjson
import pytest

from gateway.config.load import build
from gateway.config.model_server_settings import ModelServerSettings
from gateway.modelserver import demo_model, install
from gateway.modelserver.vllm_process import DEMO_NAME, ModelServer, launch
from tests.support.load import NO_FAULTS, Load, Upstream, gateway
from tests.support.ports import free_port

CHAT = "/v1/chat/completions"
NGINX = """
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1000; }}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream gateways {{
    # As one that takes no connection for a moment is not to be left out for ten seconds.
    {servers}
    keepalive 16;
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://gateways; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(ports: list[int], folder: Path) -> Iterator[int]:
    """nginx in front of these ports, by its port."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    assert Path(program).exists(), "nginx is needed: install it (Debian: apt install nginx-light)"
    port = free_port()
    config = folder / "nginx.conf"
    servers = " ".join(f"server 127.0.0.1:{one} max_fails=0;" for one in ports)
    config.write_text(NGINX.format(folder=folder, servers=servers, port=port))
    with subprocess.Popen([program, "-c", str(config), "-p", str(folder)]) as process:
        try:
            until = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert time.monotonic() < until, "nginx does not listen"
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()


def test_two_gateways_behind_nginx_restarted_in_turn_under_load_lose_nothing(tmp_path: Path) -> None:
    async def play() -> None:
        upstream = Upstream(random.Random(1), NO_FAULTS)
        url = f"http://127.0.0.1:{await upstream.start()}"
        ports = [free_port(), free_port()]
        settings = {"GATEWAY_DRAIN_DELAY": "1"}
        with contextlib.ExitStack() as stack:
            each = [stack.enter_context(contextlib.ExitStack()) for _ in ports]
            running = [
                one.enter_context(gateway([url], port, **settings)) for one, port in zip(each, ports, strict=True)
            ]
            load = Load(stack.enter_context(nginx(ports, tmp_path)), random.Random(2))
            stop = asyncio.Event()
            clients = asyncio.create_task(load.run(32, lambda: not stop.is_set()))
            for number in (0, 1, 0, 1):
                await asyncio.sleep(2)
                process, port = running[number]
                process.send_signal(signal.SIGTERM)
                assert await asyncio.to_thread(process.wait, 30) == 0
                running[number] = await asyncio.to_thread(each[number].enter_context, gateway([url], port, **settings))
            await asyncio.sleep(2)
            stop.set()
            await clients
        upstream.die()
        await asyncio.sleep(0.1)  # its connections close in the loop's next turns
        assert load.sent > 1000
        assert load.outcomes == {"answered": load.sent}

    asyncio.run(play())


ENDLESS = {
    "model": DEMO_NAME,
    "messages": [{"role": "user", "content": "What is vLLM?"}],
    "ignore_eos": True,
    "max_tokens": 4000,
    "stream": True,
}


class Vllm:
    """The real one, with the demo model, on a port that stays the same."""

    def __init__(self, folder: Path, *options: str, name: str | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "vllm.log"
        python = install.ensure_environment(os.environ)
        model = demo_model.ensure_demo_model(os.environ, python)
        settings = build(ModelServerSettings, None, port=self.port, served_name=name)
        self.command = launch(settings, python, str(model), os.environ, options, demo=True, local=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[ModelServer]:
        """It serves."""
        with ModelServer(self.command, self.port, self._log) as server:
            server.wait_ready()
            yield server

    def kill(self, which: str) -> None:
        """With no warning: of its processes the one whose command line says `which`."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if which.encode() in (folder / "cmdline").read_bytes() and self._is_ours(int(folder.name)):
                    os.kill(int(folder.name), signal.SIGKILL)
                    return
        raise AssertionError(f"vLLM has no process {which!r}")

    def _is_ours(self, pid: int) -> bool:
        """Its API server, or a child of that."""
        while pid > 1:
            if f"--port\0{self.port}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return True
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return False

    def at_work(self) -> float:
        """How many requests it runs or keeps waiting, by its own count."""
        counts = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        lines = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=20).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(counts))


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    return Vllm(tmp_path_factory.mktemp("vllm"))


def wait_for_health(client: httpx.Client, status: int) -> None:
    until = time.monotonic() + 15
    while client.get("/v1/health_check").status_code != status:
        assert time.monotonic() < until, f"the health check never answers {status}"
        time.sleep(0.2)


@pytest.mark.parametrize("which", ["api_server", "EngineCore"])
def test_a_vllm_that_is_killed_in_mid_stream_is_told_of_and_used_again_once_it_is_back(vllm: Vllm, which: str) -> None:
    with gateway([vllm.url]) as (_, port), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        with vllm.running(), client.stream("POST", CHAT, json=ENDLESS) as answer:
            pieces = answer.iter_raw()
            got = b"".join(next(pieces) for _ in range(5))
            vllm.kill(which)
            got += b"".join(pieces)
        *events, error, done, rest = got.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        assert orjson.loads(error.removeprefix(b"data: "))["error"]["message"]
        assert all(b'"finish_reason":"' not in event for event in events)
        while_down = client.post(CHAT, json={**ENDLESS, "stream": False, "ignore_eos": False})
        assert while_down.status_code in (502, 503)
        wait_for_health(client, 503)
        with vllm.running():
            wait_for_health(client, 200)
            answer = client.post(CHAT, json={**ENDLESS, "stream": False, "ignore_eos": False})
            assert (answer.status_code, answer.json()["choices"][0]["finish_reason"]) == (200, "stop")


def test_a_vllm_that_is_stopped_gives_what_runs_its_time_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kubernetes stops it, and as vLLM does not by itself: left to its default it aborts what runs."""
    monkeypatch.setenv("VLLM_SHUTDOWN_TIMEOUT", "60")
    stopped = Vllm(tmp_path)
    with (
        gateway([stopped.url]) as (_, port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
        stopped.running() as server,
        ThreadPoolExecutor(1) as beside,
    ):
        wait_for_health(client, 200)
        with client.stream("POST", CHAT, json={**ENDLESS, "max_tokens": 1000}) as answer:
            pieces = answer.iter_raw()
            got = next(pieces)
            assert b"[DONE]" not in got
            end = beside.submit(server.stop)
            got += b"".join(pieces)
        end.result()
        assert got.count(b'"finish_reason":"length"') == 1
        assert got.endswith(b"data: [DONE]\n\n")


def test_200_clients_that_leave_at_random_leave_vllm_nothing_to_do(vllm: Vllm) -> None:
    chance = random.Random(3)
    leaves_in_turn = asyncio.Semaphore(50)

    async def leave(port: int) -> None:
        async with leaves_in_turn:
            body = orjson.dumps({**ENDLESS, "stream": chance.random() < 0.5})
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)))
            writer.write(body)
            await asyncio.sleep(chance.uniform(0, 3))
            writer.transport.abort()

    async def play(port: int) -> None:
        await asyncio.gather(*(leave(port) for _ in range(200)))

    with vllm.running(), gateway([vllm.url]) as (_, port):
        asyncio.run(play(port))
        until = time.monotonic() + 5
        while (left := vllm.at_work()) != 0:
            assert time.monotonic() < until, f"vLLM works on {left} requests that nobody waits for"
            time.sleep(0.1)
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert "gateway_in_flight 0.0" in metrics
    told = re.search(r'gateway_outcomes_total{outcome="client_left"} (\S+)', metrics)
    assert told
    assert float(told[1]) > 150  # some leave before their head has come
