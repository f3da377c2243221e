"""The time limits of one call: which limit has passed, and when the next may pass."""

from __future__ import annotations

import math
from typing import Final

from gateway.relay.data_path import DataPath
from gateway.relay.record import Record
from gateway.wire.errors import RequestTimeout, UpstreamTimeout

# The slowest rate of a body in bytes a second, after its time limit.
_BODY_RATE: Final = 1024


class TimedRecord(Record):
    """A record with the times and sizes of its limits, which an exchange sets. No limit can pass before `deadline`.

    `_commented_at` is when the last comment was sent. `_size` is the size of the received part of the request's body.
    `_last_read_at` is when a part of it, or of the answer, was last received. `_paused` says that the client reads the
    answer more slowly than the upstream writes it.
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
        """The error if the request's body, which is timed from `since`, is too slow."""
        limits = self._path.limits
        if now - self._last_read_at >= limits.body_timeout:
            return RequestTimeout(f"The request's body stopped for {limits.body_timeout:g} s (GATEWAY_BODY_TIMEOUT).")
        if now - self.started_at >= limits.total_timeout:
            return RequestTimeout(f"The request took longer than {limits.total_timeout:g} s (GATEWAY_TOTAL_TIMEOUT).")
        if now - since >= limits.body_timeout + self._size / _BODY_RATE:
            return RequestTimeout(f"The request's body came more slowly than {_BODY_RATE} bytes a second.")
        return None

    def _body_deadline(self, since: float) -> float:
        """When `_late_body` may next return an error."""
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
        """When a comment is due, unless data are received before."""
        interval = self._path.limits.heartbeat_interval
        return math.inf if interval is None else max(self._last_read_at, self._commented_at) + interval

    def _next_timeout(self, now: float) -> float:
        """When a limit may pass, or a heartbeat is due.

        For a stream, at most an idle gap from now, so that the first byte need not set it again.
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
