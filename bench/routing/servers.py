"""A vLLM server as far as its time goes: batches in steps, and a cache of prompts' blocks."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from bench.routing.workloads import BLOCK, Call
from gateway.pool.upstream_pool import Upstream

# How many there are.
SERVERS = 8
# What one server has for prompts that it has computed, in tokens.
MEMORY = 150_000
# A step's time, in seconds, and the most tokens of one.
_STEP, _PER_PREFILLED, _PER_DECODING = 0.008, 60e-6, 60e-6
_BUDGET = 2048


class Cache:
    """The blocks of prompts that are held: those that were used the longest ago go first, and of a prompt its end.

    So what is held of a prompt is always its beginning. A block stands for all that is before it in its prompt, too.
    """

    def __init__(self, tokens: int) -> None:
        self._most = tokens // BLOCK
        self._held: OrderedDict[int, None] = OrderedDict()

    def held(self, blocks: Sequence[int]) -> int:
        """How many of a prompt's blocks there are."""
        return bisect_left(blocks, True, key=lambda block: block not in self._held)

    def use(self, blocks: Sequence[int]) -> int:
        """The same, and all of them are there from now on."""
        found, held = self.held(blocks), self._held
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        while len(held) > self._most:
            held.popitem(last=False)
        return found


@dataclass(eq=False, slots=True)
class Running:
    """A call at its server: since when it answers, and how many of its tokens the cache had, once that is known.

    `left` are tokens of its prompt that are not computed yet.
    """

    call: Call
    upstream: Upstream
    server: int
    cached: int = -1
    left: int = 0
    first_byte_at: float = 0.0


class Server:
    """Calls wait, have their prompts computed in the order they came, and are decoded a token a step each.

    Prompts alone are held in the cache, and running calls take none of it.
    """

    def __init__(self) -> None:
        self.waiting: deque[Running] = deque()
        self.busy = False
        self._cache = Cache(MEMORY)
        self._steps = 0
        # By the step that is its last; the second number keeps calls from being compared.
        self._decoding: list[tuple[int, int, Running]] = []
        self._began = 0
        self._computed: list[Running] = []
        self._running_tokens = 0

    @property
    def queued(self) -> int:
        """Calls of which nothing is computed yet."""
        return len(self.waiting) - bool(self.waiting and self.waiting[0].cached >= 0)

    @property
    def usage(self) -> float:
        """The part of its memory that running calls have, as vLLM's metrics tell it."""
        return min(1.0, self._running_tokens / MEMORY)

    def begin(self) -> float:
        """Begin a step: how long it takes."""
        self.busy = True
        budget = left = _BUDGET - len(self._decoding)
        while self.waiting and left > 0:
            one = self.waiting[0]
            if one.cached < 0:
                # The last token is computed always.
                one.cached = min(self._cache.use(one.call.blocks) * BLOCK, one.call.tokens - 1)
                one.left = one.call.tokens - one.cached
                self._running_tokens += one.call.tokens
            taken = min(one.left, left)
            one.left -= taken
            left -= taken
            if not one.left:
                self._computed.append(self.waiting.popleft())
        return _STEP + _PER_PREFILLED * (budget - left) + _PER_DECODING * len(self._decoding)

    def end(self) -> tuple[list[Running], list[Running]]:
        """End the step: whose first token it brought, and whose last."""
        self.busy = False
        self._steps += 1
        first, self._computed = self._computed, []
        for one in first:
            self._began += 1
            heapq.heappush(self._decoding, (self._steps + one.call.answer - 1, self._began, one))
        last = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            last.append(heapq.heappop(self._decoding)[2])
        self._running_tokens -= sum(one.call.tokens for one in last)
        return first, last

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self._decoding
