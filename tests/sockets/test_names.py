"""Upstreams by name, of which most lead nowhere, on both ways in."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from functools import partial

import aiodns
import pytest

from gateway.upstream import resolver
from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import running
from tests.support.token_server import CLIENT, SECRET

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
OPENAI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def silent_name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All names are asked of one that answers nothing; `localhost` is in the hosts file."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(aiodns, "DNSResolver", partial(aiodns.DNSResolver, nameservers=[at]))
        yield


def test_names_that_hang_neither_delay_others_nor_hold_the_end(fake: FakeVllm) -> None:
    good = f"http://localhost:{fake.port}"
    hanging = [f"http://hangs-{number}.example:8008" for number in range(6)]
    with running(*hanging, good, max_queue=0, connect_timeout=2) as gateway, gateway.client() as client:
        assert [client.post(CHAT, json=OPENAI).status_code for _ in range(44)] == [200] * 44
        upstreams = {one["url"]: one["state"] for one in client.get("/v1/health_check").json()["upstreams"]}
        assert upstreams.pop(good) == "serving"
        assert set(upstreams.values()) == {"down"}
        began = time.monotonic()
    assert time.monotonic() - began < resolver._PATIENCE  # a name is still asked for


def test_a_token_servers_name_that_hangs_holds_nothing_up(fake: FakeVllm) -> None:
    asks = {"upstream_client_id": CLIENT, "upstream_client_secret": SECRET}
    with (
        running(fake.url, upstream_token_url="http://hangs.example/token", **asks) as gateway,
        gateway.client() as client,
    ):
        refused = client.post(CHAT, json=OPENAI)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        began = time.monotonic()
    assert time.monotonic() - began < resolver._PATIENCE
