"""Returns the memory of many concurrent requests to the system when they have ended."""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import gc
import sys

# A peak below so many requests in flight leaves too little garbage to be worth a collection.
_MANY = 32
# Trim after so many quiet observations in a row: first the client connections of ended requests close, and idle
# connections to the upstreams are closed after 4 s.
_TRIM_AFTER = (4, 60)
# uvloop keeps 250 freed handles, and 250 timer handles, for reuse. Making so many handles replaces the kept old ones
# by new ones.
_HANDLES = 1000
# The garbage collector's threshold of new objects, high because a request leaves hardly any reference cycles.
_GARBAGE = 20_000

# These exist in glibc only; other allocators return memory by themselves.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
_ARENA_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -3, -1  # malloc.h's M_…
# A buffer of so many bytes or more is returned to the system when it is freed. Buffers that many calls use in turn
# should be smaller: memory new to the process costs more than writing to it.
_LARGE = 1024 * 1024
# So many bytes may stay free at the heap's end. A simplified call allocates a parser's buffer and two of a writer's
# there in turn, each up to nearly `_LARGE`: with less, each call would get that memory from the system again.
_FREE = 4 * _LARGE


def share_heap() -> None:
    """Make all threads share the first heap, where glibc gives each its own; call it before any thread starts.

    `malloc_trim` does not return the free end of another thread's heap, which can be megabytes after a batch of log
    lines.
    """
    if _mallopt is not None:
        _mallopt(_ARENA_MAX, 1)
        _mallopt(_MMAP_THRESHOLD, _LARGE)
        _mallopt(_TRIM_THRESHOLD, _FREE)


def settle() -> None:
    """Exclude the existing objects, which live as long as the process, from collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE, 10, 10)


class MemoryTrimmer:
    """Returns the memory of many concurrent requests to the system when most of them have ended."""

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
            # The requests that still run count as the next peak.
            self._peak, self._quiet = in_flight, 0


def _trim() -> None:
    """Drop cached freed objects, which keep the megabytes around them allocated, and return free memory.

    Python and uvloop cache freed objects of many kinds for reuse; glibc keeps free memory below memory in use.
    """
    gc.collect()
    # The type cache has an entry for each attribute name looked up from C; a full collection leaves them.
    if sys.version_info < (3, 13):
        sys._clear_type_cache()
    else:
        sys._clear_internal_caches()
    loop = asyncio.get_running_loop()
    context = contextvars.copy_context()  # one for all handles: Python caches 255 contexts
    timers = [loop.call_later(1, _nothing, context=context) for _ in range(_HANDLES)]
    for timer in timers:
        timer.cancel()
    loop.call_soon(_free, [loop.call_soon(_nothing, context=context) for _ in range(_HANDLES)])


def _nothing() -> None: ...


def _free(handles: list[asyncio.Handle]) -> None:
    # A list is cleared from its end: uvloop then caches the newest handles, and the old ones are freed.
    handles.clear()
    gc.collect()  # Python caches a hundred floats, now those of the timers
    if _malloc_trim is not None:
        _malloc_trim(0)
