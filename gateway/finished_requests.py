"""Requests that have ended, until they are counted, traced and logged: several at a time."""

from __future__ import annotations

import logging
from typing import Final, Protocol

from gateway.observability.recent_requests import RecentRequests
from gateway.observability.request_log import RequestLog
from gateway.observability.request_metrics import RequestMetrics
from gateway.relay.record import Record

_log = logging.getLogger(__name__)

# Ended requests are counted and logged so many at a time, or after so many seconds: the same work in a row costs half
# of what it costs between two requests, but a longer row would hold up other requests' events.
_SETTLED_TOGETHER: Final = 16


class Observer(Protocol):
    """What is told of them, too, where requests are traced."""

    def finished(self, records: list[Record]) -> None:
        """These have ended."""


class FinishedRequests:
    """Data-path requests that have ended and are to be counted, traced and logged."""

    def __init__(
        self, metrics: RequestMetrics, recent: RecentRequests, request_log: RequestLog, tracer: Observer | None
    ) -> None:
        self._metrics = metrics
        self._recent = recent
        self._request_log = request_log
        self._tracer = tracer
        self._waiting: list[Record] = []

    def add(self, record: Record) -> None:
        """One more."""
        self._waiting.append(record)
        if len(self._waiting) >= _SETTLED_TOGETHER:
            try:
                self.flush()
            except Exception:
                # The call that has ended has yet to be answered.
                _log.exception("requests that have ended could not be counted or logged")

    def flush(self) -> None:
        """Count, trace and log those that wait."""
        if not self._waiting:
            return
        finished, self._waiting = self._waiting, []
        self._metrics.finished(finished)
        self._recent.add(finished)
        if self._tracer is not None:
            self._tracer.finished(finished)  # before their lines, which name the traces
        self._request_log.records(finished)
