"""Counters and histograms for Prometheus: plain numbers, updated once a request, made into text when asked for."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Container
from importlib.metadata import version
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.admission.admission_queue import AdmissionQueue
from gateway.admission.arrivals import Arrivals
from gateway.admission.buffers import Buffers
from gateway.pool.upstream_pool import State, UpstreamPool
from gateway.relay.interfaces import Call
from gateway.relay.record import Record

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_FINE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics(Collector):
    """All metrics of one gateway.

    Kept as plain numbers of one thread: prometheus_client's own children, with a lock each, cost
    more than the rest of a request's bookkeeping.
    """

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
        certificate_ends_at: Callable[[], float | None],
    ) -> None:
        """Most of them the data path's; `lost_lines` tells how many lines of the log were lost.

        `aliases` are models' other names, and `certificate_ends_at` tells when our own ends, in seconds since 1970.
        """
        self._certificate_ends_at = certificate_ends_at
        self._version = version("vllm-gateway")
        self._aliases = aliases
        # By another name and the model that was meant.
        self._renamed: Counter[tuple[str, str]] = Counter()
        self._cached = 0
        self._lost_lines = lost_lines
        self._queue = queue
        self._arrivals = arrivals
        self._buffers = buffers
        self._time = time
        self._pool = pool
        self._in_flight = in_flight
        self._registry = CollectorRegistry()
        self._registry.register(self)
        # Memory, CPU time and descriptors, of this process itself.
        ProcessCollector(registry=self._registry)
        # By route, form, model, status and outcome.
        self._requests: Counter[tuple[str, str, str, int, str]] = Counter()
        # Reported and estimated, of prompts and then of completions.
        self._tokens = [0, 0, 0, 0]
        self._first_token = _Histogram(
            "gateway_first_token_seconds", "From a streamed request's start to the first byte of its answer.", _SECONDS
        )
        self._per_event = _Histogram(
            "gateway_output_event_seconds", "Mean time between a stream's events, once a request.", _FINE
        )
        self._total = _Histogram("gateway_request_seconds", "From a relayed request's start to its end.", _SECONDS)
        self._added = _Histogram(
            "gateway_added_seconds",
            "The gateway's own share: from the whole request read to its being sent, connecting included, and from "
            "the upstream's last byte to ours.",
            _FINE,
        )

    def finished(self, records: list[Record]) -> None:
        """Relayed requests have ended."""
        models, tokens = self._pool.models, self._tokens
        requests, total, added, first_token, per_event = [], [], [], [], []
        for record in records:
            started, ended = record.started_at, record.ended_at or record.started_at
            path, status, outcome = record.route.path, record.status, record.outcome
            # A client's word as a label only where it is one that we know, so that the series stay few.
            model = record.model
            model = sys.intern(model) if model and model in models else "unknown"
            requests.append((path, record.form or "none", model, status, outcome))
            if record.alias is not None:
                self._renamed[record.alias if record.alias in self._aliases else "*", model] += 1
            total.append(ended - started)
            if record.received_at is not None and record.sent_at is not None:
                tail = ended - record.upstream_ended_at if record.upstream_ended_at is not None else 0
                added.append(record.sent_at - record.received_at + tail)
            if record.streaming and record.first_byte_at is not None:
                first_token.append(record.first_byte_at - started)
                if record.events > 1:
                    per_event.append((ended - record.first_byte_at) / (record.events - 1))
            if (found := record.tokens) is not None:
                prompt, completion, estimated = found
                tokens[estimated] += prompt
                tokens[2 + estimated] += completion
                self._cached += record.cached_tokens
        self._requests.update(requests)
        self._total.observe(total)
        self._added.observe(added)
        self._first_token.observe(first_token)
        self._per_event.observe(per_event)

    def other(self, route: str, status: int) -> None:
        """A request that is not relayed has ended; `route` is a path of ours or `unknown`. It has no outcome."""
        self._requests[route, "none", "none", status, ""] += 1

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> list[Metric]:
        """Called by the registry for each text."""
        requests = CounterMetricFamily(
            "gateway_requests",
            "Requests that have ended, by the status that was sent (499: the client had left before).",
            labels=("route", "form", "model", "status"),
        )
        by_status: Counter[tuple[str, str, str, str]] = Counter()
        by_outcome: Counter[str] = Counter()
        for (route, form, model, status, outcome), count in self._requests.items():
            by_status[route, form, model, str(status)] += count
            if outcome:
                by_outcome[outcome] += count
        for labels, count in by_status.items():
            requests.add_metric(labels, count)
        outcomes = CounterMetricFamily(
            "gateway_outcomes",
            "Relayed requests that have ended, by how: each time limit has its own.",
            labels=("outcome",),
        )
        for outcome, count in by_outcome.items():
            outcomes.add_metric((outcome,), count)
        tokens = CounterMetricFamily(
            "gateway_tokens",
            "Tokens that vLLM has reported, and those estimated of streams of which it has not.",
            labels=("kind", "source"),
        )
        for number, kind in enumerate(("prompt", "completion")):
            for estimated, source in enumerate(("reported", "estimated")):
                tokens.add_metric((kind, source), self._tokens[2 * number + estimated])
        cached = CounterMetricFamily(
            "gateway_cached_tokens",
            "Prompts' tokens that vLLM had in its prefix cache, as far as it tells (--enable-prompt-tokens-details).",
            value=self._cached,
        )
        renamed = CounterMetricFamily(
            "gateway_alias_requests",
            "Requests for a model by another name, and the model that took them; *: a name that is not served.",
            labels=("alias", "model"),
        )
        for names, count in self._renamed.items():
            renamed.add_metric(names, count)
        in_flight = GaugeMetricFamily("gateway_in_flight", "Relayed requests in flight.", value=len(self._in_flight))
        waiting = GaugeMetricFamily("gateway_waiting", "Those of them that wait for room.", value=len(self._queue))
        arriving = GaugeMetricFamily(
            "gateway_arriving", "Those of them that have not come whole.", value=len(self._arrivals)
        )
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
        info = GaugeMetricFamily("gateway_info", "1, for the version that runs.", labels=("version",))
        info.add_metric((self._version,), 1)
        certificate = GaugeMetricFamily(
            "gateway_certificate_end_timestamp_seconds", "When the certificate that the ports show ends; Unix time."
        )
        if (ends := self._certificate_ends_at()) is not None:
            certificate.add_metric((), ends)
        histograms = (self._first_token, self._per_event, self._total, self._added)
        return [
            info,
            certificate,
            requests,
            outcomes,
            in_flight,
            waiting,
            arriving,
            buffered,
            most,
            tokens,
            cached,
            renamed,
            lost,
            *(one.family() for one in histograms),
            *self._upstreams(),
        ]

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


class _Histogram:
    """Counts by bucket, each but the last with its upper bound in seconds."""

    __slots__ = ("_bounds", "_counts", "_name", "_sum", "_text")

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = bounds
        # Not in lists: a number that changes is an object made anew, amid whatever is there at the time.
        self._counts = array("Q", bytes(8 * (len(bounds) + 1)))
        self._sum = array("d", [0.0])

    def observe(self, values: list[float]) -> None:
        counts, bounds = self._counts, self._bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self._sum[0] += sum(values)

    def family(self) -> Metric:
        names = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum[0])
