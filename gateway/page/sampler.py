"""Samples the status of the gateway and its upstreams, each second and for five minutes, for all watchers."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from itertools import chain, repeat
from typing import Any

import orjson

from gateway.observability.recent_requests import PageFigures
from gateway.observability.ring import Ring
from gateway.pool.upstream_pool import Upstream
from gateway.relay.data_path import DataPath
from gateway.upstream import vllm_metrics
from gateway.upstream.prober import Prober
from gateway.upstream.vllm_metrics import VllmLoad
from gateway.wire import sse

_log = logging.getLogger(__name__)

# Seconds between two samples, how many are kept, and seconds that a sample waits for the upstreams' metrics.
_EVERY = 1.0
_KEPT = 300
_PATIENCE = 0.5
# A rate is over so many samples, because two alone say little; first tokens are those of the last minute.
_RATE_OF = 6
_FIRST_TOKENS_OF = 60.0
# Seconds for which the metrics of an upstream are valid.
_GOOD_FOR = 3.0
# Prefix hits are over so many samples: one minute.
_HITS_OF = 60
# Each watcher costs one event per second, sent through the app.
MOST_WATCHERS = 64


class _Rate:
    """The growth rate of a counter."""

    def __init__(self) -> None:
        # The time and the count of each sample.
        self._samples = Ring(_RATE_OF, 2)

    def add(self, now: float, count: float) -> None:
        """Add a sample; start over after a gap or a restart of the counter."""
        at, counts = self._samples.columns()
        if at and (count < counts[-1] or now - at[-1] >= _GOOD_FOR):
            self._samples.clear()
        self._samples.extend((now, count))

    @property
    def a_second(self) -> float | None:
        """The rate per second; None if it is not known yet."""
        at, counts = self._samples.columns()
        seconds = at[-1] - at[0] if at else 0
        return (counts[-1] - counts[0]) / seconds if seconds > 0 else None


class _HitRate:
    """The prefix cache hit rate of the last minute's prompts."""

    def __init__(self) -> None:
        # The time, hits and queries of each sample.
        self._samples = Ring(_HITS_OF, 3)

    def add(self, now: float, hits: float, queries: float) -> None:
        """Add a sample; start over after a gap or a restart of the counters."""
        at, _, counts = self._samples.columns()
        if at and (queries < counts[-1] or now - at[-1] >= _GOOD_FOR):
            self._samples.clear()
        self._samples.extend((now, hits, queries))

    @property
    def part(self) -> float | None:
        """The hit rate from 0 to 1, by tokens; None if no prompt came."""
        _, hits, queries = self._samples.columns()
        asked = queries[-1] - queries[0] if queries else 0
        return (hits[-1] - hits[0]) / asked if asked > 0 else None


class _History:
    """The figures of the last samples."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = (*names,)
        self._samples = Ring(_KEPT, len(self._names))

    def add(self, figures: dict[str, float | None]) -> None:
        """Add a sample that has all names; the oldest sample is dropped."""
        found = [figures[name] for name in self._names]
        self._samples.extend([math.nan if figure is None else figure for figure in found])

    def series(self) -> dict[str, list[float | None]]:
        """The values by name, oldest first."""
        return {
            name: [None if math.isnan(figure) else figure for figure in column]
            for name, column in zip(self._names, self._samples.columns(), strict=True)
        }


class _UpstreamSample:
    """The last metrics of an upstream, and the clock's time when they arrived."""

    def __init__(self) -> None:
        self.load: VllmLoad | None = None
        self.at = -math.inf
        self.generated = _Rate()
        self.hits = _HitRate()

    def add(self, now: float, load: VllmLoad | None) -> None:
        """Add the metrics that the upstream reports now."""
        self.load, self.at = load, now
        if load is not None:
            self.generated.add(now, load.generated)
            self.hits.add(now, load.found, load.looked_for)

    def figures(self, now: float) -> dict[str, float | None]:
        """The figures for the page: None if unknown or outdated; prefix hits only if a prompt came."""
        load = self.load if now - self.at < _GOOD_FOR else None
        if load is None:
            return {"running": None, "waiting": None, "kv_cache": None, "tokens_per_second": None}
        hits = self.hits.part
        return {
            "running": load.running,
            "waiting": load.waiting,
            "kv_cache": round(load.kv_cache, 4),
            "tokens_per_second": _rounded(self.generated.a_second),
            **({} if hits is None else {"prefix_hits": round(hits, 4)}),
        }


class Sampler:
    """Samples the gateway's own figures always, for the history; vLLM's only while someone watches."""

    def __init__(self, data_path: DataPath, prober: Prober, recent: PageFigures, version: str, build: str) -> None:
        """`version` is the gateway's own, `build` says whether it is compiled."""
        self._version = version
        self._build = build
        self._path = data_path
        self._prober = prober
        self._recent = recent
        self._samples: dict[Upstream, _UpstreamSample] = {}
        self._asking: dict[Upstream, asyncio.Task[None]] = {}
        self._asked_at = -math.inf
        self._requests, self._failed = _Rate(), _Rate()
        self._history = _History(self._figures())
        self._watchers = 0
        self._due = -math.inf
        self._sampling: asyncio.Task[None] | None = None
        self._event = b""
        self._sampled = asyncio.Event()

    def sample_if_due(self) -> None:
        """Take a sample if the last one is a second old; called by the periodic work."""
        now = self._path.time()
        if now < self._due:
            return
        self._due = max(self._due + _EVERY, now)
        if self._watchers and not self._ends:
            self._sampling = asyncio.create_task(self._ask_and_sample())
        else:
            self._sample()

    async def close(self) -> None:
        """Stop sampling."""
        tasks = [*self._asking.values(), *([self._sampling] if self._sampling else [])]
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def report(self) -> bytes:
        """The status now, with the history."""
        await self._ask()
        return orjson.dumps(self._report() | {"history": self._history.series()})

    def begin_watch(self) -> bool:
        """Take a place for a `watch`; False if none is free. `end_watch` gives it back."""
        free = self._watchers < MOST_WATCHERS
        self._watchers += free
        return free

    def end_watch(self) -> None:
        """Give the place back."""
        self._watchers -= 1

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """The report as an event, then one event with the status per sample, until the gateway shuts down."""
        yield sse.encode(await self.report())
        while not self._ends:
            await self._sampled.wait()
            yield self._event

    @property
    def _ends(self) -> bool:
        return self._path.drain.ends_at < math.inf

    async def _ask_and_sample(self) -> None:
        try:
            await self._ask()
            self._sample()
        except Exception:
            # A bug in the gateway, which must not end all samples.
            _log.exception("a sample failed")

    def _sample(self) -> None:
        now = self._path.time()
        self._requests.add(now, self._recent.requests)
        self._failed.add(now, self._recent.failed)
        self._history.add(self._figures())
        if self._watchers:
            self._event = sse.encode(orjson.dumps(self._report()))
            sampled, self._sampled = self._sampled, asyncio.Event()
            sampled.set()

    async def _ask(self) -> None:
        """Request the upstreams' metrics, at most once a second for any number of watchers."""
        now = self._path.time()
        if now - self._asked_at >= _EVERY * 0.9:
            self._asked_at = now
            for upstream in self._path.pool:
                # Upstreams in other states are probed each second anyway.
                if upstream.state == "serving" and upstream not in self._asking:
                    self._asking[upstream] = asyncio.create_task(self._hear(upstream))
        if self._asking:
            await asyncio.wait(self._asking.values(), timeout=_PATIENCE)

    async def _hear(self, upstream: Upstream) -> None:
        sample = self._samples.setdefault(upstream, _UpstreamSample())
        try:
            load = vllm_metrics.read(await self._prober.metrics(upstream))
        finally:
            del self._asking[upstream]
        sample.add(self._path.time(), load)

    def _figures(self) -> dict[str, float | None]:
        now = self._path.time()
        first_tokens = self._recent.first_tokens(now - _FIRST_TOKENS_OF) or (None, None)
        generated = [sample.figures(now)["tokens_per_second"] for sample in self._samples.values()]
        known = [rate for rate in generated if rate is not None]
        return {
            "in_flight": len(self._path.in_flight),
            "queue": len(self._path.queue),
            "buffered_bytes": self._path.buffers.held,
            "requests_per_second": _rounded(self._requests.a_second),
            "errors_per_second": _rounded(self._failed.a_second),
            "first_token_p50": _rounded(first_tokens[0]),
            "first_token_p99": _rounded(first_tokens[1]),
            "tokens_per_second": _rounded(sum(known)) if known else None,
        }

    def _report(self) -> dict[str, Any]:
        now = self._path.time()
        upstreams = self._prober.report(now)
        known = [one for one in (*self._path.pool, *self._path.pool.leaving) if one.in_flight or not one.gone]
        self._samples = {one: self._samples.get(one) or _UpstreamSample() for one in known}
        # The report lists names without addresses after the upstreams.
        for upstream, sample in zip(upstreams, chain(self._samples.values(), repeat(_UpstreamSample())), strict=False):
            upstream |= sample.figures(now) if upstream["state"] == "serving" else _UpstreamSample().figures(now)
        serving = any(upstream["state"] == "serving" for upstream in upstreams)
        return {
            "status": "draining" if self._path.drain.began else "serving" if serving else "unavailable",
            "version": self._version,
            "build": self._build,
            "now": self._figures(),
            "upstreams": upstreams,
            "models": self._models(upstreams),
            "keys": self._keys(now),
            "errors": [*reversed(self._recent.failures)],
            "time": round(time.time(), 3),
        }

    def _models(self, upstreams: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each served model its upstreams and running and waiting calls; the name None is for models not served."""
        served = self._path.pool.models
        listed: Counter[str] = Counter(model for upstream in upstreams for model in upstream["models"])
        serving = Counter(
            model for upstream in upstreams if upstream["state"] == "serving" for model in upstream["models"]
        )
        # A name that a client made up is not shown; if one model is served, a call need not name it.
        names: dict[str | None, str | None] = {model: model for model in served}
        unnamed = served[0] if len(served) == 1 else None
        waiting = Counter(names.get(call.model, unnamed) for call in self._path.queue)
        running = Counter(names.get(call.model, unnamed) for call in self._path.in_flight if call.upstream is not None)
        others = [None] if unnamed is None and (waiting[None] or running[None]) else []
        return [
            {
                "model": model,
                "upstreams": listed[model] if model else None,
                "serving": serving[model] if model else None,
                "running": running[model],
                "queue": waiting[model],
            }
            for model in (*served, *others)
        ]

    def _keys(self, now: float) -> list[dict[str, Any]] | None:
        """For each key its name, running and waiting calls, and the rest of its minute's limits; None without keys."""
        if self._path.keys is None:
            return None
        return [
            {
                "name": key.name,
                "running": key.in_flight,
                "max_in_flight": key.max_in_flight,
                "queue": self._path.queue.count_of(key),
                "requests_left": None if key.a_minute is None else key.left(now)[0],
                "requests_a_minute": key.a_minute,
                "tokens_left": None if key.tokens is None else key.tokens.left(now)[0],
                "tokens_a_minute": None if key.tokens is None else key.tokens.a_minute,
            }
            for key in self._path.keys
        ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
