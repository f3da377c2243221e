"""Which upstream takes the next call."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.owners import Owner
from gateway.pool.upstream_pool import State, Upstream, UpstreamPool

STATES: list[State] = ["serving", "loading", "down"]


def upstream(
    name: str = "a", state: State = "serving", models: tuple[str, ...] = ("m",), in_flight: int = 0
) -> Upstream:
    made = Upstream.from_url(f"http://{name}:8008")
    made.state, made.models, made.in_flight = state, models, in_flight
    return made


def broken(made: Upstream, times: int, now: float = 0.0) -> Upstream:
    for _ in range(times):
        made.record_failure(now)
    return made


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "prefix", "authority"),
    [
        ("http://vllm:8008", "vllm", 8008, False, "", "vllm:8008"),
        ("http://vllm", "vllm", 80, False, "", "vllm"),
        ("https://vllm", "vllm", 443, True, "", "vllm"),
        ("https://vllm:8443/pre/fix", "vllm", 8443, True, "/pre/fix", "vllm:8443"),
        ("http://[::1]:8008", "::1", 8008, False, "", "[::1]:8008"),
        ("http://10.0.0.7:1", "10.0.0.7", 1, False, "", "10.0.0.7:1"),
    ],
)
def test_a_url_says_where_an_upstream_is(
    url: str, host: str, port: int, tls: bool, prefix: str, authority: str
) -> None:
    made = Upstream.from_url(url)
    assert (made.url, made.host, made.port, made.tls) == (url, host, port, tls)
    assert (made.prefix, made.authority) == (prefix, authority)


def test_an_upstream_that_was_not_asked_yet_is_loading_and_never_served() -> None:
    made = Upstream.from_url("http://vllm")
    assert made.state == "loading"
    assert not made.ever_served
    assert not made.failing(0)


@pytest.mark.parametrize(
    ("times", "later", "failing"), [(2, 0, False), (3, 0, True), (3, 14.9, True), (3, 15, False), (4, 14.9, True)]
)
def test_three_broken_calls_in_a_row_make_an_upstream_fail_for_fifteen_seconds(
    times: int, later: float, failing: bool
) -> None:
    assert broken(upstream(), times, now=100).failing(100 + later) is failing


def test_a_success_ends_the_row_of_broken_calls() -> None:
    made = broken(upstream(), 3)
    made.record_success()
    broken(made, 2)
    assert not made.failing(0)


def test_a_trial_that_breaks_makes_it_fail_again_at_once() -> None:
    made = broken(upstream(), 3, now=0)
    made.record_failure(20)
    assert made.failing(20)


def test_the_upstream_with_the_fewest_calls_in_flight_is_chosen() -> None:
    few = upstream("few", in_flight=1)
    pool = UpstreamPool((upstream("many", in_flight=2), few, upstream("more", in_flight=3)))
    assert all(pool.select("m", 0) is few for _ in range(6))


def test_ties_go_round() -> None:
    pool = UpstreamPool((upstream("a"), upstream("b"), upstream("c")))
    chosen = Counter(one.host for _ in range(9) if (one := pool.select("m", 0)))
    assert chosen == {"a": 3, "b": 3, "c": 3}


def test_ties_go_round_for_each_model_however_the_models_alternate() -> None:
    pool = UpstreamPool((upstream("a1", models=("a",)), upstream("a2", models=("a",)), upstream("b", models=("b",))))
    chosen = Counter(one.host for at in range(12) if (one := pool.select("ab"[at % 2], 0)))
    assert chosen == {"a1": 3, "a2": 3, "b": 6}


@pytest.mark.parametrize("model", ["other", None])
def test_a_model_that_none_serves_is_for_any_of_them_to_refuse(model: str | None) -> None:
    pool = UpstreamPool((upstream("a"), upstream("b")))
    assert {one.host for _ in range(4) if (one := pool.select(model, 0))} == {"a", "b"}


def test_only_an_upstream_that_serves_the_model_is_chosen() -> None:
    right = upstream("right", state="down", models=("other", "m"), in_flight=9)
    assert UpstreamPool((upstream("wrong", models=("other",)), right)).select("m", 0) is right


def test_one_that_serves_goes_before_one_that_fails_and_that_before_one_that_is_not_there() -> None:
    serving = upstream("serving", in_flight=9)
    failing = broken(upstream("failing", in_flight=5), 3)
    loading, down = upstream("loading", "loading", in_flight=1), upstream("down", "down", in_flight=2)
    pool = UpstreamPool((down, failing, loading, serving))
    assert pool.select("m", 0) is serving
    assert pool.select_other("m", 0, instead_of=serving, ready=False) is failing
    assert pool.select_other("m", 0, instead_of=serving, ready=True) is None
    assert serving.failovers == 1
    assert UpstreamPool((down, loading)).select("m", 0) is loading


@pytest.mark.parametrize("other", [upstream("b", "down"), broken(upstream("b"), 3)])
def test_a_worse_one_does_not_stand_in_for_one_that_is_full(other: Upstream) -> None:
    good = upstream("a", in_flight=2)
    pool = UpstreamPool((good, other), max_in_flight_per_upstream=2)
    assert pool.select("m", 0) is None
    good.in_flight = 1
    assert pool.select("m", 0) is good


def test_one_that_failed_is_tried_again_in_its_turn_when_its_time_has_come() -> None:
    failed = broken(upstream("failed"), 3, now=0)
    pool = UpstreamPool((failed, upstream("busy", in_flight=1)))
    assert pool.select("m", 14.9) is not failed
    assert pool.select("m", 15) is failed
    assert pool.select("m", 15) is not failed  # one call is the trial
    assert pool.select("m", 30) is failed
    failed.record_success()
    assert pool.select("m", 30) is failed


def test_calls_that_are_tried_again_are_a_part_of_all_calls() -> None:
    first = upstream("first")
    pool = UpstreamPool((first, upstream("second")))
    retried = [pool.select_other("m", 0, instead_of=first, ready=True) for _ in range(150)]
    assert sum(one is not None for one in retried) == first.failovers == 100
    for _ in range(40):
        pool.select("m", 0)
    retried = [pool.select_other("m", 0, instead_of=first, ready=True) for _ in range(50)]
    assert sum(one is not None for one in retried) == 10


def test_calls_for_which_there_is_no_room_earn_no_second_tries() -> None:
    first = upstream("first")
    pool = UpstreamPool((first, upstream("second")), max_in_flight_per_upstream=1)
    while pool.select_other("m", 0, instead_of=first, ready=True):
        continue
    for one in pool:
        one.in_flight = 1
    assert [pool.select("m", 0) for _ in range(100)] == [None] * 100
    for one in pool:
        one.in_flight = 0
    assert pool.select_other("m", 0, instead_of=first, ready=True) is None


def test_one_that_fails_its_calls_is_said_to_be_down() -> None:
    failed = broken(upstream(), 3, now=0)
    assert failed.status(1) == ("down", "its last calls broke, 3 in a row")
    assert failed.status(15) == ("serving", failed.why)


@pytest.mark.parametrize(
    ("whose", "state"),
    [
        ("aaa", "serving"),
        ("aaaaaa", "serving"),
        ("aab", "down"),
        ("abb", "down"),
        ("abab", "down"),
        ("aa-", "down"),  # a connection that was lost, or a limit that passed: whose call it was does not matter
        ("-aa", "down"),
        ("---", "down"),
        ("ab+aaa", "serving"),
        ("aaa+bbb", "serving"),
        ("aaa+aab", "down"),
    ],
)
def test_one_callers_word_makes_none_down_but_is_gone_round(whose: str, state: State) -> None:
    made, owners = upstream(), {"a": Owner(), "b": Owner(), "-": None}
    for one in whose:
        if one == "+":
            made.record_success()
        else:
            made.record_failure(0, owners[one])
    assert made.status(1)[0] == state
    assert made.failing(1)


def test_there_is_room_for_so_many_calls_on_each_and_in_all() -> None:
    first, second = upstream("first", in_flight=2), upstream("second", in_flight=1)
    assert UpstreamPool((first, second), max_in_flight_per_upstream=2).select("m", 0) is second
    assert UpstreamPool((first, second), max_in_flight=3).select("m", 0) is None
    assert UpstreamPool((first, second), max_in_flight=4, max_in_flight_per_upstream=1).select("m", 0) is None
    assert UpstreamPool((first,), max_in_flight_per_upstream=2).select("m", 0) is None
    assert UpstreamPool((first,), max_in_flight=2).select("m", 0) is None
    assert UpstreamPool((first,), max_in_flight=3).select("m", 0) is first
    assert (
        UpstreamPool((first, second), max_in_flight_per_upstream=1).select_other("m", 0, instead_of=first, ready=True)
        is None
    )


@pytest.mark.parametrize("most", [1, 2, 6])
def test_however_calls_come_and_go_there_is_room_for_so_many_and_no_more(most: int) -> None:
    """Those that run on an upstream that has left the pool take no room until it is back."""
    pool = UpstreamPool(tuple(upstream(name) for name in "abcd"), max_in_flight=most)
    random, running, left = Random(most), list[Upstream](), list[Upstream]()
    for _ in range(5000):
        event = random.choice(["call", "call", "end", "second try", "leave", "come"])
        if event == "call":
            full = sum(one.in_flight for one in pool) >= most
            chosen = pool.select("m", 0)
            assert (chosen is None) is full
            if chosen is not None:
                chosen.in_flight += 1
                running.append(chosen)
        elif event == "leave" and len(pool) > 2:
            gone, *others = pool
            left.append(gone)
            pool.replace(tuple(others))
        elif event == "come":
            pool.replace((*pool, *left))
            left.clear()
        elif running:
            before = running.pop(random.randrange(len(running)))
            before.in_flight -= 1
            if event == "second try" and (other := pool.select_other("m", 0, instead_of=before, ready=True)):
                other.in_flight += 1
                running.append(other)


@pytest.mark.parametrize("state", STATES)
def test_the_only_upstream_is_chosen_however_it_is(state: State) -> None:
    only = broken(upstream(state=state, models=()), 3)
    assert UpstreamPool((only,)).select("m", 0) is only
    assert UpstreamPool((only,)).select_other("m", 0, instead_of=only, ready=False) is None


def test_no_second_upstream_is_left_where_the_first_alone_serves_the_model() -> None:
    first = upstream("first")
    pool = UpstreamPool((first, upstream("second", models=("x",))))
    assert pool.select_other("m", 0, instead_of=first, ready=False) is None


UPSTREAMS = st.builds(
    upstream,
    st.sampled_from("abcd"),
    st.sampled_from(STATES),
    st.sampled_from([(), ("m",), ("n",), ("m", "n")]),
    st.integers(0, 3),
)


@given(st.lists(UPSTREAMS, min_size=1, max_size=5), st.sampled_from(["m", "n", "x", None]))
def test_some_upstream_is_always_chosen_and_never_the_one_left_out(many: list[Upstream], model: str | None) -> None:
    pool = UpstreamPool(tuple(many))
    first = pool.select(model, 0)
    assert first in many
    assert first is not None
    assert pool.select_other(model, 0, instead_of=first, ready=False) is not first


def test_the_pools_models_are_each_named_once_in_the_upstreams_order() -> None:
    pool = UpstreamPool((upstream(models=("b", "a")), upstream(models=()), upstream(models=("c", "b"))))
    assert pool.models == ("b", "a", "c")
    assert len(list(pool)) == 3
