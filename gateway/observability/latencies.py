"""How long the last calls took, in the form in which the replaced microservices told it."""

from __future__ import annotations

import math

from gateway.observability.ring import Ring

# Figures are of the last so many: those of a day ago say nothing of now, and memory stays what it is.
_LAST = 1000


class Latencies:
    """Seconds of the last calls: to their end, and to the first byte of those that were streamed."""

    def __init__(self) -> None:
        self._total = Ring(_LAST)
        self._first_token = Ring(_LAST)

    def add(self, total: list[float], first_token: list[float]) -> None:
        """More calls, in seconds."""
        self._total.extend(total)
        self._first_token.extend(first_token)

    def report(self) -> dict[str, dict[str, float | None]]:
        """The body of `GET /v1/statistics`; None where no such call has ended yet."""
        figures = _figures("latency", self._total) | _figures("latency_first_token", self._first_token)
        return {"opea_service@llm": figures}


def _figures(name: str, seconds: Ring) -> dict[str, float | None]:
    (column,) = seconds.columns()
    found = sorted(column)
    if not found:
        return {f"p50_{name}": None, f"p99_{name}": None, f"average_{name}": None}
    p50, p99 = (found[math.ceil(share * len(found)) - 1] for share in (0.5, 0.99))
    return {f"p50_{name}": p50, f"p99_{name}": p99, f"average_{name}": math.fsum(found) / len(found)}
