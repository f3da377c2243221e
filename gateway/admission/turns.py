"""Spreads work that very many connections cause at once over turns of the event loop, a few items each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

# A read of so many bytes counts as a bulk read.
BULK = 64 * 1024
# Bulk reads per turn of the loop, which take some 0.2 ms each; and per tenth of a second, reads that are thrown away,
# as of a request that was refused.
_IN_A_TURN = 8
_FOR_NOTHING = 32
# Clients that leave, or read again, per turn; each takes some 0.15 ms.
_SEEN_TO = 16


class BulkReader(Protocol):
    """A connection whose reading can be paused."""

    def hold_up(self) -> None:
        """Stop reading for now."""

    def read_on(self) -> None:
        """Resume reading: it is this connection's turn again."""


class BulkReads:
    """Gives connections that send much their turns to read.

    `call_soon` calls back in the loop's next turn; `tick` is called ten times a second.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._reads = 0
        self._waiting: deque[BulkReader] = deque()
        self._for_nothing: deque[BulkReader] = deque()
        self._thrown_away = 0

    def has_read(self, connection: BulkReader) -> None:
        """A connection has read a part of a body, and there is more."""
        if not self._reads:
            self._call_soon(self._next_turn)
        self._reads += 1
        if self._reads > _IN_A_TURN:
            connection.hold_up()
            self._waiting.append(connection)

    def has_read_for_nothing(self, connection: BulkReader) -> None:
        """A connection has read data that are thrown away."""
        self._thrown_away += 1
        if self._thrown_away > _FOR_NOTHING:
            connection.hold_up()
            self._for_nothing.append(connection)

    def _next_turn(self) -> None:
        self._reads = 0
        _resume(self._waiting, _IN_A_TURN)
        if self._waiting:
            self._reads = _IN_A_TURN  # this turn belongs to the resumed ones; other bulk reads wait behind them
            self._call_soon(self._next_turn)

    def tick(self) -> None:
        """A tenth of a second has passed."""
        self._thrown_away = _resume(self._for_nothing, _FOR_NOTHING)


class FewAtATime:
    """Handles events of clients: the first of a turn at once, the others in later turns.

    `call_soon` calls back in the loop's next turn.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._seen_to = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, work: Callable[[], None]) -> None:
        """Do this work now or in a later turn, in the order of arrival."""
        if not self._seen_to:
            self._call_soon(self._next_turn)
        self._seen_to += 1
        if self._seen_to > _SEEN_TO:
            self._waiting.append(work)
        else:
            work()

    def _next_turn(self) -> None:
        if not self._waiting:
            self._seen_to = 0
            return
        self._call_soon(self._next_turn)
        self._seen_to = _SEEN_TO  # work added in this turn waits behind the work that waits already
        for _ in range(min(_SEEN_TO, len(self._waiting))):
            self._waiting.popleft()()


def _resume(waiting: deque[BulkReader], most: int) -> int:
    count = min(len(waiting), most)
    for _ in range(count):
        waiting.popleft().read_on()
    return count
