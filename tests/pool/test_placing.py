"""Which upstream takes a call that has a key: what holds without one, by its order."""

from __future__ import annotations

import heapq
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pool.prefixes import HOT, NEW
from gateway.pool.upstream_pool import Upstream, UpstreamPool
from tests.pool.test_upstream_pool import STATES, broken, upstream

KEY = 4711


def placed(*names: str, **limits: float) -> tuple[UpstreamPool, list[Upstream]]:
    """A pool, and its upstreams in the order that the key has of them."""
    pool = UpstreamPool(tuple(upstream(name) for name in names or "abcd"), by_prefix=True, **limits)
    group = pool._group("m")
    assert group is not None
    return pool, [group.upstreams[number] for number in group.places.of(KEY)]


def test_a_key_is_at_its_first_place_until_that_is_much_busier() -> None:
    pool, order = placed()
    for load in range(65):
        order[0].in_flight = load
        assert pool.select("m", 0, key=KEY) is order[0]
    order[0].in_flight = 65
    assert pool.select("m", 0, key=KEY) is order[1]
    order[1].in_flight = 2
    assert pool.select("m", 0, key=KEY) is order[0]
    order[0].in_flight, order[1].in_flight = 134, 80
    assert pool.select("m", 0, key=KEY) is order[2]
    assert pool.routed == {"first": 66, "spilled": 2, "hot": 0, "least": 0, "retried": 0}


def test_a_stream_that_awaits_its_first_byte_is_eight_calls() -> None:
    pool, order = placed()
    order[0].in_flight = order[0].awaited = 8
    assert pool.select("m", 0, key=KEY) is order[0]
    order[0].in_flight = order[0].awaited = 9
    assert pool.select("m", 0, key=KEY) is order[1]


def test_a_prompt_that_was_never_seen_gives_way_sooner() -> None:
    pool, order = placed()
    order[0].in_flight = 8
    assert pool.select("m", 0, key=KEY + NEW) is order[0]
    order[0].in_flight = 9
    assert pool.select("m", 0, key=KEY + NEW) is order[1]
    assert pool.select("m", 0, key=KEY) is order[0]
    body = b'"messages"' + b"x" * 500
    keys = [pool.key_of("m", None, body) for _ in range(2)]
    assert keys[0] is not None
    assert keys[1] == keys[0] - NEW >= 0


def test_a_heavy_one_takes_more_before_others_do() -> None:
    pool, order = placed()
    order[0].in_flight, order[0].weight = 128, 2.0
    assert pool.select("m", 0, key=KEY) is order[0]
    order[0].in_flight = 129
    assert pool.select("m", 0, key=KEY) is order[1]


@pytest.mark.parametrize("key", [None, HOT])
def test_without_a_key_it_is_the_least_busy(key: int | None) -> None:
    pool, _ = placed()
    chosen = Counter(one.host for _ in range(8) if (one := pool.select("m", 0, key=key)))
    assert set(chosen.values()) == {2}
    assert pool.routed["least" if key is None else "hot"] == 8


def test_one_that_is_full_is_passed_over_and_where_all_are_the_call_waits() -> None:
    pool, order = placed(max_in_flight_per_upstream=2)
    order[0].in_flight = 2
    assert pool.select("m", 0, key=KEY) is order[1]
    for one in order:
        one.in_flight = 2
    assert pool.select("m", 0, key=KEY) is None
    # A call that leaves the queue has its key still.
    order[3].in_flight = 1
    assert pool.select("m", 0, key=KEY) is order[3]
    order[0].in_flight = order[3].in_flight = 1
    assert pool.select("m", 0, key=KEY) is order[0]


def test_in_all_there_is_room_for_so_many() -> None:
    pool, order = placed(max_in_flight=3)
    order[3].in_flight = 3
    assert pool.select("m", 0, key=KEY) is None


def test_keys_of_one_that_is_not_there_are_at_their_second_place_and_come_home() -> None:
    pool, order = placed()
    for away in (lambda: setattr(order[0], "state", "down"), lambda: broken(order[0], 3)):
        away()
        assert pool.select("m", 0, key=KEY) is order[1]
        assert pool.select_other("m", 0, instead_of=order[1], ready=True, key=KEY) is order[2]
        order[0].state, order[0].broken_in_a_row = "serving", 0
        assert pool.select("m", 0, key=KEY) is order[0]


def test_a_worse_one_stands_in_only_where_no_better_is_there() -> None:
    pool, order = placed(max_in_flight_per_upstream=2)
    for one in order[1:]:
        one.state = "down"
    order[0].in_flight = 2
    assert pool.select("m", 0, key=KEY) is None
    order[0].state = "down"
    assert pool.select("m", 0, key=KEY) in order


def test_one_that_failed_gets_one_call_of_its_keys_for_a_trial() -> None:
    pool, order = placed()
    broken(order[0], 3, now=0)
    assert pool.select("m", 14.9, key=KEY) is order[1]
    assert pool.select("m", 15, key=KEY) is order[0]
    assert pool.select("m", 15, key=KEY) is order[1]
    order[0].record_success()
    assert pool.select("m", 15, key=KEY) is order[0]


def test_a_call_that_one_did_not_take_goes_to_its_next_place() -> None:
    pool, order = placed()
    assert pool.select_other("m", 0, instead_of=order[0], ready=True, key=KEY) is order[1]
    assert pool.select_other("m", 0, instead_of=order[1], ready=True, key=KEY) is order[0]
    assert (order[0].failovers, pool.routed["retried"]) == (1, 2)
    for _ in range(200):
        pool.select_other("m", 0, instead_of=order[0], ready=True, key=KEY)
    assert pool.routed["retried"] == 100
    assert pool.select_other("m", 0, instead_of=order[0], ready=True, key=KEY) is None


def test_a_key_is_of_the_upstreams_that_serve_its_model() -> None:
    pool, order = placed()
    order[0].models = ("other",)
    pool.set_models(order[1], ("m", "other"))  # which has all looked at anew
    assert pool.select("m", 0, key=KEY) is order[1]
    assert pool.select("other", 0, key=KEY) in order[:2]
    assert pool.key_of("none", None, b"x" * 500) is None
    assert pool.key_of(None, None, b"x" * 500) is None
    assert pool.key_of("m", None, b"x" * 500) is not None


def test_one_upstream_counts_nothing() -> None:
    pool = UpstreamPool((upstream(),), by_prefix=True)
    assert pool.prefixes is None
    assert pool.key_of("m", None, b"x" * 500) is None
    assert UpstreamPool((upstream("a"), upstream("b"))).prefixes is None


def test_a_model_of_one_upstream_among_several_counts_nothing() -> None:
    pool = UpstreamPool((upstream("a", models=("m", "n")), upstream("b", models=("n",))), by_prefix=True)
    assert pool.key_of("m", None, b"x" * 500) is None
    assert pool.prefixes is not None
    assert not pool.prefixes._young


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("often", ["all alike", "few"])
def test_a_beginning_that_most_share_is_on_every_upstream_soon_and_no_burden_to_any(often: str, seed: int) -> None:
    """Six calls of ten begin with the same 12 KB, the others with documents, asked for all alike or few of them often.

    70 come a second, and each is streamed, from 0.05 to 0.4 s later on, for 0.5 to 2.5 s.
    """
    random, now = Random(seed), 0.0
    pool = UpstreamPool(tuple(upstream(name) for name in "abcdefgh"), by_prefix=True)
    hot, *documents = [b'"messages"' + random.randbytes(size) for size in (12_000, *[5000] * 500)]
    weights = [1 / rank if often == "few" else 1 for rank in range(1, 501)]
    ends: list[tuple[float, int, Upstream, str]] = []
    taken = {True: list[str](), False: list[str]()}
    for number in range(2000):
        now += random.expovariate(70)
        while ends and ends[0][0] <= now:
            _, _, one, counted = heapq.heappop(ends)
            setattr(one, counted, getattr(one, counted) - 1)
        is_hot = random.random() < 0.6
        body = (hot if is_hot else random.choices(documents, weights)[0]) + random.randbytes(100)
        chosen = pool.select("m", now, key=pool.key_of("m", None, body))
        assert chosen is not None
        chosen.in_flight += 1
        chosen.awaited += 1
        answered = now + random.uniform(0.05, 0.4)
        heapq.heappush(ends, (answered, 2 * number, chosen, "awaited"))
        heapq.heappush(ends, (answered + random.uniform(0.5, 2.5), 2 * number + 1, chosen, "in_flight"))
        taken[is_hot].append(chosen.host)
        if number == 99:
            assert set(taken[True]) == set("abcdefgh")
            learned = len(taken[True])
    # Whoever has documents that are asked for often has less of the others instead.
    for calls in [taken[True] + taken[False], *([] if often == "few" else [taken[True][learned:]])]:
        assert max(Counter(calls).values()) <= 1.3 * len(calls) / 8


UPSTREAMS = st.builds(
    upstream,
    st.text("abcdefgh", min_size=1, max_size=4),
    st.sampled_from(STATES),
    st.sampled_from([(), ("m",), ("n",), ("m", "n")]),
    st.integers(0, 50),
)


@given(
    st.lists(UPSTREAMS, min_size=1, max_size=12),
    st.sampled_from(["m", "n", "x", None]),
    st.none() | st.integers(HOT, 2**32 - 1),
    st.sampled_from([1, 5, 100]),
    st.lists(st.integers(0, 4), max_size=12),
)
def test_with_a_key_the_chosen_one_is_as_good_as_any_and_has_room(
    upstreams: list[Upstream], model: str | None, key: int | None, most: int, breaks: list[int]
) -> None:
    for one, times in zip(upstreams, breaks, strict=False):
        broken(one, times)
    with_key = UpstreamPool(tuple(upstreams), max_in_flight_per_upstream=most, by_prefix=True)
    without = UpstreamPool(tuple(upstreams), max_in_flight_per_upstream=most)
    chosen, other = with_key.select(model, 1, key=key), without.select(model, 1)
    assert (chosen is None) is (other is None)
    if chosen is not None and other is not None:
        assert chosen.in_flight < most
        assert (chosen.state == "serving") is (other.state == "serving")
        if chosen.state == "serving":  # of the others no rank is better
            assert chosen.failing(1) is other.failing(1)
