"""What a thousand bring about at once: some in each turn of the loop, the others after them, in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import pytest

from gateway.admission.turns import _SEEN_TO, BulkReads, FewAtATime


class Reader:
    """A connection that brings something whenever it is read."""

    def __init__(self) -> None:
        self.held_up = 0
        self.read_on_again = 0

    def hold_up(self) -> None:
        self.held_up += 1

    def read_on(self) -> None:
        self.read_on_again += 1


def test_eight_are_read_in_a_turn_and_the_others_in_the_next() -> None:
    async def turns() -> None:
        reads, readers = BulkReads(asyncio.get_running_loop().call_soon), [Reader() for _ in range(40)]
        for reader in readers:
            reads.has_read(reader)
        assert [reader.held_up for reader in readers] == [0] * 8 + [1] * 32
        for so_many in (8, 16, 24, 32, 32):
            await asyncio.sleep(0)
            assert sum(reader.read_on_again for reader in readers) == so_many
        late = Reader()
        reads.has_read(late)
        assert not late.held_up

    asyncio.run(turns())


def test_who_comes_while_others_wait_waits_behind_them() -> None:
    async def turns() -> None:
        reads, readers = BulkReads(asyncio.get_running_loop().call_soon), [Reader() for _ in range(20)]
        for reader in readers:
            reads.has_read(reader)
        await asyncio.sleep(0)
        late = Reader()
        reads.has_read(late)
        assert late.held_up
        await asyncio.sleep(0)
        assert all(reader.read_on_again == reader.held_up for reader in readers)
        assert late.read_on_again

    asyncio.run(turns())


def test_what_is_thrown_away_is_read_by_the_tenth_of_a_second() -> None:
    reads, readers = BulkReads(lambda call: None), [Reader() for _ in range(80)]
    for reader in readers:
        reads.has_read_for_nothing(reader)
    assert sum(reader.held_up for reader in readers) == 48
    for so_many in (32, 48):
        reads.tick()
        assert sum(reader.read_on_again for reader in readers) == so_many
    reads.tick()
    once_more = Reader()
    reads.has_read_for_nothing(once_more)
    assert not once_more.held_up


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
    assert len(turns.done) == _SEEN_TO
    assert turns.turn() == _SEEN_TO
    turns.add(1000)  # behind those that wait
    while turns.soon:
        assert turns.turn() <= _SEEN_TO
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

    for number in range(_SEEN_TO):
        turns.add(number)
    turns.few.add(fails)
    turns.add(99)
    with pytest.raises(ValueError, match="as it must"):
        turns.turn()
    while turns.soon:
        turns.turn()
    assert (failed, turns.done[-1]) == ([1], 99)
