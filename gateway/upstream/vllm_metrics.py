"""Reads the load and the prefix cache hits of a vLLM server from its metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV_CACHE = "vllm:kv_cache_usage_perc"
_GENERATED = "vllm:generation_tokens_total"
# Prompt tokens that were looked up in the prefix cache, and those that were found.
_LOOKED_FOR = "vllm:prefix_cache_queries_total"
_FOUND = "vllm:prefix_cache_hits_total"
_NEEDED = (_RUNNING, _WAITING, _KV_CACHE, _GENERATED)
_NAMES = (*_NEEDED, _LOOKED_FOR, _FOUND)
# With the brace, because names of other metrics begin with these names.
_STARTS = tuple(f"{name}{{" for name in _NAMES)

# In characters; the lines of vLLM have some 100.
_LONGEST_LINE = 4096


@dataclass(frozen=True, slots=True)
class VllmLoad:
    """Requests that run and wait in all engines, KV cache usage of the fullest engine (0 to 1), and generated tokens.

    `looked_for` counts the prompt tokens that were looked up in the prefix cache, `found` those that were found.
    """

    running: float
    waiting: float
    kv_cache: float
    generated: float
    looked_for: float
    found: float


def read(text: str) -> VllmLoad | None:
    """Read the text of vLLM's `/metrics`; None if a metric is missing, malformed or not finite."""
    values: dict[str, list[float]] = {name: [] for name in _NAMES}
    try:
        for sample in _samples(text):
            values[sample.name].append(float(sample.value))  # the parser makes an int of "2"
    except (ValueError, IndexError, OverflowError):  # the parser's undocumented errors
        return None
    if not all(values[name] for name in _NEEDED) or not all(map(math.isfinite, chain(*values.values()))):
        return None
    running, waiting, generated, looked_for, found = (
        sum(values[name]) for name in (_RUNNING, _WAITING, _GENERATED, _LOOKED_FOR, _FOUND)
    )
    return VllmLoad(running, waiting, max(values[_KV_CACHE]), generated, looked_for, found)


def _samples(text: str) -> Iterator[Sample]:
    # vLLM exports hundreds of metrics, and the parser is slow.
    lines = [line for line in text.splitlines() if line.startswith(_STARTS)]
    if any(len(line) > _LONGEST_LINE for line in lines):
        raise ValueError("a line is too long")  # the parser's time is quadratic in the number of labels
    for family in text_string_to_metric_families("\n".join(lines)):
        yield from family.samples
