"""Work that takes long goes step by step, one piece of it at a time, so that no other call waits long for the loop."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from gateway.admission.owners import Owner

_log = logging.getLogger(__name__)

# So many times as long as a step took the loop is left to others.
_REST = 2


class WorkInSteps:
    """Owners have turns, a piece of work each. `call_later` and `time` as the data path's."""

    def __init__(self, call_later: Callable[[float, Callable[[], None]], object], time: Callable[[], float]) -> None:
        self._call_later = call_later
        self._time = time
        self._lines: OrderedDict[Owner, deque[Iterator[None]]] = OrderedDict()
        self._free_at = 0.0

    def add(self, owner: Owner, steps: Iterator[None]) -> None:
        """Take these steps, each at its time."""
        if not self._lines:
            self._call_later(max(0.0, self._free_at - self._time()), self._step)
        self._lines.setdefault(owner, deque()).append(steps)

    def _step(self) -> None:
        owner, line = next(iter(self._lines.items()))
        began = self._time()
        try:
            ended = next(line[0], self) is self
        except Exception:
            # A bug of ours, which must not be the end of all others' work.
            _log.exception("a step of long work failed")
            ended = True
        if ended:
            line.popleft()
            if line:
                self._lines.move_to_end(owner)
            else:
                del self._lines[owner]
        now = self._time()
        rest = _REST * (now - began)
        self._free_at = now + rest
        if self._lines:
            self._call_later(rest, self._step)
