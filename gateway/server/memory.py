"""The memory of many requests at once, given back to the system when they are over."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import gc
import sys

# Fewer than so many in flight leave too little behind to be worth the look.
_MANY = 32
# Looks in a row that find them over: the connections of those that have just ended are still to be closed, and what
# probes had made meanwhile, amid all that has gone, is made anew by the next. Several times then, as what is made
# again and again is mostly in use when it is looked for.
_QUIET = (4, *range(60, 141, 8))
# uvloop keeps 250 of its handles, and of its timers' handles, for the next ones; so many are made for new ones to be
# among them.
_HANDLES = 1000
# New objects that outlive their making, until garbage is looked for; a request leaves hardly a cycle behind.
_GARBAGE = 20_000

# glibc's; others give back by themselves.
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
_ARENA_MAX = -8  # malloc.h's M_ARENA_MAX


def share_heap() -> None:
    """Have threads, which glibc gives a heap each, take theirs from the first; to be called before there are any.

    `malloc_trim` leaves what is free at another's end, as after a batch of log lines: megabytes.
    """
    if _mallopt is not None:
        _mallopt(_ARENA_MAX, 1)


def settle() -> None:
    """Look no more for garbage among what is there now, which lives as long as the process, and less often in all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE, 10, 10)


class Peak:
    """The most requests that were in flight at once."""

    def __init__(self) -> None:
        self._most = 0
        self._since = 0
        self._quiet = 0

    def look(self, in_flight: int) -> None:
        """To be called again and again: once most of them are over, their memory goes back to the system.

        Python and uvloop keep freed objects of many kinds for the next ones, which hold the megabytes
        that they lie in; glibc keeps what is free below what is not.
        """
        self._most = max(self._most, in_flight)
        self._since = max(self._since, in_flight)
        if self._most < _MANY or in_flight >= self._most / 4:
            self._quiet = self._since = 0
            return
        self._quiet += 1
        if self._quiet in _QUIET:
            _give_back()
        if self._quiet == _QUIET[-1]:
            # Those that have come meanwhile are to be over, too.
            self._most, self._since, self._quiet = self._since, 0, 0


def _give_back() -> None:
    gc.collect()
    # Of each name that C code has asked a type for; a full collection leaves them.
    if sys.version_info < (3, 13):
        sys._clear_type_cache()
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()  # one for all: Python keeps 255 of them
    timers = [loop.call_later(1, _nothing, context=context) for _ in range(_HANDLES)]
    for timer in timers:
        timer.cancel()
    loop.call_soon(_let_go, [loop.call_soon(_nothing, context=context) for _ in range(_HANDLES)])


def _nothing() -> None: ...


def _let_go(handles: list[asyncio.Handle]) -> None:
    # From the end: the newest are kept for the next ones, and the old are free.
    handles.clear()
    gc.collect()  # Python keeps a hundred floats, now of those timers
    if _trim is not None:
        _trim(0)
