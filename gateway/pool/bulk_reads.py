"""Connections that bring much at a time: a few of them are read in each turn of the loop, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

# A read of so many bytes is one of many.
BULK = 64 * 1024
# So many such reads in a turn of the loop, which takes some 0.2 ms for each; and for nothing, as of a request that was
# refused, in a tenth of a second.
_IN_A_TURN = 8
_FOR_NOTHING = 32


class BulkReader(Protocol):
    """A connection that can be waited with."""

    def hold_up(self) -> None:
        """Read no more for now."""

    def read_on(self) -> None:
        """It is its turn again."""


class BulkReads:
    """Whose turn it is. `call_soon` calls back in the loop's next turn; `tick` is called ten times a second."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._reads = 0
        self._waiting: deque[BulkReader] = deque()
        self._for_nothing: deque[BulkReader] = deque()
        self._thrown_away = 0

    def has_read(self, connection: BulkReader) -> None:
        """It has brought a part of a body, and there is more."""
        if not self._reads:
            self._call_soon(self._next_turn)
        self._reads += 1
        if self._reads > _IN_A_TURN:
            connection.hold_up()
            self._waiting.append(connection)

    def has_read_for_nothing(self, connection: BulkReader) -> None:
        """It has brought a part of what is thrown away."""
        self._thrown_away += 1
        if self._thrown_away > _FOR_NOTHING:
            connection.hold_up()
            self._for_nothing.append(connection)

    def _next_turn(self) -> None:
        self._reads = 0
        _resume(self._waiting, _IN_A_TURN)
        if self._waiting:
            self._reads = _IN_A_TURN  # theirs, and whoever else brings much waits behind them
            self._call_soon(self._next_turn)

    def tick(self) -> None:
        """A tenth of a second has passed."""
        self._thrown_away = _resume(self._for_nothing, _FOR_NOTHING)


def _resume(waiting: deque[BulkReader], most: int) -> int:
    count = min(len(waiting), most)
    for _ in range(count):
        waiting.popleft().read_on()
    return count
