"""How much memory all calls together hold, in bytes, and whose it is."""

from __future__ import annotations

from typing import Final

from gateway.admission.owners import Owner

# An owner may hold so many times what is free. One alone gets seven eighths, and something is always free; as calls
# end, those who hold much get no more until the others have as much: the dynamic thresholds of Choudhury and Hahne
# (1998), by which switches share their memory.
SHARE: Final = 7


class Buffers:
    """What is held of requests, of answers and of what is still to be written: at most `limit` bytes."""

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def hold(self, owner: Owner, size: int) -> bool:
        """Count so many bytes more, or fewer where it is negative; whether there is room for all that is held now."""
        self.held += size
        owner.held += size
        return owner.held <= SHARE * (self.limit - self.held)

    def has_room(self, owner: Owner, size: int) -> bool:
        """Whether so many bytes more could be held."""
        return owner.held + size <= SHARE * (self.limit - self.held - size)
