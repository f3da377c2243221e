"""What is held has a bound, and whoever takes all that may be had leaves room for another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.buffers import SHARE, Buffers
from gateway.admission.owners import Owner


def test_one_alone_has_seven_eighths_and_another_what_it_needs() -> None:
    buffers, many, few = Buffers(8000), Owner(), Owner()
    assert buffers.hold(many, 7000)
    assert not buffers.has_room(many, 1)
    assert buffers.has_room(few, 800)
    assert buffers.hold(few, 800)
    assert not buffers.has_room(many, 0)  # what it has it keeps, but there is no more for it
    buffers.hold(many, -7000)
    assert (buffers.held, many.held, few.held) == (800, 0, 800)


@given(st.integers(1, 50), st.lists(st.tuples(st.integers(0, 49), st.integers(1, 1000))))
def test_the_bound_holds_and_something_is_free(owners: int, steps: list[tuple[int, int]]) -> None:
    buffers, all_owners = Buffers(10_000), [Owner() for _ in range(owners)]
    for number, size in steps:
        owner = all_owners[number % owners]
        if buffers.has_room(owner, size):
            assert buffers.hold(owner, size)
        assert buffers.held == sum(one.held for one in all_owners) < buffers.limit


@pytest.mark.parametrize("owners", [1, 2, 10, 100])
def test_those_who_take_all_that_they_may_have_as_much_and_leave_a_share(owners: int) -> None:
    buffers, all_owners = Buffers(10_000), [Owner() for _ in range(owners)]
    buffers.hold(all_owners[0], 8000)  # which it had before the others came, and gives back as its calls end
    for _ in range(20_000):
        if all_owners[0].held > 0:
            buffers.hold(all_owners[0], -1)
        for owner in all_owners:
            if buffers.has_room(owner, 1):
                buffers.hold(owner, 1)
    shares = [owner.held for owner in all_owners]
    assert max(shares) - min(shares) <= SHARE + 1
    assert buffers.limit - buffers.held >= buffers.limit // (SHARE * owners + 1) - 1
