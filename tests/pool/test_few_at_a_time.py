"""A thousand things at once, and the turns that they take."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest

from gateway.pool.few_at_a_time import _IN_A_TURN, FewAtATime


class Turns:
    def __init__(self) -> None:
        self.soon: deque[Callable[[], None]] = deque()
        self.done: list[int] = []
        self.few = FewAtATime(self.soon.append)

    def add(self, number: int) -> None:
        self.few.add(lambda: self.done.append(number))

    def turn(self) -> int:
        """How many are done in the loop's next turn."""
        before = len(self.done)
        for _ in range(len(self.soon)):
            self.soon.popleft()()
        return len(self.done) - before


def test_few_are_seen_to_at_once_and_of_many_so_many_in_a_turn() -> None:
    turns = Turns()
    for number in range(1000):
        turns.add(number)
    assert len(turns.done) == _IN_A_TURN
    assert turns.turn() == _IN_A_TURN
    turns.add(1000)  # behind those that wait
    while turns.soon:
        assert turns.turn() <= _IN_A_TURN
    assert turns.done == list(range(1001))
    turns.add(1001)
    assert turns.done[-1] == 1001
    assert turns.turn() == 0
    assert not turns.soon


def test_one_that_fails_is_done_once_and_the_others_are_done() -> None:
    turns = Turns()
    failed: list[int] = []

    def fails() -> None:
        failed.append(1)
        raise ValueError("as it must")

    for number in range(_IN_A_TURN):
        turns.add(number)
    turns.few.add(fails)
    turns.add(99)
    with pytest.raises(ValueError, match="as it must"):
        turns.turn()
    while turns.soon:
        turns.turn()
    assert (failed, turns.done[-1]) == ([1], 99)
