"""Runs long work in steps, one at a time, so that no other call waits long for the event loop."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator

from gateway.admission.owners import Owner

_log = logging.getLogger(__name__)

# After a step the loop is left to other work for so many times as long as the step took.
_REST = 2


class WorkInSteps:
    """Takes one piece of work of each owner in turn. `call_later` and `time` are those of the data path."""

    def __init__(self, call_later: Callable[[float, Callable[[], None]], object], time: Callable[[], float]) -> None:
        self._call_later = call_later
        self._time = time
        self._lines: OrderedDict[Owner, deque[Iterator[None]]] = OrderedDict()
        self._free_at = 0.0

    def add(self, owner: Owner, steps: Iterator[None]) -> None:
        """Run these steps when their turns come."""
        if not self._lines:
            self._call_later(max(0.0, self._free_at - self._time()), self._step)
        self._lines.setdefault(owner, deque()).append(steps)

    def _step(self) -> None:
        owner, line = next(iter(self._lines.items()))
        began = self._time()
        try:
            ended = next(line[0], self) is self
        except Exception:
            # A bug of the gateway's, which must not end the work of all others.
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
