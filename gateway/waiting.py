"""Calls that wait for room upstream, first come first served."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class Call(Protocol):
    """What may wait."""

    def room(self) -> bool:
        """There may be room now; True if it was taken."""


class Waiting:
    """The calls that wait, at most `most` of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        # Not a plain dict, which takes ever longer to find its first once many have left it.
        self._calls: OrderedDict[Call, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> bool:
        """Wait behind all others; False where too many wait."""
        if len(self._calls) >= self.most:
            return False
        self._calls[call] = None
        return True

    def leave(self, call: Call) -> None:
        """It waits no longer."""
        self._calls.pop(call, None)

    def room(self) -> None:
        """There may be room for one: it is for the first that can use it, as not every upstream serves every model."""
        for call in self._calls:
            if call.room():
                break
