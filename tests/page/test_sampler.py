"""What a sample is made of: vLLM's own metrics as text, and rates."""

from __future__ import annotations

import pytest

from gateway.page.sampler import _HitRate, _Rate
from gateway.upstream.vllm_metrics import VllmLoad, read
from tests.support.fake_vllm import METRICS

TWO_ENGINES = METRICS + METRICS.replace(b'engine="0"', b'engine="1"').replace(b"0.25", b"0.5")

HITS = (
    b'vllm:prefix_cache_queries_total{engine="0",model_name="demo"} 400.0\n'
    b'vllm:prefix_cache_hits_total{engine="0",model_name="demo"} 300.0\n'
)


@pytest.mark.parametrize(
    ("text", "load"),
    [
        (METRICS, VllmLoad(2, 1, 0.25, 202, 0, 0)),
        (TWO_ENGINES, VllmLoad(4, 2, 0.5, 404, 0, 0)),
        (METRICS + HITS, VllmLoad(2, 1, 0.25, 202, 400, 300)),
        (METRICS + HITS.replace(b" 300.0", b" NaN"), None),
        (b"", None),
        (b"<html>", None),
        (METRICS.replace(b'"demo"', b'"my demo"'), VllmLoad(2, 1, 0.25, 202, 0, 0)),
        (METRICS.replace(b'"demo"', b'"{a} 7, b=\\"c\\" \\\\"'), VllmLoad(2, 1, 0.25, 202, 0, 0)),
        (METRICS.replace(b'{engine="0",model_name="demo"}', b"{}"), VllmLoad(2, 1, 0.25, 202, 0, 0)),
        (METRICS.replace(b" 0.25", b"\t2.5e-1  1795215799000"), VllmLoad(2, 1, 0.25, 202, 0, 0)),
        (METRICS.replace(b"\n", b"\r\n"), VllmLoad(2, 1, 0.25, 202, 0, 0)),
        (METRICS.replace(b"vllm:kv_cache_usage_perc", b"vllm:other"), None),
        (METRICS.replace(b" 2.0", b" many"), None),
        (METRICS.replace(b" 0.25", b" NaN"), None),
        (METRICS.replace(b" 0.25", b" +Inf"), None),
        (METRICS.replace(b" 0.25", b""), None),
        (METRICS.replace(b" 0.25", b" " + b"9" * 400), None),
        (METRICS.replace(b'"demo"', b"demo"), None),
        (METRICS.replace(b'"demo"} ', b'"demo" '), None),
        (METRICS.replace(b'{engine="0"', b'{, ="0"'), None),
        (METRICS.replace(b'{engine="0"', b"{" + b",".join(b'l%d=""' % at for at in range(30_000))), None),
    ],
)
def test_a_vllm_tells_how_busy_it_is(text: bytes, load: VllmLoad | None) -> None:
    assert read(text.decode()) == load


def test_whole_numbers_are_read_as_decimals_are() -> None:
    # As the JSON of the page's figures tells them apart.
    assert repr(read(METRICS.decode().replace(".0", ""))) == repr(read(METRICS.decode()))


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


@pytest.mark.parametrize(
    ("samples", "part"),
    [
        ([], None),
        ([(0, 7, 9)], None),
        ([(0, 7, 9), (1, 7, 9)], None),  # nobody asked
        ([(0, 7, 9), (1, 8, 13)], 0.25),
        ([(at, 0, 10 * at) for at in range(100)] + [(at, 5 * (at - 99), 10 * at) for at in range(100, 159)], 0.5),
        ([(0, 70, 90), (1, 0, 0)], None),  # it has started anew
        ([(0, 70, 90), (1, 0, 0), (2, 3, 4)], 0.75),
        ([(0, 0, 0), (60, 50, 100), (61, 60, 200)], 0.1),  # nobody watched meanwhile
    ],
)
def test_prefix_hits_are_a_part_of_what_was_asked_in_the_last_minute(
    samples: list[tuple[float, float, float]], part: float | None
) -> None:
    hits = _HitRate()
    for sample in samples:
        hits.add(*sample)
    assert hits.part == part
