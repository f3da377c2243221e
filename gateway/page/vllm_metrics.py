"""How busy a vLLM is, by its own metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass

_RUNNING = "vllm:num_requests_running{"
_WAITING = "vllm:num_requests_waiting{"
_KV_CACHE = "vllm:kv_cache_usage_perc{"
_GENERATED = "vllm:generation_tokens_total{"
_ALL = (_RUNNING, _WAITING, _KV_CACHE, _GENERATED)


@dataclass(frozen=True, slots=True)
class VllmLoad:
    """Requests that run and wait in all its engines, the fullest one's KV cache (0 to 1), and tokens made so far."""

    running: float
    waiting: float
    kv_cache: float
    generated: float


def read(text: str) -> VllmLoad | None:
    """Of what vLLM's `/metrics` answers; None where it is not that."""
    found: dict[str, list[float]] = {name: [] for name in _ALL}
    for line in text.splitlines():
        if line.startswith(_ALL):
            name, value = line[: line.index("{") + 1], line.rpartition(" ")[2]
            try:
                found[name].append(float(value))
            except ValueError:
                return None
    if not all(found.values()) or not all(math.isfinite(value) for values in found.values() for value in values):
        return None
    return VllmLoad(sum(found[_RUNNING]), sum(found[_WAITING]), max(found[_KV_CACHE]), sum(found[_GENERATED]))
