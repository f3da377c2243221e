"""Metrics of ended requests, by model, key and outcome."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container
from functools import partial
from typing import Final, TypeVar

from prometheus_client.core import CounterMetricFamily, Metric

from gateway.observability.histograms import Histogram
from gateway.observability.labels import UNKNOWN, Labels
from gateway.relay.record import Record

_SECONDS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
    1800.0,
)
_FINE = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_by_model = partial(defaultdict[str, list[float]], list)
_SOURCES: Final = ("reported", "estimated")
_LIMITED: Final = 429


L = TypeVar("L", bound=tuple[object, ...])


class RequestMetrics:
    """Counters and histograms of ended requests.

    They are plain numbers used by one thread: prometheus_client's own children, with a lock each, cost more than the
    rest of a request's bookkeeping.
    """

    def __init__(
        self,
        models: Callable[[], Collection[str]],
        keys: Callable[[], Collection[str]],
        aliases: Container[str],
        time: Callable[[], float],
    ) -> None:
        """`models` and `keys` return the known names; `aliases` are the models' aliases."""
        self.models = Labels(models, time, self._drop_model)
        self.keys = Labels(keys, time, self._drop_key)
        self._aliases = aliases
        # By route, form, model, status and outcome.
        self._requests: Counter[tuple[str, str, str, int, str]] = Counter()
        # By alias and the model that took the request.
        self._renamed: Counter[tuple[str, str]] = Counter()
        # By model, kind and source.
        self._tokens: Counter[tuple[str, str, str]] = Counter()
        self._cached: Counter[str] = Counter()
        self._of_keys: Counter[tuple[str, int]] = Counter()
        self._tokens_of_keys: Counter[tuple[str, str]] = Counter()
        self._first_token = Histogram(
            "gateway_first_token_seconds", "From a streamed request's start to the first byte of its answer.", _SECONDS
        )
        self._per_event = Histogram(
            "gateway_output_event_seconds", "Mean time between a stream's events, once a request.", _FINE
        )
        self._total = Histogram("gateway_request_seconds", "From a relayed request's start to its end.", _SECONDS)
        self._added = Histogram(
            "gateway_added_seconds",
            "The gateway's own share: from the whole request read to its being sent, connecting included, and from "
            "the upstream's last byte to ours.",
            _FINE,
        )

    def finished(self, records: list[Record]) -> None:
        """Count relayed requests that have ended."""
        models, keys = self.models, self.keys
        tokens, tokens_of_keys = self._tokens, self._tokens_of_keys
        requests, of_keys = [], []
        total, added, first_token, per_event = _by_model(), _by_model(), _by_model(), _by_model()
        for record in records:
            started, ended = record.started_at, record.ended_at or record.started_at
            # A name from a client becomes a label only if it is known, so that the series stay few.
            name, key = record.model, record.key
            model = UNKNOWN if name is None else models.get(name) or models.take(name)
            requests.append((record.route.path, record.form or "none", model, record.status, record.outcome))
            if record.alias is not None:
                self._renamed[record.alias if record.alias in self._aliases else "*", model] += 1
            total[model].append(ended - started)
            if record.received_at is not None and record.sent_at is not None:
                tail = ended - record.upstream_ended_at if record.upstream_ended_at is not None else 0
                added[model].append(record.sent_at - record.received_at + tail)
            if record.streaming and record.first_byte_at is not None:
                first_token[model].append(record.first_byte_at - started)
                if record.events > 1:
                    per_event[model].append((ended - record.first_byte_at) / (record.events - 1))
            used = record.tokens
            if used is not None:
                prompt, completion, estimated = used
                source = _SOURCES[estimated]
                tokens[model, "prompt", source] += prompt
                tokens[model, "completion", source] += completion
                if record.cached_tokens:
                    self._cached[model] += record.cached_tokens
            if key is not None:
                whose = keys.get(key.name) or keys.take(key.name)
                of_keys.append((whose, record.status))
                if used is not None:
                    tokens_of_keys[whose, "prompt"] += prompt
                    tokens_of_keys[whose, "completion"] += completion
        self._requests.update(requests)
        self._of_keys.update(of_keys)
        self._total.observe(total)
        self._added.observe(added)
        self._first_token.observe(first_token)
        self._per_event.observe(per_event)

    def other(self, route: str, status: int) -> None:
        """Count a request that is not relayed; `route` is a served path or `unknown`. It has no outcome."""
        self._requests[route, "none", "none", status, ""] += 1

    def families(self) -> list[Metric]:
        """The metric families for Prometheus."""
        self.models.tidy()
        self.keys.tidy()
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
            labels=("model", "kind", "source"),
        )
        for names, count in self._tokens.items():
            tokens.add_metric(names, count)
        cached = CounterMetricFamily(
            "gateway_cached_tokens",
            "Prompts' tokens that vLLM had in its prefix cache, as far as it tells (--enable-prompt-tokens-details).",
            labels=("model",),
        )
        for model, count in self._cached.items():
            cached.add_metric((model,), count)
        renamed = CounterMetricFamily(
            "gateway_alias_requests",
            "Requests for a model by another name, and the model that took them; *: a name that is not served.",
            labels=("alias", "model"),
        )
        for pair, count in self._renamed.items():
            renamed.add_metric(pair, count)
        histograms = (self._first_token, self._per_event, self._total, self._added)
        return [
            requests,
            outcomes,
            tokens,
            cached,
            renamed,
            *self._families_of_keys(),
            *(one.family() for one in histograms),
        ]

    def _families_of_keys(self) -> list[Metric]:
        requests = CounterMetricFamily(
            "gateway_key_requests",
            "A key's requests that have ended, by their statuses' class.",
            labels=("key", "status"),
        )
        limited = CounterMetricFamily(
            "gateway_key_limited",
            "Those of them that were refused with 429: for a limit, or lack of room.",
            labels=("key",),
        )
        by_class: Counter[tuple[str, str]] = Counter()
        for (key, status), count in self._of_keys.items():
            by_class[key, f"{status // 100}xx"] += count
            if status == _LIMITED:
                limited.add_metric((key,), count)
        for labels, count in by_class.items():
            requests.add_metric(labels, count)
        tokens = CounterMetricFamily(
            "gateway_key_tokens", "A key's tokens, reported or estimated.", labels=("key", "kind")
        )
        for labels, count in self._tokens_of_keys.items():
            tokens.add_metric(labels, count)
        return [requests, limited, tokens]

    def _drop_model(self, model: str) -> None:
        for histogram in (self._first_token, self._per_event, self._total, self._added):
            histogram.drop(model)
        self._cached.pop(model, None)
        _drop(self._requests, 2, model)
        _drop(self._renamed, 1, model)
        _drop(self._tokens, 0, model)

    def _drop_key(self, key: str) -> None:
        _drop(self._of_keys, 0, key)
        _drop(self._tokens_of_keys, 0, key)


def _drop(counter: Counter[L], place: int, name: str) -> None:
    for labels in [labels for labels in counter if labels[place] == name]:
        del counter[labels]
