"""Calls that have not come whole: who has the most of what is too much loses what comes the slowest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.arrivals import Arrivals
from gateway.admission.buffers import Buffers
from gateway.admission.owners import Owner
from gateway.wire.errors import GatewayError


class Call:
    """One that arrives."""

    def __init__(self, arrivals: Arrivals[Call], started_at: float = 0.0) -> None:
        self.started_at = started_at
        self.error = ""
        self._arrivals = arrivals

    def fail(self, error: GatewayError) -> None:
        assert not self.error, "ended twice"
        self.error = error.message
        self._arrivals.leave(self)


def arriving(max_calls: int = 1000, limit: int = 1_000_000) -> tuple[Arrivals[Call], Buffers]:
    buffers = Buffers(limit)
    return Arrivals(max_calls, buffers, lambda: 100.0), buffers


def test_past_the_count_the_slowest_of_who_has_the_most_calls_ends() -> None:
    arrivals, buffers = arriving(max_calls=100)
    many, few = Owner(), Owner()
    honest = Call(arrivals)
    arrivals.grow(honest, few, 50_000)  # it has the most bytes
    calls = [Call(arrivals, started_at) for started_at in range(99)]
    for call in calls:
        arrivals.grow(call, many, 10)
    assert len(arrivals) == 100
    arrivals.grow(Call(arrivals, 99), few, 10)
    ended = [call for call in calls if call.error]
    assert ended == calls[:2]
    assert ended[0].error == (
        "Too much is arriving (100 calls may be), and this came the slowest: send it again, at once."
    )
    assert not honest.error
    assert buffers.held == 50_000 + 97 * 10 + 10 == many.held + few.held


def test_past_the_bytes_the_slowest_of_who_has_the_most_bytes_ends() -> None:
    arrivals, buffers = arriving(limit=200_000)
    many, few = Owner(), Owner()
    calls = [Call(arrivals, started_at) for started_at in (0, 50, 90, 98)]
    for call in calls:
        arrivals.grow(call, many, 20_000)
    others = [Call(arrivals) for _ in range(20)]
    for call in others:
        arrivals.grow(call, few, 1)
    arrivals.grow(others[0], few, 20_000)
    assert [bool(call.error) for call in calls] == [True, False, False, False]
    assert "(100000 bytes may be)" in calls[0].error
    assert not any(call.error for call in others)
    assert buffers.held == 80_019


def test_one_that_came_whole_or_left_counts_no_longer() -> None:
    arrivals, buffers = arriving()
    call, owner = Call(arrivals), Owner()
    arrivals.grow(call, owner, 10)
    arrivals.grow(call, owner, 30)
    assert (len(arrivals), buffers.held, owner.held) == (1, 30, 30)
    arrivals.leave(call)
    arrivals.leave(call)
    assert (len(arrivals), buffers.held, owner.held) == (0, 0, 0)


def test_what_does_not_fit_is_refused_though_its_owner_has_little() -> None:
    arrivals, buffers = arriving(limit=1000)
    buffers.hold(Owner(), 990)
    call = Call(arrivals)
    arrivals.grow(call, Owner(), 100)
    assert "GATEWAY_MAX_BUFFERED_BYTES" in call.error
    assert buffers.held == 990


@given(st.lists(st.tuples(st.sampled_from("gl"), st.integers(0, 9), st.integers(0, 3), st.integers(0, 600))))
def test_whatever_comes_the_bounds_hold(steps: list[tuple[str, int, int, int]]) -> None:
    arrivals, buffers = arriving(max_calls=5, limit=2000)
    owners = [Owner() for _ in range(4)]
    calls: dict[int, tuple[Call, Owner, int]] = {}
    for step, number, owner, more in steps:
        if number in calls and (step == "l" or calls[number][0].error):
            arrivals.leave(calls.pop(number)[0])
        elif step == "g":
            call, whose, size = calls.get(number, (Call(arrivals, float(number)), owners[owner], 0))
            calls[number] = call, whose, size + more
            arrivals.grow(call, whose, size + more)
        alive = [one for one in calls.values() if not one[0].error]
        assert len(alive) == len(arrivals) <= 5
        assert buffers.held == sum(size for _, _, size in alive) <= 1000
        assert [one.held for one in owners] == [sum(s for _, w, s in alive if w is one) for one in owners]
