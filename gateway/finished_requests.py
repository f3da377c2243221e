"""Collects ended requests until they are counted, traced and logged in batches."""

from __future__ import annotations

import logging
from typing import Final, Protocol

from gateway.observability.recent_requests import RecentRequests
from gateway.observability.request_log import RequestLog
from gateway.observability.request_metrics import RequestMetrics
from gateway.relay.record import Record

_log = logging.getLogger(__name__)

# Ended requests are counted and logged in batches of so many, or by the periodic work: in a batch the same work costs
# half of its cost between two requests, but a larger batch would delay other requests' events.
_SETTLED_TOGETHER: Final = 16


class Observer(Protocol):
    """Also receives the ended requests if requests are traced."""

    def finished(self, records: list[Record]) -> None:
        """Process requests that have ended."""


class FinishedRequests:
    """Data-path requests that have ended but are not yet counted, traced and logged."""

    def __init__(
        self, metrics: RequestMetrics, recent: RecentRequests, request_log: RequestLog, tracer: Observer | None
    ) -> None:
        self._metrics = metrics
        self._recent = recent
        self._request_log = request_log
        self._tracer = tracer
        self._waiting: list[Record] = []

    def add(self, record: Record) -> None:
        """Add an ended request; flush a full batch."""
        self._waiting.append(record)
        if len(self._waiting) >= _SETTLED_TOGETHER:
            try:
                self.flush()
            except Exception:
                # Not raised further: the ended call must still be answered.
                _log.exception("requests that have ended could not be counted or logged")

    def flush(self) -> None:
        """Count, trace and log the collected requests."""
        if not self._waiting:
            return
        finished, self._waiting = self._waiting, []
        self._metrics.finished(finished)
        self._recent.add(finished)
        if self._tracer is not None:
            self._tracer.finished(finished)  # before the log lines, which contain the trace ids
        self._request_log.records(finished)
