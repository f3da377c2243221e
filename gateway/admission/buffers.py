"""Counts the bytes of memory that all calls together hold, by owner."""

from __future__ import annotations

from typing import Final

from gateway.admission.owners import Owner

# An owner may hold at most SHARE times the free memory. A single owner gets seven eighths, and some memory is always
# free. As calls end, owners that hold much get no more until the others hold as much: the dynamic thresholds of
# Choudhury and Hahne (1998), by which switches share their memory.
SHARE: Final = 7


class Buffers:
    """The bytes that are held of requests, of answers and of unsent data: at most `limit`."""

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def hold(self, owner: Owner, size: int) -> bool:
        """Add `size` bytes, which may be negative; return whether there is room for all that is held now."""
        self.held += size
        owner.held += size
        return owner.held <= SHARE * (self.limit - self.held)

    def has_room(self, owner: Owner, size: int) -> bool:
        """Whether `size` more bytes could be held."""
        return owner.held + size <= SHARE * (self.limit - self.held - size)
