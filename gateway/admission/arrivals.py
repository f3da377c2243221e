"""Calls that have not come whole: by how many and how much of them they harm nobody whose call has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from gateway.admission.buffers import Buffers
from gateway.admission.owners import Owner
from gateway.wire.errors import GatewayError, Shortage

# Past a bound so large a part of it is made free at a time: to look for the slowest is dear.
_FREED = 64


class ArrivingCall(Protocol):
    """What may arrive."""

    started_at: float

    def fail(self, error: GatewayError) -> None:
        """End with this."""


C = TypeVar("C", bound=ArrivingCall)


class Arrivals(dict[C, Owner], Generic[C]):
    """At most `max_calls`, and as many bytes of them as half of what may be held.

    Past that those that come the slowest end, of the owner that has the most of what is too much. Calls are looked up
    here by every request, so that it is the dict itself that is asked.
    """

    def __init__(self, max_calls: int, buffers: Buffers, time: Callable[[], float]) -> None:
        super().__init__()
        self._max_calls = max_calls
        self._max_bytes = buffers.limit // 2
        self._buffers = buffers
        self._time = time
        self._bytes = 0
        self._sizes: dict[Owner, dict[C, int]] = {}

    def grow(self, call: C, owner: Owner, size: int) -> None:
        """So much of a call is there, and more is to come."""
        self[call] = owner
        sizes = self._sizes.setdefault(owner, {})
        more = size - sizes.get(call, 0)
        sizes[call] = size
        self._bytes += more
        if not self._buffers.hold(owner, more):
            call.fail(no_room(self._buffers))
        if len(self) > self._max_calls:
            self._end_slowest(max(self._sizes.values(), key=len), self._max_calls, by_size=False)
        if self._bytes > self._max_bytes:
            most = max(self._sizes.values(), key=lambda sizes: sum(sizes.values()))
            self._end_slowest(most, self._max_bytes, by_size=True)

    def _end_slowest(self, sizes: dict[C, int], most: int, *, by_size: bool) -> None:
        now = self._time()
        freed = most - most // _FREED
        for call in sorted(sizes, key=lambda call: sizes[call] / max(now - call.started_at, 1e-3)):
            if (self._bytes if by_size else len(self)) <= freed:
                return
            what = f"{self._max_bytes} bytes" if by_size else f"{self._max_calls} calls"
            call.fail(
                Shortage(f"Too much is arriving ({what} may be), and this came the slowest: send it again, at once.")
            )

    def leave(self, call: C) -> None:
        """It has come whole, or has ended."""
        owner = self.pop(call, None)
        if owner is None:
            return
        sizes = self._sizes[owner]
        size = sizes.pop(call)
        if not sizes:
            del self._sizes[owner]
        self._bytes -= size
        self._buffers.hold(owner, -size)


def no_room(buffers: Buffers) -> Shortage:
    """Why a call is refused that would be held past the bound."""
    return Shortage(
        f"The gateway holds as much of requests and answers as it may ({buffers.limit} bytes, "
        "GATEWAY_MAX_BUFFERED_BYTES): try again soon."
    )
