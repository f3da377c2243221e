"""Calls that wait for room upstream, first come first served."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class WaitingCall(Protocol):
    """What may wait."""

    model: str | None

    def try_admit(self) -> bool:
        """There may be room now; True if it was taken."""


C = TypeVar("C", bound=WaitingCall)


class AdmissionQueue(OrderedDict[C, None], Generic[C]):
    """The calls that wait, at most `max_queue` of them.

    An OrderedDict, because taking the first key of a plain dict is O(n) after many deletions. Nothing is around it, as
    every request asks whether somebody waits.
    """

    def __init__(self, max_queue: int) -> None:
        super().__init__()
        self.max_queue = max_queue

    def add(self, call: C) -> bool:
        """Wait behind all others; False where too many wait."""
        if len(self) >= self.max_queue:
            return False
        self[call] = None
        return True

    def leave(self, call: C) -> None:
        """It waits no longer."""
        self.pop(call, None)

    def wake(self) -> None:
        """There may be room: it is for the first that can use it, as not every upstream serves every model."""
        full = set()
        for call in list(self):
            if call.model not in full and not call.try_admit():
                full.add(call.model)
