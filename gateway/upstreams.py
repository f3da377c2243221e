"""Upstreams, the pool of them, and which one takes the next call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

State = Literal["serving", "loading", "down"]

# An upstream is failing after so many broken calls in a row, and on trial after so many seconds.
BROKEN_IN_A_ROW = 3
TRIAL_AFTER = 15.0


@dataclass(eq=False, slots=True)
class Upstream:
    """One vLLM server: where it is, how it is, and what it is doing for us.

    `models` is its model list's ids, empty until it was read; `why` says why it does not serve.
    """

    url: str
    host: str
    port: int
    tls: bool
    prefix: str
    authority: str
    state: State = "loading"
    why: str = "not probed yet"
    models: tuple[str, ...] = ()
    in_flight: int = 0
    chosen_at: int = field(default=0, repr=False)
    broken_in_a_row: int = field(default=0, repr=False)
    broken_at: float = field(default=0.0, repr=False)

    @classmethod
    def from_url(cls, url: str) -> Upstream:
        """An upstream at `http[s]://host[:port][/prefix]`."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        host = parts.hostname or ""
        return cls(url, host, parts.port or (443 if tls else 80), tls, parts.path, parts.netloc)

    def succeeded(self) -> None:
        """A real call came through."""
        self.broken_in_a_row = 0

    def broke(self, now: float) -> None:
        """A real call failed by the upstream's fault."""
        self.broken_in_a_row += 1
        self.broken_at = now

    def failing(self, now: float) -> bool:
        """Whether its last calls all broke and it is not yet time for another trial."""
        return self.broken_in_a_row >= BROKEN_IN_A_ROW and now - self.broken_at < TRIAL_AFTER

    @property
    def ever_served(self) -> bool:
        """Whether it has answered since the gateway started."""
        return bool(self.models)


class UpstreamPool:
    """All upstreams. What is known of them only ranks them: even a bad one is better than none."""

    def __init__(self, upstreams: tuple[Upstream, ...]) -> None:
        self._upstreams = upstreams
        self._turn = 0

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._upstreams)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that some upstream serves, each once, in the upstreams' order."""
        if len(self._upstreams) == 1:
            return self._upstreams[0].models
        return tuple(dict.fromkeys(model for upstream in self._upstreams for model in upstream.models))

    def choose(self, model: str | None, now: float, *, without: Upstream | None = None) -> Upstream | None:
        """The upstream with the fewest calls in flight among the best that serve `model`.

        None only where `without` is the only one of them. A model that none serves is for any to
        refuse. Ties go round.
        """
        upstreams = self._upstreams
        if len(upstreams) == 1:
            return None if upstreams[0] is without else upstreams[0]
        able = [upstream for upstream in upstreams if model in upstream.models] or upstreams
        left = (upstream for upstream in able if upstream is not without)
        best = min(left, key=lambda one: (_rank(one, now), one.in_flight, one.chosen_at), default=None)
        if best is not None:
            self._turn += 1
            best.chosen_at = self._turn
        return best


def _rank(upstream: Upstream, now: float) -> int:
    """0 for one that serves, 1 for one that fails calls though it seems to serve, 2 for the others."""
    if upstream.state != "serving":
        return 2
    return 1 if upstream.failing(now) else 0
