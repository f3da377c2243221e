"""What a pool holds for routing by prefix, however many calls come, and of how many prompts."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from types import FunctionType, ModuleType
from typing import NamedTuple

from gateway.pool.upstream_pool import Upstream, UpstreamPool

CALLS = 1_000_000
# As many as a generation of counts has, at whose end the most is held: looked at is then.
_LOOK = 10_000
# So many first calls fill both generations of counts, and after so many the counts are as high as they come.
_FULL, _STEADY = 20_000, 40_000
_SERVED = ("model", "adapter", "other")


class Memory(NamedTuple):
    """In bytes: the most that is held for calls, and how much more than the most of the first 20,000 and 40,000."""

    most: int
    since_full: int
    since_steady: int


def memory(calls: int = CALLS) -> dict[str, Memory]:
    """Of each kind of traffic, by so many calls, 10,000 at a time."""
    return {kind: _taken(make(), calls) for kind, make in _KINDS.items()}


def _taken(kind: Iterator[tuple[str, bytes]], calls: int) -> Memory:
    """By calls of these models and bodies, each of which is placed."""
    upstreams = tuple(Upstream.from_url(f"http://10.0.0.{number}:8000") for number in range(8))
    for one in upstreams:
        one.state, one.models = "serving", _SERVED
    pool = UpstreamPool(upstreams, by_prefix=True)
    before = _held(pool)
    found = []
    for _ in range(0, calls, _LOOK):
        for model, body in islice(kind, _LOOK):
            pool.select(model, 0, key=pool.key_of(model, None, body))
        found.append(_held(pool) - before)
    most = max(found)
    return Memory(most, most - max(found[: _FULL // _LOOK]), most - max(found[: _STEADY // _LOOK]))


def _held(pool: UpstreamPool) -> int:
    """The bytes of all objects that a pool leads to, each once, but for code."""
    seen: set[int] = set()
    size, left = 0, [pool]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
            continue
        seen.add(id(one))
        size += sys.getsizeof(one)
        left += gc.get_referents(one)
    return size


def _bodies() -> Iterator[bytes]:
    """No two begin alike."""
    return (b'"messages"' + b"%d " % number * 60 for number in range(1_000_000_000))


def _unique() -> Iterator[tuple[str, bytes]]:
    return (("model", body) for body in _bodies())


def _one() -> Iterator[tuple[str, bytes]]:
    body = b'"messages"' + b"x" * 20_000
    while True:
        yield "model", body


def _models() -> Iterator[tuple[str, bytes]]:
    """Each prompt is asked of one of several models by turns."""
    return ((_SERVED[number % len(_SERVED)], body) for number, body in enumerate(_bodies()))


def _names() -> Iterator[tuple[str, bytes]]:
    """Each call has a model's name of its own, that no upstream serves."""
    return ((f"model-{number}", body) for number, body in enumerate(_bodies()))


_KINDS: dict[str, Callable[[], Iterator[tuple[str, bytes]]]] = {
    "unique": _unique,
    "one": _one,
    "several models": _models,
    "unknown models": _names,
}
