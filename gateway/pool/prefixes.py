"""Prompts that begin alike go to one upstream, which has computed that beginning before, with no map of any prompt.

The key of a prompt is its shortest beginning that is not too popular for one upstream. For each key the upstreams have
an order, by rendezvous hashing, which any gateway with the same upstreams makes alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Final
from zlib import crc32

# Where a key's beginning may end, in bytes, as pairs with the end before.
_MARKS = tuple(pairwise((0, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384)))
_FIRST_MARK: Final = _MARKS[0][1]
# What a prompt is called, looked for in so many bytes of a body: what stands before it, as a model, is none of it.
_MESSAGES: Final = b'"messages"'
_OTHER_NAMES: Final = (b'"prompt"', b'"input"')
_LOOKED_AT: Final = 4096
# A beginning is too popular above so many of the last ten to twenty thousand calls, or so many where what it begins
# with is too popular itself, lest each mark of what all calls share has to be learned at length; and above such a part
# of what an upstream has of its model's calls.
_FEW: Final = 8
_FEW_MORE: Final = 2
_PART: Final = 4
_GENERATION: Final = 10_000
# A prime number of orders, and so many places of each are told.
_SLOTS: Final = 8191
_PLACES: Final = 8
# The key of a prompt of which every beginning is too popular, and what is added to one that was never seen, which
# leaves its order as it is.
HOT: Final = -1
NEW: Final = 2**32 * _SLOTS


class PrefixCounts:
    """How often each beginning was asked for of late, in two generations.

    Looked at is up to the first that is not too popular, and what was never seen is not: a call adds one count at most.
    """

    __slots__ = ("_calls", "_old", "_young")

    def __init__(self) -> None:
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._calls = 0

    def key_of(self, model: str, salt: str | None, body: bytes, upstreams: int) -> int | None:
        """The key of a body as it came, for a model that so many upstreams serve; None where its prompt is short.

        HOT where all of it is too popular, and NEW more where it was never seen. `salt` is the `cache_salt` that goes
        upstream.
        """
        young, old = self._young, self._old
        self._calls += 1
        if self._calls > _GENERATION:
            self._calls = 1
            self._old = old = young
            self._young = young = {}
        value = crc32(model.encode("utf-8", "surrogatepass"))
        count = young[value] = young.get(value, 0) + 1
        part = (count + old.get(value, 0)) // (_PART * upstreams)
        if salt is not None:
            value = crc32(salt.encode("utf-8", "surrogatepass"), value)
        start = body.find(_MESSAGES, 0, _LOOKED_AT)
        if start < 0:
            start = _start_of_other(body)
        length = len(body) - start
        if length < _FIRST_MARK:
            return None
        popular = part if part > _FEW else _FEW
        for begin, end in _MARKS:
            if end > length:
                break
            value = crc32(body[start + begin : start + end], value)
            count = young.get(value, 0)
            if count < popular:
                before = count + old.get(value, 0)
                if not before:
                    # What all share is learned mark by mark, each of which would take as long as the one before.
                    young[value] = part - _FEW if part > _FEW else 1
                    return value + NEW
                if before < popular:
                    young[value] = count + 1
                    return value
            young[value] = count + 1
            popular = part if part > _FEW_MORE else _FEW_MORE
        return HOT


def _start_of_other(body: bytes) -> int:
    """Where the prompt of a body begins that has no messages."""
    for name in _OTHER_NAMES:
        if (found := body.find(name, 0, _LOOKED_AT)) >= 0:
            return found
    return 0


class Places:
    """The order that each key has of some upstreams, as their numbers; made as it is asked for."""

    __slots__ = ("_orders", "_upstreams")

    def __init__(self, upstreams: Sequence[tuple[str, float]]) -> None:
        """Of each its address, as all gateways have it, and its weight."""
        self._upstreams = upstreams
        self._orders: list[tuple[int, ...] | None] = [None] * _SLOTS

    def of(self, key: int) -> tuple[int, ...]:
        """The first places of this key."""
        slot = key % _SLOTS
        return self._orders[slot] or self._fill(slot)

    def _fill(self, slot: int) -> tuple[int, ...]:
        scores = [(_score(slot, *one), number) for number, one in enumerate(self._upstreams)]
        found = self._orders[slot] = tuple(number for _, number in sorted(scores)[:_PLACES])
        return found


def _score(slot: int, address: str, weight: float) -> float:
    """Of several the least has the slot, each as often as its weight says: an exponential variate of that rate."""
    drawn = int.from_bytes(blake2b(b"%d %b" % (slot, address.encode()), digest_size=8).digest(), "big")
    return -math.log((drawn + 1) / (2**64 + 1)) / weight
