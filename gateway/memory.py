"""The memory of many requests at once, given back to the system when they are over."""

from __future__ import annotations

import ctypes
import gc

# Fewer than so many in flight leave too little behind to be worth the look.
_MANY = 32
# Looks in a row that find them over: the connections of those that have just ended are still to be closed.
_QUIET = 4
# New objects that outlive their making, until garbage is looked for; a request leaves hardly a cycle behind.
_GARBAGE = 20_000

# glibc's; others give back by themselves.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def settle() -> None:
    """Look no more for garbage among what is there now, which lives as long as the process, and less often in all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE, 10, 10)


class Peak:
    """The most requests that were in flight at once."""

    def __init__(self) -> None:
        self._most = 0
        self._quiet = 0

    def look(self, in_flight: int) -> None:
        """To be called again and again: once most of them are over, their memory goes back to the system.

        Python keeps freed objects of many kinds for the next ones, which hold the pages of all that lay
        around them, and lets go of them in a full collection; glibc keeps what is free below what is not.
        """
        self._most = max(self._most, in_flight)
        if self._most < _MANY or in_flight >= self._most / 4:
            self._quiet = 0
            return
        self._quiet += 1
        if self._quiet >= _QUIET:
            self._most = self._quiet = 0
            gc.collect()
            if _trim is not None:
                _trim(0)
