"""Tokens of a minute: who asks for more than it may gets as many as it may, and no fewer."""

from __future__ import annotations

import heapq
import random

import pytest

from gateway.admission.token_budget import TokenBudget


def test_a_call_reserves_what_it_asks_for_and_gives_back_what_it_did_not_take() -> None:
    budget = TokenBudget(6000)
    assert budget.left(0) == (300, 0.0)
    reserved = budget.reserve(0, 1000)
    assert reserved == 1000
    assert budget.left(0) == (0, 7.0)
    assert budget.reserve(6, 1) is None
    budget.settle(6, reserved, 400)
    assert budget.left(6) == (300, 0.0), "no more than may be saved up"
    assert budget.reserve(6, 1) == 1


def test_a_call_that_does_not_say_reserves_the_mean_of_those_before() -> None:
    budget = TokenBudget(60_000)
    assert budget.reserve(0, None) == 0
    budget.settle(0, 0, 800)
    assert budget.reserve(0, None) == 800
    budget.settle(0, 800, 0)  # of a call that was refused
    budget.settle(0, 0, 1600)
    assert budget.reserve(0, None) == 900
    budget.settle(0, 0, 90_000, told=False)
    assert budget.left(0)[0] == 0
    assert budget.reserve(600, None) == 900, "an estimate leaves it as it is"


def test_a_limit_that_has_changed_holds_from_then_on() -> None:
    budget = TokenBudget(6000)
    reserved = budget.reserve(0, 1000)
    assert reserved is not None
    budget.a_minute = 60_000
    assert budget.left(0) == (0, 0.7)


@pytest.mark.parametrize("seed", range(3))
def test_twenty_keys_at_their_limits_get_what_they_may(seed: int) -> None:
    """Ten minutes; calls of at most a hundredth of the limit, of which a fifth leave early and tell no usage."""
    chance, seconds = random.Random(seed), 600.0
    for limit in (chance.randrange(20_000, 2_000_000) for _ in range(20)):
        budget, used, in_flight = TokenBudget(limit), 0.0, 0
        events: list[tuple[float, int, float, int, int]] = []
        for caller in range(40):
            heapq.heappush(events, (chance.random(), caller, -1.0, 0, 0))
        while events and events[0][0] < seconds:
            now, caller, reserved, took, counted = heapq.heappop(events)
            if reserved >= 0:
                budget.settle(now, reserved, counted)
                used += took
                in_flight -= took
            asked = chance.randrange(limit // 1000, limit // 100)
            grant = budget.reserve(now, asked)
            if grant is None:
                # As long as Retry-After says, in whole seconds.
                _, wait = budget.left(now)
                heapq.heappush(events, (now + max(1, -(-wait // 1)), caller, -1.0, 0, 0))
                continue
            took = chance.randrange(1, asked + 1) if chance.random() < 0.2 else asked
            in_flight += took
            counted = took if took == asked else round(took * chance.uniform(0.99, 1.01))
            heapq.heappush(events, (now + chance.uniform(0.5, 8), caller, grant, took, counted))
        may = limit * seconds / 60
        assert used <= may * 1.01 + in_flight
        assert used + in_flight >= may * 0.97
