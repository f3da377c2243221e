"""The last ended requests: durations for `GET /v1/statistics`, and more figures for the page."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from gateway.observability.ring import Ring
from gateway.relay.record import Record

# How many durations and failures are kept: older ones say nothing about now, and memory must not grow.
_LAST: Final = 1000
_FAILURES: Final = 20
# Error messages are cut to so many characters: some list all models.
_LONGEST_SENTENCE: Final = 400


class PageFigures:
    """The page's own figures: counts of ended and failed requests, last failures, and last times to first token.

    A request failed if it was refused, broke off or timed out, but not if its client disconnected.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.failed = 0
        self.failures: deque[dict[str, Any]] = deque(maxlen=_FAILURES)
        # Streams of all routes: the clock's time of the first token, and the seconds until then.
        self.streams = Ring(_LAST, 2)

    def add_failure(self, record: Record) -> None:
        """Count and keep a failed request, unless its client disconnected.

        An upstream's own error has no code and message here: vLLM's message may repeat the prompt.
        """
        if record.outcome == "client_left":
            return
        self.failed += 1
        code, sentence = record.error or (None, None)
        self.failures.append(
            {
                "time": round(time.time(), 3),
                "status": record.status,
                "outcome": record.outcome,
                "code": code,
                "message": sentence and sentence[:_LONGEST_SENTENCE],
                "path": record.route.path,
                "request_id": record.request_id,
                "upstream": record.upstream.url if record.upstream else None,
            }
        )

    def first_tokens(self, since: float) -> tuple[float, float] | None:
        """The median and 99th percentile, in seconds, of first tokens after the clock's `since`; None without any."""
        return _percentiles([took for at, took in zip(*self.streams.columns(), strict=True) if at > since])


class RecentRequests:
    """The durations of the last chat calls: to their end, and to the first byte of streamed calls.

    The same pass over a batch fills the page's figures. The page's first tokens are kept apart from those of chat
    calls: they cover streams of all routes, so the last 1000 of one are not the last 1000 of the other.
    """

    def __init__(self, page: PageFigures | None) -> None:
        """`page` is None if the page is disabled."""
        self._page = page
        self._total = Ring(_LAST)
        self._first_token = Ring(_LAST)

    def add(self, records: list[Record]) -> None:
        """Add a batch of requests that have ended."""
        page = self._page
        total, first_token, streams = [], [], []
        for record in records:
            started, first_byte = record.started_at, record.first_byte_at
            if record.status >= 400 or record.outcome != "done":
                if page is not None:
                    page.add_failure(record)
                continue
            chat = record.status == 200 and record.route.body == "chat"
            if chat:
                total.append((record.ended_at or started) - started)
            if record.streaming and first_byte is not None:
                streams += [first_byte, first_byte - started]
                if chat:
                    first_token.append(first_byte - started)
        self._total.extend(total)
        self._first_token.extend(first_token)
        if page is not None:
            page.requests += len(records)
            page.streams.extend(streams)

    def report(self) -> dict[str, dict[str, float | None]]:
        """The body of `GET /v1/statistics`, in seconds; None before the first such call."""
        figures = _figures("latency", self._total) | _figures("latency_first_token", self._first_token)
        return {"opea_service@llm": figures}


def _figures(name: str, ring: Ring) -> dict[str, float | None]:
    (seconds,) = ring.columns()
    p50, p99 = _percentiles(seconds) or (None, None)
    average = math.fsum(seconds) / len(seconds) if seconds else None
    return {f"p50_{name}": p50, f"p99_{name}": p99, f"average_{name}": average}


def _percentiles(seconds: Sequence[float]) -> tuple[float, float] | None:
    """The median and the 99th percentile, by nearest rank; None without values."""
    if not seconds:
        return None
    found = sorted(seconds)
    p50, p99 = (found[math.ceil(share * len(found)) - 1] for share in (0.5, 0.99))
    return p50, p99
