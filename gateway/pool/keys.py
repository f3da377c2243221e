"""Who may call: keys, of which only hashes are kept, and how many requests a minute each may make."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_MINUTE = 60.0
# What a key may look like at the least, where we see it: shorter ones, and those of few letters, are guessed.
SHORTEST = 20
_FEWEST_LETTERS = 8
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<digest>[0-9a-fA-F]{64})(?:\s+(?P<a_minute>[1-9]\d{0,8}))?")
_OF_NOTHING = hashlib.sha256(b"").digest()


class BadKeys(ValueError):
    """What is wrong with a key or a file of them, in a sentence that does not show it."""


@dataclass(slots=True)
class Key:
    """Whom a key is for, by a name that stands in the log; `a_minute` requests, None for any number.

    The count is GCRA's (ITU-T I.371): one number, the time at which all that was taken will be earned again,
    so that a minute's requests may come at once and no more than these in any minute after.
    """

    name: str
    a_minute: int | None = None
    _earned_at: float = field(default=-math.inf, repr=False)

    def take(self, now: float) -> float:
        """Count a request; 0 where it may be made, else the seconds until one may be."""
        if self.a_minute is None:
            return 0.0
        earned_at = max(now, self._earned_at) + _MINUTE / self.a_minute
        if earned_at - now > _MINUTE + 1e-6:  # of rounding
            return earned_at - now - _MINUTE
        self._earned_at = earned_at
        return 0.0

    def left(self, now: float) -> tuple[int, float]:
        """How many more may be made at once, and the seconds until it is a whole minute's again."""
        assert self.a_minute is not None
        reset = max(0.0, self._earned_at - now)
        return math.floor((_MINUTE - reset) * self.a_minute / _MINUTE + 1e-6), reset

    def go_on_as(self, before: Key) -> None:
        """Count on from where `before`, of the same name, was."""
        self._earned_at = before._earned_at


class Keys:
    """All keys. What is looked up is a hash, so that the time it takes says nothing of a key."""

    def __init__(self, by_digest: Mapping[bytes, Key]) -> None:
        """By SHA-256."""
        self._by_digest = by_digest

    def find(self, digest: bytes) -> Key | None:
        """Whose key has this SHA-256."""
        return self._by_digest.get(digest)

    def replace(self, by_digest: Mapping[bytes, Key]) -> None:
        """Have these from now on; names that stay are counted on."""
        before = {key.name: key for key in self._by_digest.values()}
        for key in by_digest.values():
            if key.name in before:
                key.go_on_as(before[key.name])
        self._by_digest = by_digest


def from_secrets(secrets: Iterable[str]) -> dict[bytes, Key]:
    """Keys as they are, named by their place. Raises BadKeys for one that is weak."""
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
        found[digest] = Key(f"key-{place}")
    return found


def from_lines(text: str) -> dict[bytes, Key]:
    """Keys of a file: each line a name, the key's SHA-256 in hex and, if any, its requests a minute.

        # made by: openssl rand -hex 32 | tee key | tr -d '\\n' | sha256sum
        rag-pipeline 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 600

    Raises BadKeys, which names the line.
    """
    found: dict[bytes, Key] = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None:
            raise BadKeys(f"line {number} must be NAME SHA256 or NAME SHA256 REQUESTS_A_MINUTE")
        digest = bytes.fromhex(match["digest"])
        if digest == _OF_NOTHING:
            raise BadKeys(f"line {number} has the SHA-256 of nothing")
        if digest in found or match["name"] in {key.name for key in found.values()}:
            raise BadKeys(f"line {number} has a name or a key that another line has")
        found[digest] = Key(match["name"], int(match["a_minute"]) if match["a_minute"] else None)
    if not found:
        raise BadKeys("it has no key")
    return found
