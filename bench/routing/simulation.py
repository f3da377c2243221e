"""Calls come to gateways that share nothing, which send them to the same servers: what became of each."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import quantiles

from bench.routing.policies import Policy
from bench.routing.servers import SERVERS, Cache, Running, Server
from bench.routing.workloads import BLOCK, Call

_POLL = 0.05


@dataclass(frozen=True, slots=True)
class Figures:
    """Of calls: the tokens that caches had, of those that a single one would have had; seconds to the first token.

    `busiest` are the calls of the upstream that had the most, of the mean.
    """

    hits: float
    p50: float
    p99: float
    busiest: float


class _Fleet:
    """The servers, and when the step of each ends."""

    def __init__(self) -> None:
        self.servers = [Server() for _ in range(SERVERS)]
        self._ends: list[tuple[float, int]] = []

    def take(self, one: Running, now: float) -> None:
        """A call comes to its server."""
        one.upstream.in_flight += 1
        one.upstream.awaited += 1
        server = self.servers[one.server]
        server.waiting.append(one)
        if not server.busy:
            self._begin(one.server, now)

    def go_on(self, until: float) -> None:
        """All steps that end by then."""
        while self._ends and self._ends[0][0] <= until:
            now, number = heapq.heappop(self._ends)
            first, last = self.servers[number].end()
            for one in first:
                one.first_byte_at = now
                one.upstream.awaited -= 1
            for one in last:
                one.upstream.in_flight -= 1
            if not self.servers[number].idle:
                self._begin(number, now)

    def _begin(self, number: int, now: float) -> None:
        heapq.heappush(self._ends, (now + self.servers[number].begin(), number))


def simulate(calls: Sequence[Call], gateways: Sequence[Policy], random: Random) -> list[Running]:
    """What became of each call, once all are answered; it comes to any of the gateways."""
    fleet = _Fleet()
    numbers = {upstream: number for policy in gateways for number, upstream in enumerate(policy.upstreams)}
    taken = []
    polls = 0.0
    for call in calls:
        policy = random.choice(gateways)
        if policy.polls and call.at // _POLL > polls:
            polls = call.at // _POLL
            fleet.go_on(polls * _POLL)
            for one in gateways:
                one.poll(fleet.servers)
        fleet.go_on(call.at)
        upstream = policy.choose(call, call.at)
        taken.append(Running(call, upstream, numbers[upstream]))
        fleet.take(taken[-1], call.at)
    fleet.go_on(math.inf)
    return taken


def cached_by_one(calls: Sequence[Call], since: float, memory: int) -> int:
    """The tokens that a single cache would have had of the calls that came since then."""
    cache = Cache(memory)
    return sum([cache.use(call.blocks) * BLOCK * (call.at >= since) for call in calls])


def figures(taken: Sequence[Running], since: float, by_one: int) -> Figures:
    """Of the calls that came since then, of which a single cache would have had so many tokens."""
    looked_at = [one for one in taken if one.call.at >= since]
    centiles = quantiles([one.first_byte_at - one.call.at for one in looked_at], n=100)
    at_each = Counter(one.server for one in looked_at)
    return Figures(
        sum(one.cached for one in looked_at) / by_one if by_one else 0.0,
        centiles[49],
        centiles[98],
        max(at_each.values()) * SERVERS / len(looked_at),
    )
