"""Calls that wait for room upstream, first come first served."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Call(Protocol):
    """What may wait."""

    model: str | None

    def room(self) -> bool:
        """There may be room now; True if it was taken."""


C = TypeVar("C", bound=Call)


class Waiting(OrderedDict[C, None], Generic[C]):
    """The calls that wait, at most `most` of them.

    Not a plain dict, which takes ever longer to find its first once many have left it; and nothing around one, as every
    request asks whether somebody waits.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def add(self, call: C) -> bool:
        """Wait behind all others; False where too many wait."""
        if len(self) >= self.most:
            return False
        self[call] = None
        return True

    def leave(self, call: C) -> None:
        """It waits no longer."""
        self.pop(call, None)

    def room(self) -> None:
        """There may be room: it is for the first that can use it, as not every upstream serves every model."""
        full = set()
        for call in list(self):
            if call.model not in full and not call.room():
                full.add(call.model)
