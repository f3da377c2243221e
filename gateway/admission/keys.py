"""The keys that clients must send, kept as hashes, and each key's limits: per minute, at a time, and of models."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from gateway.admission.owners import Owner
from gateway.admission.token_budget import TokenBudget

_MINUTE = 60.0
# Minimum length and number of different characters of a key, checked where the key itself is known: weaker keys can be
# guessed.
SHORTEST = 20
_FEWEST_LETTERS = 8
_LINE = re.compile(
    r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<digest>[0-9a-fA-F]{64})(?:\s+(?P<a_minute>[1-9]\d{0,8}))?(?P<limits>(?:\s+\S+)*)"
)
# The limits that may follow on a line as NAME=NUMBER, and the field that each sets.
_LIMITS = {"tokens": "tokens", "in-flight": "max_in_flight", "waiting": "max_waiting"}
_FORM = "NAME SHA256 [REQUESTS_A_MINUTE] [tokens=N] [in-flight=N] [waiting=N] [models=A,B]"
_MODELS = "models="
_OF_NOTHING = hashlib.sha256(b"").digest()


class BadKeys(ValueError):
    """A key or a file of keys is invalid; the message does not show the key."""


@dataclass(slots=True, eq=False)
class Key(Owner):
    """The owner of a key, by a name that is logged; `a_minute` is its requests per minute, None for any number.

    `tokens` is its budget of tokens per minute, and `models` are the models that it may ask for; None for any.

    Requests are counted by GCRA (ITU-T I.371). Its state is one number: the time at which all taken requests are earned
    again. A minute's requests may come at once, but no more than these in any minute after.
    """

    name: str
    a_minute: int | None = None
    tokens: TokenBudget | None = None
    models: frozenset[str] | None = None
    _earned_at: float = field(default=-math.inf, repr=False)

    def take(self, now: float) -> float:
        """Count a request; return 0 if it is allowed, else the seconds until one is."""
        if self.a_minute is None:
            return 0.0
        earned_at = max(now, self._earned_at) + _MINUTE / self.a_minute
        if earned_at - now > _MINUTE + 1e-6:  # tolerance for rounding
            return earned_at - now - _MINUTE
        self._earned_at = earned_at
        return 0.0

    def left(self, now: float) -> tuple[int, float]:
        """How many more requests may be made at once, and the seconds until a whole minute's requests are available."""
        assert self.a_minute is not None
        reset = max(0.0, self._earned_at - now)
        return math.floor((_MINUTE - reset) * self.a_minute / _MINUTE + 1e-6), reset

    def become(self, other: Key) -> None:
        """Take the limits of `other`, which has the same name, and keep the counts."""
        self.a_minute, self.max_in_flight, self.max_waiting = other.a_minute, other.max_in_flight, other.max_waiting
        self.models = other.models
        if self.tokens is not None and other.tokens is not None:
            self.tokens.a_minute = other.tokens.a_minute  # the same budget, with which calls in flight are settled
        else:
            self.tokens = other.tokens


class Keys:
    """All keys, looked up by their hashes, so that the time of a lookup discloses nothing of a key."""

    def __init__(self, by_digest: Mapping[bytes, Key]) -> None:
        """`by_digest` maps each key's SHA-256 to the key."""
        self._by_digest = by_digest
        # Returns the key with a SHA-256. Not a method of this class, which would cost each keyed call one more call.
        self.find: Callable[[bytes], Key | None] = by_digest.get

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_digest.values())

    @property
    def names(self) -> dict[str, bytes]:
        """The keys' names, each with its key's SHA-256."""
        return {key.name: digest for digest, key in self._by_digest.items()}

    def replace(self, by_digest: Mapping[bytes, Key]) -> None:
        """Replace all keys; names that stay keep their counts."""
        before = {key.name: key for key in self._by_digest.values()}
        for key in by_digest.values():
            if key.name in before:
                before[key.name].become(key)  # the same object, which running calls refer to
        self._by_digest = {digest: before.get(key.name, key) for digest, key in by_digest.items()}
        self.find = self._by_digest.get


def from_secrets(secrets: Iterable[str], max_in_flight: int | None = None) -> dict[bytes, Key]:
    """Keys from their plain texts, named by their positions. Raises BadKeys for a weak key."""
    found: dict[bytes, Key] = {}
    for place, secret in enumerate(secrets, 1):
        if not re.fullmatch(r"[\x21-\x7e]+", secret):
            raise BadKeys(f"key {place} must be of printable ASCII characters without spaces")
        if len(secret) < SHORTEST or len(set(secret)) < _FEWEST_LETTERS:
            raise BadKeys(
                f"key {place} is weak: it must have at least {SHORTEST} characters, {_FEWEST_LETTERS} of them "
                "different (`openssl rand -hex 32` makes a good one)"
            )
        digest = hashlib.sha256(secret.encode()).digest()
        if digest in found:
            raise BadKeys(f"key {place} stands there twice")
        found[digest] = Key(f"key-{place}", max_in_flight=max_in_flight)
    return found


def from_lines(text: str, max_in_flight: int | None = None) -> dict[bytes, Key]:
    """Keys from a file: each line has a name, the key's SHA-256 in hex and optional limits.

    The limits are its requests and its tokens a minute, how many of its calls run (by default `max_in_flight`) and wait
    at a time, and the models that it may ask for.

        # made by: openssl rand -hex 32 | tee key | tr -d '\\n' | sha256sum
        rag-pipeline 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 600 tokens=90000 in-flight=8

    Raises BadKeys, which names the line.
    """
    found: dict[bytes, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None:
            raise BadKeys(f"line {number} must be {_FORM}")
        digest = bytes.fromhex(match["digest"])
        if digest == _OF_NOTHING:
            raise BadKeys(f"line {number} has the SHA-256 of nothing")
        if digest in found or match["name"] in {key.name for key in found.values()}:
            raise BadKeys(f"line {number} has a name or a key that another line has")
        a_minute = int(match["a_minute"]) if match["a_minute"] else None
        words = match["limits"].split()
        limits = _limits([word for word in words if not word.startswith(_MODELS)], number)
        tokens = limits.get("tokens")
        found[digest] = Key(
            match["name"],
            a_minute,
            tokens=None if tokens is None else TokenBudget(tokens),
            models=_models([word.removeprefix(_MODELS) for word in words if word.startswith(_MODELS)], number),
            max_in_flight=limits.get("max_in_flight", max_in_flight),
            max_waiting=limits.get("max_waiting"),
        )
    if not found:
        raise BadKeys("it has no key")
    return found


def _limits(words: list[str], number: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _LIMITS or not re.fullmatch(r"[1-9]\d{0,8}", value) or _LIMITS[name] in found:
            raise BadKeys(f"line {number} must be {_FORM}, but it has {word[:40]!r}")
        found[_LIMITS[name]] = int(value)
    return found


def _models(lists: list[str], number: int) -> frozenset[str] | None:
    if not lists:
        return None
    names = lists[0].split(",")
    if len(lists) > 1 or not all(names):
        raise BadKeys(f"line {number} must be {_FORM}, each model's name between commas")
    return frozenset(names)
