"""How a gateway finds the upstream of a call: ours by the code that serves, peers' as their source has it.

What peers do is read in vllm-project/router (`cache_aware`), llm-d-router (the default profile of its endpoint picker)
and KubeAI (`PrefixHash`). Each gateway has a policy of its own and knows the calls that it sent itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random

from bench.routing.servers import MEMORY, SERVERS, Cache, Server
from bench.routing.workloads import MODEL, Call
from gateway.pool.upstream_pool import Upstream, UpstreamPool


class Policy:
    """The upstreams as one gateway has them; who runs the simulation counts their calls as an exchange does."""

    # Whether the servers' metrics are read each 50 ms.
    polls = False

    def __init__(self, random: Random) -> None:
        self.upstreams = tuple(Upstream.from_url(f"http://10.0.0.{number}:8000") for number in range(SERVERS))
        self.random = random
        for upstream in self.upstreams:
            upstream.state, upstream.models = "serving", (MODEL,)

    def choose(self, call: Call, now: float) -> Upstream:
        """The upstream of this call, anyone unless a policy says more."""
        return self.random.choice(self.upstreams)

    def poll(self, servers: Sequence[Server]) -> None:
        """Read the servers' metrics."""

    def least(self) -> Upstream:
        """The one with the fewest calls in flight."""
        return min(self.upstreams, key=lambda one: one.in_flight)


class RoundRobin(Policy):
    """Each in its turn."""

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._turn = 0

    def choose(self, call: Call, now: float) -> Upstream:
        self._turn = (self._turn + 1) % len(self.upstreams)
        return self.upstreams[self._turn]


class Ours(Policy):
    """This gateway."""

    def __init__(self, random: Random, *, by_prefix: bool = True) -> None:
        super().__init__(random)
        self._pool = UpstreamPool(self.upstreams, by_prefix=by_prefix)

    def choose(self, call: Call, now: float) -> Upstream:
        chosen = self._pool.select(MODEL, now, key=self._pool.key_of(MODEL, None, call.body))
        assert chosen is not None
        return chosen


class Least(Ours):
    """This gateway where prefixes are left out: the fewest calls in flight."""

    def __init__(self, random: Random) -> None:
        super().__init__(random, by_prefix=False)


class BoundedHashing(Policy):
    """KubeAI: consistent hashing of the prompt's first 256 bytes, none above 1.25 of the mean load.

    Its own default is 100 characters, by which no more prompts are told apart here.
    """

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._ring = sorted(
            (_hash(b"%b %d" % (one.url.encode(), copy)), number)
            for number, one in enumerate(self.upstreams)
            for copy in range(256)
        )

    def choose(self, call: Call, now: float) -> Upstream:
        begin = call.body.index(b'"messages"')
        at = bisect_left(self._ring, (_hash(call.body[begin : begin + 256]), 0))
        order = [self.upstreams[number] for _, number in (*self._ring[at:], *self._ring[:at])]
        loads = sum(one.in_flight for one in self.upstreams)
        most = 1.25 * (loads + 1) / len(self.upstreams)
        return next((one for one in order if not loads or one.in_flight + 1 <= most), order[0])


class CacheAware(Policy):
    """vllm-router's default: the upstream that had the longest beginning, where that is 0.3 of the prompt.

    Its tree of characters is told by the prompts' blocks, each with who had it last, and is never full: it holds 64 Mi
    characters of each upstream.
    """

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._last: dict[int, Upstream] = {}

    def choose(self, call: Call, now: float) -> Upstream:
        loads = [one.in_flight for one in self.upstreams]
        matched = bisect_left(call.blocks, True, key=lambda block: block not in self._last)
        unbalanced = max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads)
        known = matched > 0.3 * len(call.blocks)
        chosen = self._last[call.blocks[matched - 1]] if known and not unbalanced else self.least()
        self._last.update(dict.fromkeys(call.blocks, chosen))
        return chosen


class EndpointPicker(Policy):
    """llm-d's default: twice the queue, twice the memory's use and three times the prefix, the highest of all.

    The prefix is of at most 256 blocks, and what each upstream has is remembered as much as its own memory holds.
    """

    polls = True

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self._had = [Cache(MEMORY) for _ in self.upstreams]
        self._queued = [0] * SERVERS
        self._usage = [0.0] * SERVERS

    def poll(self, servers: Sequence[Server]) -> None:
        self._queued = [server.queued for server in servers]
        self._usage = [server.usage for server in servers]

    def choose(self, call: Call, now: float) -> Upstream:
        blocks = call.blocks[:256]
        fewest, most = min(self._queued), max(self._queued)
        scores = []
        for had, queued, usage in zip(self._had, self._queued, self._usage, strict=True):
            queue = (most - queued) / (most - fewest) if most > fewest else 1.0
            scores.append(2 * queue + 2 * (1 - usage) + 3 * had.held(blocks) / max(len(blocks), 1))
        best = max(scores)
        number = self.random.choice([number for number, score in enumerate(scores) if score == best])
        self._had[number].use(blocks)
        return self.upstreams[number]


POLICIES: dict[str, Callable[[Random], Policy]] = {
    "random": Policy,
    "round robin": RoundRobin,
    "least": Least,
    "KubeAI": BoundedHashing,
    "vllm-router": CacheAware,
    "llm-d": EndpointPicker,
    "gateway": Ours,
}


def _hash(of: bytes) -> int:
    return int.from_bytes(blake2b(of, digest_size=8).digest(), "big")
