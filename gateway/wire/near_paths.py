"""Finds the served path that is most like a path that is not served."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.wire.routes import RESPONSE_ID

# The last segments of a base URL, which clients add to a path or leave out.
_BASES = frozenset({"v1", "v2", "v3", "api", "openai"})
# A longer path is not compared, in characters.
_LONGEST = 200

Words = tuple[str, ...]


class NearPaths:
    """The served paths, indexed by their words."""

    def __init__(self, paths: Iterable[str]) -> None:
        """`paths` are the served paths."""
        self._by_words = {_words(path): path for path in paths if _words(path)}
        self._by_tail = {_tail(words): path for words, path in self._by_words.items()}
        self._texts = [("/".join(words), path) for words, path in self._by_words.items()]

    def nearest(self, path: str) -> str | None:
        """The served path that differs from `path` only by base, slashes, case or one character; None if none does."""
        if len(path) > _LONGEST:
            return None
        words = _words(path)
        for at in range(len(words)):
            found = self._by_words.get(words[at:]) or self._by_tail.get(words[at:])
            if found is not None:
                return found
        for asked in ("/".join(words), "/".join(("v1", *_tail(words)))):
            for text, served in self._texts:
                if _differ_by_one(asked, text):
                    return served
        return None


def _words(path: str) -> Words:
    return tuple(
        "{response_id}" if RESPONSE_ID.fullmatch(word) else word.lower().replace("-", "_")
        for word in path.split("/")
        if word
    )


def _tail(words: Words) -> Words:
    at = 0
    while at < len(words) and words[at] in _BASES:
        at += 1
    return words[at:]


def _differ_by_one(one: str, other: str) -> bool:
    """Whether one inserted, deleted or replaced character turns one text into the other."""
    if abs(len(one) - len(other)) > 1:
        return False
    at = 0
    while at < min(len(one), len(other)) and one[at] == other[at]:
        at += 1
    return one[at + 1 :] == other[at + 1 :] or one[at:] == other[at + 1 :] or one[at + 1 :] == other[at:]
