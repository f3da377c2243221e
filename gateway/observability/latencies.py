"""How long the last calls took, in the form in which the replaced microservices told it."""

from __future__ import annotations

import math
from array import array

# Figures are of the last so many: those of a day ago say nothing of now, and memory stays what it is.
_LAST = 1000


class Latencies:
    """Seconds of the last calls: to their end, and to the first byte of those that were streamed."""

    def __init__(self) -> None:
        self._total = _Last()
        self._first_token = _Last()

    def add(self, total: list[float], first_token: list[float]) -> None:
        """More calls, in seconds."""
        self._total.add(total)
        self._first_token.add(first_token)

    def report(self) -> dict[str, dict[str, float | None]]:
        """The body of `GET /v1/statistics`; None where no such call has ended yet."""
        figures = self._total.figures("latency") | self._first_token.figures("latency_first_token")
        return {"opea_service@llm": figures}


class _Last:
    __slots__ = ("_at", "_values")

    def __init__(self) -> None:
        self._values = array("d")
        self._at = 0

    def add(self, values: list[float]) -> None:
        for value in values:
            if len(self._values) < _LAST:
                self._values.append(value)
            else:
                self._values[self._at] = value
                self._at = (self._at + 1) % _LAST

    def figures(self, name: str) -> dict[str, float | None]:
        found = sorted(self._values)
        if not found:
            return {f"p50_{name}": None, f"p99_{name}": None, f"average_{name}": None}
        p50, p99 = (found[math.ceil(share * len(found)) - 1] for share in (0.5, 0.99))
        return {f"p50_{name}": p50, f"p99_{name}": p99, f"average_{name}": math.fsum(found) / len(found)}
