"""What a choice costs: a prompt's key and its upstream, beside the least load of as many upstreams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from random import Random
from time import perf_counter

from bench.routing.workloads import MODEL, any_text, chat_call
from gateway.pool.upstream_pool import Upstream, UpstreamPool

# By the bodies' size and the number of upstreams: microseconds a choice of each kind, the least load's first.
Costs = dict[tuple[str, int], dict[str, float]]

# In tokens of four bytes.
_SIZES = {"500 B": 100, "4 KB": 975, "67 KB": 16_725}
_UPSTREAMS = (2, 8, 64)
# A round is shorter than a time slice, and the best of them counts: what is more is another process's.
_ROUNDS, _CHOICES = 100, 100
# So many calls came before, of so many bodies.
_BEFORE, _BODIES = 5000, 400


def costs() -> Costs:
    """Of every kind, in turns."""
    found: Costs = {}
    for size, tokens in _SIZES.items():
        random = Random(1)
        prompts = _prompts(random, tokens)
        for upstreams in _UPSTREAMS:
            rounds = {"least": _by_load(_pool(random, upstreams, by_prefix=False))}
            rounds |= {kind: _by_key(_pool(random, upstreams, by_prefix=True), own) for kind, own in prompts.items()}
            best = dict.fromkeys(rounds, math.inf)
            for _ in range(_ROUNDS):
                for kind, choose in rounds.items():
                    begun = perf_counter()
                    choose()
                    best[kind] = min(best[kind], (perf_counter() - begun) / _CHOICES * 1e6)
            found[size, upstreams] = best
    return found


def _prompts(random: Random, tokens: int) -> dict[str, list[bytes]]:
    """That begin differently, that begin with one template of 1.3 KB, and that differ in their last bytes alone."""

    def bodies(shared: int) -> list[bytes]:
        beginning = any_text(random, shared)
        texts = [beginning + any_text(random, tokens - shared) for _ in range(_BODIES)]
        return [chat_call(0, [text], 1).body for text in texts]

    kinds = {"common": bodies(0), "all hot": bodies(tokens - 5)}
    return kinds | {"template": bodies(325)} if tokens > 325 else kinds


def _by_load(pool: UpstreamPool) -> Callable[[], None]:
    def choose() -> None:
        for _ in range(_CHOICES):
            pool.select(MODEL, 0)

    return choose


def _by_key(pool: UpstreamPool, bodies: Sequence[bytes]) -> Callable[[], None]:
    turns = cycle(bodies)
    for body in islice(turns, _BEFORE):
        pool.key_of(MODEL, None, body)

    def choose() -> None:
        for _ in range(_CHOICES):
            pool.select(MODEL, 0, key=pool.key_of(MODEL, None, next(turns)))

    return choose


def _pool(random: Random, upstreams: int, *, by_prefix: bool) -> UpstreamPool:
    """Of upstreams that are more or less busy."""
    pool = UpstreamPool(
        tuple(Upstream.from_url(f"http://10.0.0.{number}:8000") for number in range(upstreams)), by_prefix=by_prefix
    )
    for one in pool:
        one.state, one.models, one.in_flight = "serving", (MODEL,), random.randint(0, 20)
    return pool
