"""Calls that have not arrived completely: bounds their number and size, so that they do not harm complete calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from gateway.admission.buffers import Buffers
from gateway.admission.owners import Owner
from gateway.wire.errors import GatewayError, Shortage

# Past a bound 1/64 of it is freed at a time, because finding the slowest calls is expensive.
_FREED = 64


class ArrivingCall(Protocol):
    """A call that may be arriving."""

    started_at: float

    def fail(self, error: GatewayError) -> None:
        """End the call with this error."""


C = TypeVar("C", bound=ArrivingCall)


class Arrivals(dict[C, Owner], Generic[C]):
    """The arriving calls: at most `max_calls`, with at most half of the bytes that all calls may hold.

    Past a bound the slowest calls end, of the owner that has the most calls or bytes. A dict itself, because every
    request looks up calls here.
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
        """`size` bytes of a call have arrived, and more are to come."""
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
        """The call has arrived completely, or has ended."""
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
    """The error for a call that would exceed the bound of held bytes."""
    return Shortage(
        f"The gateway holds as much of requests and answers as it may ({buffers.limit} bytes, "
        "GATEWAY_MAX_BUFFERED_BYTES): try again soon."
    )
