"""What happens to very many clients at once, as they leave or read again together, is seen to a few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

# So many in a turn of the loop, each of which takes some 0.15 ms.
_IN_A_TURN = 16


class FewAtATime:
    """The first of a turn are seen to at once. `call_soon` calls back in the loop's next turn."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._call_soon = call_soon
        self._seen_to = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def add(self, work: Callable[[], None]) -> None:
        """Have this done, now or in a later turn; all in the order in which they came."""
        if not self._seen_to:
            self._call_soon(self._next_turn)
        self._seen_to += 1
        if self._seen_to > _IN_A_TURN:
            self._waiting.append(work)
        else:
            work()

    def _next_turn(self) -> None:
        if not self._waiting:
            self._seen_to = 0
            return
        self._call_soon(self._next_turn)
        self._seen_to = _IN_A_TURN  # who comes in this turn waits behind those that do
        for _ in range(min(_IN_A_TURN, len(self._waiting))):
            self._waiting.popleft()()
