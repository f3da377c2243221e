"""Connections that bring much: some in each turn of the loop, the others after them, in order."""

from __future__ import annotations

import asyncio

from gateway.pool.bulk_reads import BulkReads


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
