"""Counters, gauges and histograms for Prometheus, rendered as text at each scrape."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Container
from typing import cast, get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.admission.admission_queue import AdmissionQueue
from gateway.admission.arrivals import Arrivals
from gateway.admission.buffers import Buffers
from gateway.observability.own_version import own_build, own_version
from gateway.observability.request_metrics import RequestMetrics
from gateway.pool.upstream_pool import State, UpstreamPool
from gateway.relay.interfaces import Call


class Metrics(Collector):
    """All metrics of one gateway."""

    def __init__(
        self,
        pool: UpstreamPool,
        in_flight: set[Call],
        queue: AdmissionQueue[Call],
        arrivals: Arrivals[Call],
        buffers: Buffers,
        time: Callable[[], float],
        lost_lines: Callable[[], int],
        aliases: Container[str],
        keys: Callable[[], Collection[str]],
        certificate_ends_at: Callable[[], float | None],
    ) -> None:
        """Most arguments are parts of the data path; `lost_lines` returns the number of lost log lines.

        `aliases` are the models' aliases and `keys` returns the names of the keys. `certificate_ends_at` returns when
        the gateway's own certificate expires, in seconds since 1970.
        """
        self.requests = RequestMetrics(lambda: pool.models, keys, aliases, time)
        self._certificate_ends_at = certificate_ends_at
        self._version = own_version()
        self._lost_lines = lost_lines
        self._queue = queue
        self._arrivals = arrivals
        self._buffers = buffers
        self._time = time
        self._pool = pool
        self._in_flight = in_flight
        self._registry = CollectorRegistry()
        self._registry.register(self)
        # Memory, CPU time and descriptors of this process.
        ProcessCollector(registry=self._registry)

    async def text(self) -> bytes:
        """The exposition format, version 0.0.4; it yields after each family, as many models and keys take long."""
        text = []
        for family in self._registry.collect():
            text.append(generate_latest(cast(CollectorRegistry, _One(family))))
            await asyncio.sleep(0)
        return b"".join(text)

    def collect(self) -> list[Metric]:
        """Called by the registry at each scrape."""
        info = GaugeMetricFamily(
            "gateway_info", "1, for the version that runs, and whether it is compiled.", labels=("version", "build")
        )
        info.add_metric((self._version, own_build()), 1)
        certificate = GaugeMetricFamily(
            "gateway_certificate_end_timestamp_seconds", "When the certificate that the ports show ends; Unix time."
        )
        if (ends := self._certificate_ends_at()) is not None:
            certificate.add_metric((), ends)
        buffered = GaugeMetricFamily(
            "gateway_buffered_bytes",
            "What is held of requests, answers and what is not yet written.",
            value=self._buffers.held,
        )
        most = GaugeMetricFamily("gateway_buffered_bytes_limit", "Most that may be held.", value=self._buffers.limit)
        lost = CounterMetricFamily(
            "gateway_log_lines_lost",
            "Lines of the log that were dropped, or could not be written.",
            value=self._lost_lines(),
        )
        return [info, certificate, *self._calls(), buffered, most, lost, *self.requests.families(), *self._upstreams()]

    def _calls(self) -> list[Metric]:
        """The calls in flight and waiting: in total, by model and by key."""
        in_flight = GaugeMetricFamily("gateway_in_flight", "Relayed requests in flight.", value=len(self._in_flight))
        waiting = GaugeMetricFamily("gateway_waiting", "Those of them that wait for room.", value=len(self._queue))
        arriving = GaugeMetricFamily(
            "gateway_arriving", "Those of them that have not come whole.", value=len(self._arrivals)
        )
        found: list[Metric] = [in_flight, waiting, arriving]
        models, keys = self.requests.models, self.requests.keys
        for what, calls, text in (
            ("in_flight", self._in_flight, "Relayed requests in flight"),
            ("waiting", self._queue, "Those of them that wait for room"),
        ):
            by_model = Counter([models.get(one.model or "") or models.take(one.model) for one in calls])
            by_key = Counter([keys.get(one.key.name) or keys.take(one.key.name) for one in calls if one.key])
            for label, names, counted in (("model", models, by_model), ("key", keys, by_key)):
                family = GaugeMetricFamily(f"gateway_{label}_{what}", f"{text}, by {label}.", labels=(label,))
                for name in dict.fromkeys([*names.values(), *counted]):
                    family.add_metric((name,), counted[name])
                found.append(family)
        return found

    def _upstreams(self) -> list[Metric]:
        state = GaugeMetricFamily(
            "gateway_upstream_state", "1 for the state that an upstream is in.", labels=("upstream", "state")
        )
        in_flight = GaugeMetricFamily(
            "gateway_upstream_in_flight", "Requests in flight to an upstream.", labels=("upstream",)
        )
        left = CounterMetricFamily(
            "gateway_upstream_left",
            "Requests that an upstream refused or did not take, and another was asked for.",
            labels=("upstream",),
        )
        now = self._time()
        hits = GaugeMetricFamily(
            "gateway_upstream_prefix_hit_ratio",
            "Part of its prompts' tokens that an upstream had in its prefix cache of late, by its own metrics.",
            labels=("upstream",),
        )
        for upstream in (*self._pool, *[one for one in self._pool.leaving if one.in_flight]):
            status, _ = upstream.status(now)
            for name in get_args(State):
                state.add_metric((upstream.url, name), float(status == name))
            in_flight.add_metric((upstream.url,), upstream.in_flight)
            left.add_metric((upstream.url,), upstream.failovers)
            if upstream.prefix_hits is not None:
                hits.add_metric((upstream.url,), upstream.prefix_hits)
        routed = CounterMetricFamily(
            "gateway_routed", "Calls by how their upstream was found among several.", labels=("how",)
        )
        for how, calls in self._pool.routed.items():
            routed.add_metric((how,), calls)
        return [state, in_flight, left, hits, routed]


class _One:
    """A registry of one family, to render it alone."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        """Return the family."""
        return [self._family]
