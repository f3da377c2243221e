"""Routes prompts with equal beginnings to one upstream, which has cached that beginning, without a map of prompts.

The key of a prompt is a hash of its shortest beginning that is not too popular for one upstream. Rendezvous hashing
gives each key an order of the upstreams, which is the same in every gateway with the same upstreams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Final
from zlib import crc32

# The offsets at which a beginning may end, in bytes, each paired with the offset before.
_MARKS = tuple(pairwise((0, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384)))
_FIRST_MARK: Final = _MARKS[0][1]
# The fields of a prompt, searched in the first bytes of a body: fields before it, such as the model, are no part of it.
_MESSAGES: Final = b'"messages"'
_OTHER_NAMES: Final = (b'"prompt"', b'"input"')
_LOOKED_AT: Final = 4096
# A beginning is too popular if it exceeds both limits: _FEW of the last ten to twenty thousand calls, and 1/_PART of an
# upstream's share of its model's calls. If a shorter beginning is too popular itself, _FEW_MORE replaces _FEW, so that
# a beginning that all calls share is learned quickly at each mark.
_FEW: Final = 8
_FEW_MORE: Final = 2
_PART: Final = 4
_GENERATION: Final = 10_000
# The number of orders, which is prime, and the number of places that are kept of each.
_SLOTS: Final = 8191
_PLACES: Final = 8
# HOT is the key of a prompt of which every beginning is too popular. NEW is added to a key that was never seen; as a
# multiple of _SLOTS it does not change the key's order.
HOT: Final = -1
NEW: Final = 2**32 * _SLOTS


class PrefixCounts:
    """Counts how often each beginning was requested recently, in two generations of calls.

    A call counts its beginnings up to the first that is not too popular, so it adds one entry at most.
    """

    __slots__ = ("_calls", "_old", "_young")

    def __init__(self) -> None:
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._calls = 0

    def key_of(self, model: str, salt: str | None, body: bytes, upstreams: int) -> int | None:
        """The key of a body as received, for a model on `upstreams` upstreams; None if its prompt is short.

        The key is HOT if all beginnings are too popular, and is raised by NEW if the beginning was never seen. `salt`
        is the `cache_salt` that is sent upstream.
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
                    # A beginning that all calls share is learned mark by mark; without this head start each mark would
                    # take as long as the mark before.
                    young[value] = part - _FEW if part > _FEW else 1
                    return value + NEW
                if before < popular:
                    young[value] = count + 1
                    return value
            young[value] = count + 1
            popular = part if part > _FEW_MORE else _FEW_MORE
        return HOT


def _start_of_other(body: bytes) -> int:
    """The offset of the prompt in a body without messages."""
    for name in _OTHER_NAMES:
        if (found := body.find(name, 0, _LOOKED_AT)) >= 0:
            return found
    return 0


class Places:
    """The order of the upstreams for each key, as their numbers; computed on first use."""

    __slots__ = ("_orders", "_upstreams")

    def __init__(self, upstreams: Sequence[tuple[str, float]]) -> None:
        """`upstreams` are pairs of the address, which all gateways have alike, and the weight."""
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
    """An exponential variate with rate `weight`: the least score wins the slot, in proportion to the weights."""
    drawn = int.from_bytes(blake2b(b"%d %b" % (slot, address.encode()), digest_size=8).digest(), "big")
    return -math.log((drawn + 1) / (2**64 + 1)) / weight
