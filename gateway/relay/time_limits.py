"""The time limits of one call: which of them has passed, and when one may."""

from __future__ import annotations

import math
from typing import Final

from gateway.relay.data_path import DataPath
from gateway.relay.record import Record
from gateway.wire.errors import RequestTimeout, UpstreamTimeout

# The slowest that a body may come, in bytes a second, past its time limit.
_BODY_RATE: Final = 1024


class TimedRecord(Record):
    """A record with what its time limits go by, which an exchange sets. No limit can have passed before `deadline`.

    `_commented_at` is when a comment went out last. `_size` is how much of the request's body has come; `_last_read_at`
    is when some of it came, or of the answer; `_paused` says that the answer's client reads more slowly than the
    upstream writes.
    """

    __slots__ = ("_attempt_started_at", "_commented_at", "_last_read_at", "_path", "_paused", "_size", "deadline")

    _path: DataPath
    _size: int
    _paused: bool
    _last_read_at: float
    _attempt_started_at: float
    _commented_at: float
    deadline: float

    def _late_body(self, now: float, since: float) -> RequestTimeout | None:
        """What is wrong with the time in which the request's body has come since then."""
        limits = self._path.limits
        if now - self._last_read_at >= limits.body_timeout:
            return RequestTimeout(f"The request's body stopped for {limits.body_timeout:g} s (GATEWAY_BODY_TIMEOUT).")
        if now - self.started_at >= limits.total_timeout:
            return RequestTimeout(f"The request took longer than {limits.total_timeout:g} s (GATEWAY_TOTAL_TIMEOUT).")
        if now - since >= limits.body_timeout + self._size / _BODY_RATE:
            return RequestTimeout(f"The request's body came more slowly than {_BODY_RATE} bytes a second.")
        return None

    def _body_deadline(self, since: float) -> float:
        """When `_late_body` may find something."""
        limits = self._path.limits
        slowest = since + limits.body_timeout + self._size / _BODY_RATE
        return min(self._last_read_at + limits.body_timeout, slowest, self.started_at + limits.total_timeout)

    def _late(self, now: float) -> UpstreamTimeout | None:
        limits = self._path.limits
        if self._paused:
            return None
        if self.first_byte_at is None:
            late = now - max(self._attempt_started_at, self._last_read_at) >= limits.first_token_timeout
            return UpstreamTimeout("first_token", limits.first_token_timeout) if late else None
        late = now - self._last_read_at >= limits.idle_timeout
        return UpstreamTimeout("idle", limits.idle_timeout) if late else None

    def _next_heartbeat(self) -> float:
        """When a comment is due, unless something comes before it."""
        interval = self._path.limits.heartbeat_interval
        return math.inf if interval is None else max(self._last_read_at, self._commented_at) + interval

    def _next_timeout(self, now: float) -> float:
        """When a limit may pass, or a heartbeat is due.

        At most an idle gap from now, so that the first byte need not set it anew.
        """
        limits = self._path.limits
        end = self.started_at + limits.total_timeout
        if not self.streaming:
            return end
        if limits.heartbeat_interval is not None:
            end = min(end, self._next_heartbeat())
        if self._paused:
            return min(end, now + limits.idle_timeout)
        if self.first_byte_at is None:
            first_token = max(self._attempt_started_at, self._last_read_at) + limits.first_token_timeout
            return min(end, now + limits.idle_timeout, first_token)
        return min(end, self._last_read_at + limits.idle_timeout)
