"""Metrics on a port of their own, on both ways in."""

from __future__ import annotations

import pytest

from gateway.config.environment import SettingsError
from gateway.config.load import load
from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import running
from tests.support.ports import free_port

CHAT = "/v1/chat/completions"
CALL = {"messages": {"user": "hi"}, "streaming": False}
SECRET = "sk-4f7d0c9a2b6e81d35a"


def test_metrics_are_there_without_a_key_and_nothing_else_is(fake: FakeVllm, way: None) -> None:
    port = free_port()
    with running(fake.url, metrics_port=port, api_keys=SECRET) as gateway, gateway.client() as client:
        own = gateway.url.replace(str(gateway.port), str(port))
        key = {"x-api-key": SECRET}
        assert client.post(CHAT, json=CALL, headers=key).status_code == 200
        told = client.get(f"{own}/metrics")
        assert (told.status_code, told.headers["content-type"].split(";")[0]) == (200, "text/plain")
        assert 'gateway_requests_total{form="simplified"' in told.text
        for path in ("/health", "/v1/models", "/v1/health_check", "/openapi.json", "/"):
            assert client.get(f"{own}{path}", headers=key).status_code == 404
        for _ in range(2):  # the second would be known again
            assert client.post(f"{own}{CHAT}", json=CALL, headers=key).status_code == 404
        assert client.post(f"{own}/metrics", headers=key).status_code == 405
        assert client.get("/metrics", headers=key).status_code == 404
        assert "/metrics" not in client.get("/openapi.json", headers=key).json()["paths"]


@pytest.mark.parametrize("other", ["port", "health_port"])
def test_it_is_a_port_of_its_own(other: str) -> None:
    with pytest.raises(SettingsError, match=r"GATEWAY_METRICS_PORT is wrong: 9464. Allowed: a port of its own."):
        load(None, metrics_port=9464, **{other: 9464})
