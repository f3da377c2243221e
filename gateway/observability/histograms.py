"""Histograms by model, kept as plain numbers until Prometheus scrapes them."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric


class Histogram:
    """Counts by model and bucket; each bucket but the last has an upper bound in seconds."""

    __slots__ = ("_bounds", "_counts", "_name", "_sums", "_text")

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        # Arrays, not lists: each new number in a list is a new object, allocated among short-lived objects.
        self._counts: dict[str, array[int]] = {}
        self._sums: dict[str, array[float]] = {}

    def observe(self, values: Mapping[str, list[float]]) -> None:
        """Add these durations in seconds, by model."""
        bounds = self._bounds
        for model, found in values.items():
            counts = self._counts.get(model)
            if counts is None:
                counts = self._counts[model] = array("Q", bytes(8 * (len(bounds) + 1)))
                self._sums[model] = array("d", [0.0])
            for value in found:
                counts[bisect_left(bounds, value)] += 1
            self._sums[model][0] += sum(found)

    def drop(self, model: str) -> None:
        """Drop this model's series."""
        self._counts.pop(model, None)
        self._sums.pop(model, None)

    def family(self) -> Metric:
        """The metric family for Prometheus."""
        names = [*map(str, self._bounds), "+Inf"]
        family = HistogramMetricFamily(self._name, self._text, labels=("model",))
        for model, counts in self._counts.items():
            buckets = list(zip(names, accumulate(counts), strict=True))
            family.add_metric((model,), buckets, self._sums[model][0])
        return family
