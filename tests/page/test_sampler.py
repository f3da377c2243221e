"""What a sample is made of: vLLM's own metrics as text, what ended lately, and rates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import pytest

from gateway.page.recent_requests import Recent
from gateway.page.sampler import _Rate
from gateway.page.vllm_metrics import VllmLoad, read
from gateway.relay.record import Record
from tests.support.fake_vllm import METRICS

TWO_ENGINES = METRICS + METRICS.replace(b'engine="0"', b'engine="1"').replace(b"0.25", b"0.5")


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (METRICS, VllmLoad(2, 1, 0.25, 202)),
        (TWO_ENGINES, VllmLoad(4, 2, 0.5, 404)),
        (b"", None),
        (b"<html>", None),
        (METRICS.replace(b"vllm:kv_cache_usage_perc", b"vllm:other"), None),
        (METRICS.replace(b" 2.0", b" many"), None),
        (METRICS.replace(b" 0.25", b" NaN"), None),
    ],
)
def test_a_vllm_tells_how_busy_it_is(text: bytes, load: VllmLoad | None) -> None:
    assert read(text.decode()) == load


@dataclass
class Named:
    path: str = "/v1/chat/completions"
    url: str = "http://a"


@dataclass
class Ended:
    """As much of an exchange as is looked at."""

    status: int = 200
    outcome: str = "done"
    streaming: bool = True
    started_at: float = 0.0
    first_byte_at: float | None = None
    request_id: str = "id"
    route: Named = field(default_factory=Named)
    upstream: Named | None = None


def added(*ended: Ended, to: Recent | None = None) -> Recent:
    recent = to or Recent()
    recent.add([cast(Record, one) for one in ended])  # which has more than is looked at here
    return recent


def test_first_tokens_are_those_that_came_since() -> None:
    recent = added(*(Ended(started_at=at, first_byte_at=at + (at + 1) / 100) for at in range(100)))
    assert recent.first_tokens(-math.inf) == pytest.approx((0.5, 0.99))
    assert recent.first_tokens(90.0) == pytest.approx((0.95, 1.0), abs=0.01)
    assert recent.first_tokens(1000.0) is None
    assert Recent().first_tokens(-1.0) is None


def test_of_very_many_the_last_first_tokens_count() -> None:
    recent = added(*(Ended(started_at=at, first_byte_at=at + 1) for at in range(1000)))
    added(*(Ended(started_at=at, first_byte_at=at + 3) for at in range(1000)), to=recent)
    assert recent.first_tokens(-math.inf) == (3, 3)


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
def test_who_left_has_not_failed(ended: Ended, failed: int) -> None:
    recent = added(ended)
    assert (recent.requests, recent.failed, len(recent.failures)) == (1, failed, failed)


def test_the_last_failures_are_kept() -> None:
    recent = added(*(Ended(status=500, request_id=str(number)) for number in range(50)))
    assert recent.failed == 50
    assert [failure["request_id"] for failure in recent.failures] == [str(number) for number in range(30, 50)]


def rate(*counts: tuple[float, float]) -> float | None:
    counted = _Rate()
    for now, count in counts:
        counted.add(now, count)
    return counted.a_second


@pytest.mark.parametrize(
    ("counts", "a_second"),
    [
        ([(0, 7)], None),
        ([(0, 7), (1, 9)], 2),
        ([(at, at * at) for at in range(20)], 33),  # over five seconds: 14 * 14 to 19 * 19
        ([(0, 100), (1, 200), (2, 5)], None),  # it has started anew
        ([(0, 100), (1, 200), (2, 5), (3, 6)], 1),
        ([(0, 100), (1, 200), (60, 300), (61, 303)], 3),  # nobody watched meanwhile
    ],
)
def test_a_rate_is_that_of_the_last_seconds(counts: list[tuple[float, float]], a_second: float | None) -> None:
    assert rate(*counts) == a_second
