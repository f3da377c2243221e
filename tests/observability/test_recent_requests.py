"""The times of the last requests, as numbers and in `GET /v1/statistics`, and what the page shows of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import httpx
import pytest

from gateway.observability.recent_requests import PageFigures, RecentRequests
from gateway.relay.record import Record
from tests.support.fake_vllm import FakeVllm

CALL = {"messages": {"user": "hi"}}


@dataclass
class Named:
    path: str = "/v1/chat/completions"
    body: str = "chat"
    url: str = "http://a"


@dataclass
class Ended:
    """As much of an record as is looked at."""

    status: int = 200
    outcome: str = "done"
    streaming: bool = True
    started_at: float = 0.0
    first_byte_at: float | None = None
    ended_at: float | None = None
    request_id: str = "id"
    route: Named = field(default_factory=Named)
    upstream: Named | None = None
    error: tuple[str, str] | None = None


def add(recent: RecentRequests, *ended: Ended) -> None:
    recent.add([cast(Record, one) for one in ended])  # which has more than is looked at here


def statistics(*ended: Ended) -> dict[str, float | None]:
    recent = RecentRequests(None)
    for one in ended:
        add(recent, one)
    return recent.report()["opea_service@llm"]


def figures(*ended: Ended) -> PageFigures:
    page = PageFigures()
    add(RecentRequests(page), *ended)
    return page


def test_without_calls_there_are_no_statistics() -> None:
    found = statistics()
    assert list(found) == [
        "p50_latency",
        "p99_latency",
        "average_latency",
        "p50_latency_first_token",
        "p99_latency_first_token",
        "average_latency_first_token",
    ]
    assert set(found.values()) == {None}


def test_percentiles_are_times_of_calls_that_were_made() -> None:
    assert statistics(
        *(Ended(ended_at=number, first_byte_at=number / 10 if number % 2 else None) for number in range(1, 101))
    ) == {
        "p50_latency": 50.0,
        "p99_latency": 99.0,
        "average_latency": 50.5,
        "p50_latency_first_token": 4.9,
        "p99_latency_first_token": 9.9,
        "average_latency_first_token": 5.0,
    }


@pytest.mark.parametrize("before", [1, 999, 1000, 1001, 2500])
def test_statistics_are_of_the_last_thousand_calls(before: int) -> None:
    slow, fast = Ended(ended_at=100.0, first_byte_at=50.0), Ended(ended_at=1.0, first_byte_at=0.5)
    found = statistics(*[slow] * before, *[fast] * 1000)
    assert found["average_latency"] == found["p99_latency"] == 1.0
    assert found["average_latency_first_token"] == 0.5


@pytest.mark.parametrize(
    ("ended", "in_statistics", "on_page"),
    [
        (Ended(), True, True),
        (Ended(streaming=False), True, False),
        (Ended(route=Named(body="json")), False, True),
        (Ended(status=201), False, True),
        (Ended(status=400), False, False),
        (Ended(outcome="client_left"), False, False),
    ],
)
def test_statistics_are_of_chat_calls_and_the_page_shows_all_streams(
    ended: Ended, in_statistics: bool, on_page: bool
) -> None:
    ended.first_byte_at, ended.ended_at = 1.0, 2.0
    found = statistics(ended)
    assert found["p50_latency"] == (2.0 if in_statistics else None)
    assert found["p50_latency_first_token"] == (1.0 if in_statistics and ended.streaming else None)
    assert figures(ended).first_tokens(0.0) == ((1.0, 1.0) if on_page else None)


def test_first_tokens_are_those_that_came_since() -> None:
    page = figures(*(Ended(started_at=at, first_byte_at=at + (at + 1) / 100) for at in range(100)))
    assert page.first_tokens(-math.inf) == pytest.approx((0.5, 0.99))
    assert page.first_tokens(90.0) == pytest.approx((0.95, 1.0), abs=0.01)
    assert page.first_tokens(1000.0) is None
    assert figures().first_tokens(-1.0) is None


def test_of_very_many_the_last_first_tokens_count() -> None:
    slow = (Ended(started_at=at, first_byte_at=at + 1) for at in range(1000))
    page = figures(*slow, *(Ended(started_at=at, first_byte_at=at + 3) for at in range(1000)))
    assert page.first_tokens(-math.inf) == (3, 3)


@pytest.mark.parametrize(
    ("ended", "failed"),
    [
        (Ended(), 0),
        (Ended(status=400), 1),
        (Ended(outcome="upstream_error"), 1),
        (Ended(status=504, outcome="timeout:total"), 1),
        (Ended(status=499, outcome="client_left"), 0),
        (Ended(outcome="client_left"), 0),
    ],
)
def test_request_whose_client_left_has_not_failed(ended: Ended, failed: int) -> None:
    page = figures(ended)
    assert (page.requests, page.failed, len(page.failures)) == (1, failed, failed)


def test_the_last_failures_are_kept() -> None:
    page = figures(*(Ended(status=500, request_id=str(number)) for number in range(50)))
    assert page.failed == 50
    assert [failure["request_id"] for failure in page.failures] == [str(number) for number in range(30, 50)]


def test_a_failure_has_the_code_and_the_sentence_of_our_own_error() -> None:
    told, untold = figures(
        Ended(status=404, error=("model_not_found", "No such model" + "." * 1000)), Ended(status=400)
    ).failures
    assert (told["code"], told["message"]) == ("model_not_found", "No such model" + "." * 387)
    assert (untold["code"], untold["message"]) == (None, None)


@pytest.mark.usefixtures("way")
def test_statistics_tell_of_chat_calls_that_were_answered(fake: FakeVllm, client: httpx.Client) -> None:
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
