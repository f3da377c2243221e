"""What a choice costs: a prompt's key and its upstream, beside the least load of as many upstreams.

That least load is this gateway's own, and the one that it had before prompts had keys: a bar set by that one does not
move where its own becomes cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from random import Random
from time import perf_counter

from bench.routing.workloads import MODEL, any_text, chat_call
from gateway.pool.upstream_pool import Upstream, UpstreamPool

# By the bodies' size and the number of upstreams: microseconds a choice of each kind.
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
            before = _Before(_pool(random, upstreams, by_prefix=False))
            rounds = {"before": _by_load(before), "least": _by_load(_pool(random, upstreams, by_prefix=False))}
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


class _Before:
    """The least load as it was: all are looked through for those that serve, and `min` finds the least of these."""

    def __init__(self, upstreams: Iterable[Upstream]) -> None:
        self._upstreams = tuple(upstreams)
        self._most_in_flight = math.inf
        self._turn = 0

    def select(self, model: str, now: float) -> Upstream | None:
        if sum(upstream.in_flight for upstream in self._upstreams) >= self._most_in_flight:
            return None
        best = self._best(self._serving(model), now)
        self._turn += 1
        best.chosen_at = self._turn
        return best

    def _serving(self, model: str) -> Sequence[Upstream]:
        return [one for one in self._upstreams if model in one.models] or self._upstreams

    def _best(self, able: Sequence[Upstream], now: float) -> Upstream:
        return min(able, key=lambda one: (self._rank(one, now), one.in_flight, one.chosen_at))

    @staticmethod
    def _rank(upstream: Upstream, now: float) -> int:
        if upstream.state != "serving":
            return 2
        return 1 if upstream.failing(now) else 0


def _by_load(pool: UpstreamPool | _Before) -> Callable[[], None]:
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
