"""What very many connections bring about at once is done a few at a time, in turns of the event loop."""

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
# So many leave, or read again, in a turn, each of which takes some 0.15 ms.
_SEEN_TO = 16


class BulkReader(Protocol):
    """A connection that can be waited with."""

    def hold_up(self) -> None:
        """Read no more for now."""

    def read_on(self) -> None:
        """It is its turn again."""


class BulkReads:
    """Of connections that bring much, whose turn it is.

    `call_soon` calls back in the loop's next turn; `tick` is called ten times a second.
    """

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


class FewAtATime:
    """What happens to clients: the first of a turn are seen to at once.

    `call_soon` calls back in the loop's next turn.
    """

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._seen_to = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, work: Callable[[], None]) -> None:
        """Have this done, now or in a later turn; all in the order in which they came."""
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
        self._seen_to = _SEEN_TO  # who comes in this turn waits behind those that do
        for _ in range(min(_SEEN_TO, len(self._waiting))):
            self._waiting.popleft()()


def _resume(waiting: deque[BulkReader], most: int) -> int:
    count = min(len(waiting), most)
    for _ in range(count):
        waiting.popleft().read_on()
    return count
