"""A process has as many descriptors as it may, and what runs out of them is told as its own shortage."""

from __future__ import annotations

import contextlib
import errno
import select
import subprocess
import sys

import httpx
import pytest

from gateway.commands import serve
from gateway.config.settings import Settings
from gateway.server.listener import WATCHERS, most_connections
from gateway.wire.errors import is_shortage
from tests.support.fake_vllm import FakeVllm, Hold, response
from tests.support.gateway_process import running
from tests.support.ports import free_port

CHAT = "/v1/chat/completions"
CALL = {"messages": {"user": "hi"}, "streaming": False}


def test_an_address_that_has_most_of_the_connections_leaves_some_to_others(fake: FakeVllm) -> None:
    with running(fake.url, max_connections=16) as gateway, contextlib.ExitStack() as stack:
        others = []
        for _ in range(20):
            others.append(stack.enter_context(gateway.connect()))
        refused = [connection for connection in others if select.select([connection], [], [], 0.2)[0]]
        assert len(refused) == 6
        assert b"are of this address, and the rest is for others" in refused[0].recv(4096)
        with gateway.client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as client:
            assert client.get("/health").status_code == 200


def test_a_trusted_proxy_has_as_many_connections_as_there_may_be(fake: FakeVllm) -> None:
    with (
        running(fake.url, max_connections=16, trusted_proxies="127.0.0.0/8") as gateway,
        contextlib.ExitStack() as stack,
    ):
        others = [stack.enter_context(gateway.connect()) for _ in range(17)]
        refused = [connection for connection in others if select.select([connection], [], [], 0.2)[0]]
        assert len(refused) == 1
        assert b"16 clients are connected" in refused[0].recv(4096)


def test_the_soft_limit_becomes_the_hard_one() -> None:
    script = (
        "import resource; from gateway.server.listener import raise_descriptor_limit as raise_limit\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))\n"
        "print(raise_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "300 (300, 300)\n"


def test_each_client_has_one_for_its_upstream_too() -> None:
    assert [most_connections(number) for number in (1024, 65_536, 10)] == [480, 32_736, 1]


@pytest.mark.usefixtures("way")
def test_one_client_too_many_is_told_so_and_the_others_are_served(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue([hold, response("200 OK", b"{}")])
    with running(fake.url, max_connections=2) as gateway, gateway.client() as client:
        with gateway.connect(), gateway.connect():
            with gateway.connect() as refused:
                got = b"".join(iter(lambda: refused.recv(65536), b""))
            assert got.startswith(b"HTTP/1.1 503 ")
            assert b"2 clients are connected, and no more may be (GATEWAY_MAX_CONNECTIONS)" in got
        hold.release()
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200


def test_a_gateway_that_is_full_still_tells_how_it_is_on_a_port_for_that(fake: FakeVllm) -> None:
    port = free_port()
    with (
        running(fake.url, max_connections=1, metrics_port=port) as gateway,
        gateway.connect(),
        contextlib.ExitStack() as watching,
    ):
        with gateway.connect() as refused:
            assert refused.recv(1000).startswith(b"HTTP/1.1 503 ")
        told = [watching.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}")) for _ in range(WATCHERS)]
        assert {one.get("/metrics").status_code for one in told} == {200}
        with pytest.raises(httpx.HTTPStatusError, match="503"):
            httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status()


@pytest.mark.usefixtures("way")
def test_a_dial_without_a_descriptor_is_no_fault_of_the_upstream(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    fake.close_after_probes()
    with running(fake.url, probe_interval=60) as gateway, gateway.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr("gateway.upstream.connections.ConnectionPool._open", fails)
            answers = [client.post(CHAT, json=CALL) for _ in range(4)]
        assert {(one.status_code, one.json()["error"]["code"]) for one in answers} == {(503, "gateway_shortage")}
        assert "ulimit" in answers[0].json()["error"]["message"]
        assert client.get("/v1/health_check").status_code == 200
        assert client.post(CHAT, json=CALL).status_code == 200


def test_a_shortage_is_seen_behind_what_it_led_to() -> None:
    behind = ConnectionError("y")
    behind.__cause__ = OSError(errno.ENFILE, "x")
    assert is_shortage(behind)
    # As anyio tells of a name with several addresses.
    several = OSError("All connection attempts failed")
    several.__cause__ = ExceptionGroup(
        "z", [ConnectionRefusedError(errno.ECONNREFUSED, "x"), OSError(errno.EMFILE, "x")]
    )
    assert is_shortage(several)
    several.__cause__ = ExceptionGroup("z", [ConnectionRefusedError(errno.ECONNREFUSED, "x")])
    assert not is_shortage(several)
    assert not is_shortage(ConnectionRefusedError(errno.ECONNREFUSED, "x"))
    assert not is_shortage(None)


def test_a_limit_that_is_less_than_was_promised_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "raise_descriptor_limit", lambda: 1024)
    settings = Settings()
    (warning,) = serve._limit_connections(settings)
    assert "1024 descriptors, which is enough for 480 clients, not for 5120" in warning
    assert settings.max_connections == 480
    settings = Settings(GATEWAY_MAX_CONNECTIONS=100)
    assert serve._limit_connections(settings) == []
    assert settings.max_connections == 100


def test_bodies_that_may_not_arrive_are_warned_of() -> None:
    settings = Settings(GATEWAY_MAX_BODY_BYTES=6_000_000, GATEWAY_MAX_BUFFERED_BYTES=10_000_000)
    (warning,) = serve._bodies_that_may_not_arrive(settings)
    assert warning.startswith("GATEWAY_MAX_BODY_BYTES is 6000000, but")
    assert "5000000 bytes together, half of GATEWAY_MAX_BUFFERED_BYTES" in warning
    settings = Settings(GATEWAY_MAX_BODY_BYTES=5_000_000, GATEWAY_MAX_BUFFERED_BYTES=10_000_000)
    assert serve._bodies_that_may_not_arrive(settings) == []
