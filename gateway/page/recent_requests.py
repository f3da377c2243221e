"""What the data path did lately: counted in batches, once requests have ended."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

from gateway.observability.ring import Ring
from gateway.relay.record import Record

# First tokens are kept of so many answers, failures of so many requests.
_FIRST_TOKENS = 1000
_FAILURES = 20


class Recent:
    """How many requests have ended and how many failed, the last failures, and when first tokens came.

    A request failed where it was refused, broke off or passed a time limit: not where its client left.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.failed = 0
        self.failures: deque[dict[str, Any]] = deque(maxlen=_FAILURES)
        # When each came, and how long it took.
        self._first_tokens = Ring(_FIRST_TOKENS, 2)

    def add(self, records: list[Record]) -> None:
        """These have ended."""
        self.requests += len(records)
        first_tokens: list[float] = []
        for record in records:
            if record.status >= 400 or record.outcome != "done":
                self._failed(record)
            elif record.streaming and record.first_byte_at is not None:
                first_tokens += (record.first_byte_at, record.first_byte_at - record.started_at)
        self._first_tokens.extend(first_tokens)

    def _failed(self, record: Record) -> None:
        if record.outcome == "client_left":
            return
        self.failed += 1
        self.failures.append(
            {
                "time": round(time.time(), 3),
                "status": record.status,
                "outcome": record.outcome,
                "path": record.route.path,
                "request_id": record.request_id,
                "upstream": record.upstream.url if record.upstream else None,
            }
        )

    def first_tokens(self, since: float) -> tuple[float, float] | None:
        """The median and the 99th percentile, in seconds, of those that came since; None where none did."""
        took = sorted(took for at, took in zip(*self._first_tokens.columns(), strict=True) if at > since)
        if not took:
            return None
        p50, p99 = (took[math.ceil(share * len(took)) - 1] for share in (0.5, 0.99))
        return p50, p99
