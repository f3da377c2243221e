"""How long the last calls took, as numbers and as `GET /v1/statistics` tells it."""

from __future__ import annotations

import httpx
import pytest

from gateway.observability.latencies import Latencies
from tests.support.fake_vllm import FakeVllm

CALL = {"messages": {"user": "hi"}}


def test_nothing_is_said_of_no_calls() -> None:
    figures = Latencies().report()["opea_service@llm"]
    assert list(figures) == [
        "p50_latency",
        "p99_latency",
        "average_latency",
        "p50_latency_first_token",
        "p99_latency_first_token",
        "average_latency_first_token",
    ]
    assert set(figures.values()) == {None}


def test_shares_are_of_calls_that_were_made() -> None:
    latencies = Latencies()
    for number in range(1, 101):
        latencies.add([float(number)], [number / 10] if number % 2 else [])
    assert latencies.report()["opea_service@llm"] == {
        "p50_latency": 50.0,
        "p99_latency": 99.0,
        "average_latency": 50.5,
        "p50_latency_first_token": 4.9,
        "p99_latency_first_token": 9.9,
        "average_latency_first_token": 5.0,
    }


@pytest.mark.parametrize("before", [1, 999, 1000, 1001, 2500])
def test_only_the_last_thousand_count(before: int) -> None:
    latencies = Latencies()
    latencies.add([100.0] * before, [50.0] * before)
    latencies.add([1.0] * 1000, [0.5] * 1000)
    figures = latencies.report()["opea_service@llm"]
    assert figures["average_latency"] == figures["p99_latency"] == 1.0
    assert figures["average_latency_first_token"] == 0.5


@pytest.mark.usefixtures("way")
def test_chat_calls_that_were_answered_are_told_of(fake: FakeVllm, client: httpx.Client) -> None:
    client.post("/v1/completions", json={"prompt": "hi"})
    client.post("/v1/chat/completions", json={"messages": {"user": ""}})
    nothing = client.get("/v1/statistics").json()["opea_service@llm"]
    assert set(nothing.values()) == {None}

    client.post("/v1/chat/completions", json={**CALL, "streaming": False})
    whole = client.get("/v1/statistics").json()["opea_service@llm"]
    assert whole["p50_latency"] == whole["p99_latency"] == whole["average_latency"] > 0
    assert whole["p50_latency_first_token"] is None

    client.post("/v1/chat/completions", json={**CALL, "streaming": True})
    streamed = client.get("/v1/statistics").json()["opea_service@llm"]
    assert 0 < streamed["p99_latency_first_token"] < streamed["p99_latency"]
