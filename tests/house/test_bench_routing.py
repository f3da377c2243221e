"""The simulated servers do what vLLM does as far as routing goes, and the report says what came of it."""

from __future__ import annotations

from random import Random
from xml.etree import ElementTree

import pytest

from bench.routing import report
from bench.routing.memory import Memory, memory
from bench.routing.policies import POLICIES, BoundedHashing
from bench.routing.servers import Cache, Running, Server
from bench.routing.simulation import Figures, cached_by_one, figures, simulate
from bench.routing.workloads import BLOCK, WORKLOADS, Call, any_text, blocks_of, chat_call
from gateway.pool.upstream_pool import Upstream


def running(tokens: int, answer: int, *, shared: str = "") -> Running:
    text = shared + any_text(Random(tokens), tokens - len(shared) // 4)
    return Running(chat_call(0, [text], answer), Upstream.from_url("http://v"), 0)


def test_a_cache_drops_what_was_used_the_longest_ago_and_of_a_prompt_its_end() -> None:
    cache = Cache(6 * BLOCK)
    assert cache.use([1, 2, 3, 4]) == 0
    assert cache.use([5, 6]) == 0
    assert cache.use([1, 2, 7]) == 2  # in the place of 4, the end of the first
    assert cache.held([1, 2, 3, 4]) == 3
    assert cache.use([8, 9]) == 0  # in the place of 3, and of 6, as the second is the oldest now
    assert [cache.held(prompt) for prompt in ([1, 2, 3], [5, 6], [1, 2, 7], [8, 9])] == [2, 1, 3, 2]


def test_a_block_stands_for_all_that_is_before_it() -> None:
    text = any_text(Random(1), 10 * BLOCK)
    assert len(blocks_of(text)) == len(blocks_of(text + "x" * 63)) == 10
    assert blocks_of(text) == blocks_of(text + "x")
    changed = blocks_of("x" + text[1:])
    assert set(changed).isdisjoint(blocks_of(text))


def test_a_step_takes_as_long_as_its_tokens_and_no_more_than_2048_of_them() -> None:
    server, first, second = Server(), running(3000, 3), running(100, 1)
    server.waiting += [first, second]
    assert server.queued == 2
    assert server.begin() == pytest.approx(0.008 + 2048 * 60e-6)
    assert server.end() == ([], [])
    assert server.queued == 1
    assert server.begin() == pytest.approx(0.008 + (952 + 100) * 60e-6)
    assert server.end() == ([first, second], [second])
    # Two more tokens of the first, a step each.
    assert server.begin() == pytest.approx(0.008 + 60e-6)
    assert server.end() == ([], [])
    assert not server.idle
    server.begin()
    assert server.end() == ([], [first])
    assert (server.idle, server.usage) == (True, 0)


def test_what_the_cache_has_is_not_computed_again_but_for_the_last_token() -> None:
    server, shared = Server(), any_text(Random(0), 1600)
    for one, cached in ((running(1700, 1, shared=shared), 0), (running(1800, 1, shared=shared), 1600)):
        server.waiting.append(one)
        assert server.begin() == pytest.approx(0.008 + (one.call.tokens - cached) * 60e-6)
        assert one.cached == cached
        server.end()
    again = running(1600, 1, shared=shared)
    server.waiting.append(again)
    server.begin()
    assert again.cached == 1599


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_every_call_and_leaves_nothing_counted(policy: str) -> None:
    random = Random(1)
    gateways = [POLICIES[policy](random) for _ in range(3)]
    calls = list(WORKLOADS["unique"](random, 4))
    taken = simulate(calls, gateways, random)
    assert [one.call for one in taken] == calls
    assert all(one.first_byte_at >= one.call.at + 0.008 + one.call.tokens * 60e-6 for one in taken)
    assert {(one.in_flight, one.awaited) for gateway in gateways for one in gateway.upstreams} == {(0, 0)}


def test_bounded_hashing_stays_with_one_upstream_up_to_a_quarter_above_the_mean() -> None:
    policy, call = BoundedHashing(Random(1)), chat_call(0, ["x" * 1000], 1)
    home = policy.choose(call, 0)
    for one in policy.upstreams:
        one.in_flight = 8
    assert policy.choose(call, 0) is home
    home.in_flight = 11
    assert policy.choose(call, 0) is not home


def test_figures_are_of_the_calls_after_the_warm_up() -> None:
    calls = [chat_call(at, ["x" * 6400], 1) for at in (0.0, 1.0, 2.0, 3.0)]
    random = Random(1)
    taken = simulate(calls, [POLICIES["round robin"](random)], random)
    by_one = cached_by_one(calls, 1, 10_000)
    assert by_one == 3 * 1600
    found = figures(taken, 1, by_one)
    assert found.hits == 0  # as each went to a server of its own
    assert found.p50 == found.p99 == pytest.approx(0.008 + 1600 * 60e-6)
    assert found.busiest == pytest.approx(8 / 3)


def test_the_workloads_come_in_order_and_as_often_as_said() -> None:
    rates = {"rag1": 54, "rag": 28, "chat": 63, "hot": 70, "unique": 45}
    assert rates.keys() == WORKLOADS.keys()
    for name, make in WORKLOADS.items():
        calls: list[Call] = list(make(Random(2), 10))
        assert len(calls) == pytest.approx(rates[name] * 10, rel=0.2)
        times = [call.at for call in calls]
        assert times == sorted(times)
        assert 0 <= times[0] < times[-1] < 10


def test_what_is_held_for_calls_is_flat_and_for_models_that_none_serves_nothing() -> None:
    """As the bench shows it of a million: in 20,000 calls there are as many counts, but less high ones."""
    found = memory(60_000)
    empty = found["unknown models"].most  # the list of orders, none of which is made
    for kind, (most, since_full, since_steady) in found.items():
        if kind in ("unique", "several models"):
            assert empty + 10**6 < most <= 3 * 10**6
            assert 0 <= since_steady <= 10_000
            assert since_steady <= since_full <= 500_000
        else:
            assert most - empty < 10_000
            assert since_full == since_steady == 0


def results(hits: float, p99: float) -> report.Results:
    own, least = [Figures(hits, 0.1, p99, 1.1)] * 3, [Figures(0.5, 1, 1, 1)] * 3
    return {
        (workload, gateways, policy): seeds
        for workload in WORKLOADS
        for gateways in (1, 3)
        for policy, seeds in (("gateway", own), ("least", least))
    }


def test_a_bar_that_is_missed_is_said_to_be() -> None:
    costs = {
        ("4 KB", 2): {"before": 1.0, "least": 0.5, "common": 2.0, "all hot": 20.0},
        ("4 KB", 8): {"before": 2.0, "least": 0.5, "common": 2.0, "all hot": 20.0},
    }
    bars = report.bars(results(0.98, 1.5), costs, {"one": Memory(1000, 0, 0), "unique": Memory(3 * 10**6, 500_000, 0)})
    assert len(bars) == 18
    assert all(bar.holds for bar in bars)
    for one in costs.values():
        one["common"], one["all hot"] = 2.1, 20.1
    missed = report.bars(results(0.89, 2.1), costs, {"unique": Memory(3_100_000, 600_000, 20_000)})
    assert [bar.holds for bar in missed] == [*[False] * 4, True] * 2 + [False] * 8
    assert report.bars_as_text(missed).count("**misses**") == 16
    assert "| 4 KB | 8 | 2.0 | 0.5 | 2.1 | - | 20.1 | 1.05 | 4.20 | 10.05 | 40.20 |" in report.costs_table(costs)


def test_the_tables_and_the_chart_show_medians() -> None:
    found = results(0.98, 1.5) | {("rag1", 1, "least"): [Figures(0.5, 1, p99, 1) for p99 in (3, 21, 22)]}
    assert "| gateway | 0.98, 100/1500, 1.10 |" in report.table(found, 3)
    assert "| least | 0.50, 1000/> 20 s, 1.00 |" in report.table(found, 1)
    texts = [element.text for element in ElementTree.fromstring(report.chart(found)).iter()]
    assert {"gateway", "least", "0.98", "21 (cut)"} <= set(texts)
