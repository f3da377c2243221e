"""The memory of many requests at once, given back to the system when they are over."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import gc
import sys

# Fewer than so many in flight leave too little behind to be worth a collection.
_MANY = 32
# Observations in a row that find them over: the connections of those that have just ended close first, and those that
# were kept to the upstreams are closed after 4 s.
_TRIM_AFTER = (4, 60)
# uvloop keeps 250 of its handles, and of its timers' handles, for the next ones; so many are made for new ones to be
# among them.
_HANDLES = 1000
# New objects that outlive their making, until garbage is looked for; a request leaves hardly a cycle behind.
_GARBAGE = 20_000

# glibc's; others give back by themselves.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # malloc.h's M_…
# From so many bytes on a buffer goes back as it is freed; what many calls have in turn is to be smaller, as memory that
# is new to the process costs more than what is written to it.
_LARGE = 1024 * 1024
# So much may be free at the heap's end. A simplified call has a parser's buffer and two of a writer's there in turn,
# each of which may be nearly as large as one that goes back: with less it would have that memory anew each time.
_FREE = 4 * _LARGE


def share_heap() -> None:
    """Have threads, which glibc gives a heap each, take theirs from the first; to be called before there are any.

    `malloc_trim` leaves what is free at another's end, as after a batch of log lines: megabytes.
    """
    if _mallopt is not None:
        _mallopt(_ARENA_MAX, 1)
        _mallopt(_MMAP_THRESHOLD, _LARGE)
        _mallopt(_TRIM_THRESHOLD, _FREE)


def settle() -> None:
    """Look no more for garbage among what is there now, which lives as long as the process, and less often in all."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE, 10, 10)


class MemoryTrimmer:
    """Gives the memory of many requests at once back to the system when most of them are over."""

    def __init__(self) -> None:
        self._peak = 0
        self._quiet = 0

    def observe(self, in_flight: int) -> None:
        """How many requests are in flight now; called ten times a second."""
        self._peak = max(self._peak, in_flight)
        if self._peak < _MANY or in_flight >= self._peak / 4:
            self._quiet = 0
            return
        self._quiet += 1
        if self._quiet in _TRIM_AFTER:
            _trim()
        if self._quiet == _TRIM_AFTER[-1]:
            # What still runs is to be over, too.
            self._peak, self._quiet = in_flight, 0


def _trim() -> None:
    """Let go of freed objects, which hold the megabytes that they lie in, and of what is free.

    Python and uvloop keep freed objects of many kinds for the next ones; glibc keeps what is free below what is not.
    """
    gc.collect()
    # Of each name that C code has asked a type for; a full collection leaves them.
    if sys.version_info < (3, 13):
        sys._clear_type_cache()
    else:
        sys._clear_internal_caches()
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()  # one for all: Python keeps 255 of them
    timers = [loop.call_later(1, _nothing, context=context) for _ in range(_HANDLES)]
    for timer in timers:
        timer.cancel()
    loop.call_soon(_free, [loop.call_soon(_nothing, context=context) for _ in range(_HANDLES)])


def _nothing() -> None: ...


def _free(handles: list[asyncio.Handle]) -> None:
    # From the end: the newest are kept for the next ones, and the old are free.
    handles.clear()
    gc.collect()  # Python keeps a hundred floats, now of those timers
    if _malloc_trim is not None:
        _malloc_trim(0)
