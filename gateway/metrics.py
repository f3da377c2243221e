"""Counters and histograms for Prometheus, updated once a request."""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.exchange import Exchange
from gateway.upstreams import UpstreamPool

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_FINE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """All metrics of one gateway, in a registry of their own."""

    def __init__(self, pool: UpstreamPool) -> None:
        # A `_created` series beside each counter doubles the page and tells nothing that is asked for.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library leaves this one unannotated
        self._pool = pool
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "gateway_requests",
            "Requests that have ended, by the status that was sent (499: the client had left before).",
            ("route", "form", "model", "status"),
            registry=self._registry,
        )
        self._in_flight = Gauge("gateway_in_flight", "Relayed requests in flight.", registry=self._registry)
        self._first_token = self._histogram(
            "gateway_first_token_seconds", "From a streamed request's start to the first byte of its answer.", _SECONDS
        )
        self._per_event = self._histogram(
            "gateway_output_event_seconds", "Mean time between a stream's events, once a request.", _FINE
        )
        self._total = self._histogram("gateway_request_seconds", "From a relayed request's start to its end.", _SECONDS)
        self._added = self._histogram(
            "gateway_added_seconds",
            "The gateway's own share: from the whole request read to its being sent, connecting included, and from "
            "the upstream's last byte to ours.",
            _FINE,
        )
        tokens = Counter("gateway_tokens", "Tokens that vLLM has reported.", ("kind",), registry=self._registry)
        self._prompt_tokens = tokens.labels("prompt")
        self._completion_tokens = tokens.labels("completion")
        self._registry.register(_Upstreams(pool))
        # A child per label set that occurs; the labels are bounded, so are the children.
        self._child = lru_cache(maxsize=4096)(self._requests.labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self._registry)

    def started(self, exchange: Exchange) -> None:
        """A relayed request has begun."""
        self._in_flight.inc()

    def finished(self, exchange: Exchange) -> None:
        """A relayed request has ended."""
        self._in_flight.dec()
        started, ended = exchange.started_at, exchange.ended_at or exchange.started_at
        model = exchange.model if exchange.model in self._pool.models else "unknown"
        self._child(exchange.route.path, exchange.form or "none", model, str(exchange.status)).inc()
        self._total.observe(ended - started)
        if exchange.received_at is not None and exchange.sent_at is not None:
            tail = ended - exchange.upstream_ended_at if exchange.upstream_ended_at is not None else 0
            self._added.observe(exchange.sent_at - exchange.received_at + tail)
        if exchange.streaming and exchange.first_byte_at is not None:
            self._first_token.observe(exchange.first_byte_at - started)
            if exchange.events > 1:
                self._per_event.observe((ended - exchange.first_byte_at) / (exchange.events - 1))
        if (usage := exchange.usage()) is not None:
            self._prompt_tokens.inc(usage[0])
            self._completion_tokens.inc(usage[1])

    def other(self, route: str, status: int) -> None:
        """A request that is not relayed has ended; `route` is a path of ours or `unknown`."""
        self._child(route, "none", "none", str(status)).inc()

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)


class _Upstreams(Collector):
    """The upstreams' states, read when asked for."""

    def __init__(self, pool: UpstreamPool) -> None:
        self._pool = pool

    def collect(self) -> list[Metric]:
        state = GaugeMetricFamily(
            "gateway_upstream_state", "1 for the state that an upstream is in.", labels=("upstream", "state")
        )
        in_flight = GaugeMetricFamily(
            "gateway_upstream_in_flight", "Requests in flight to an upstream.", labels=("upstream",)
        )
        for upstream in self._pool:
            for name in ("serving", "loading", "down"):
                state.add_metric((upstream.url, name), float(upstream.state == name))
            in_flight.add_metric((upstream.url,), upstream.in_flight)
        return [state, in_flight]
