"""Checks the media of a call: the hosts of their URLs and the names under which vLLM caches them.

The model server fetches a URL and may reach hosts that a client may not. It gives media that it has under a name to any
client that sends this name.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from gateway.wire.errors import ForeignMedia, Rejected

# Only URLs of the plainest form: a URL that two parsers may read differently is refused.
_PLAIN: Final = re.compile(r"https?://([A-Za-z0-9.-]+)(?::\d{1,5})?(?:[/?#][!-\[\]-~]*)?", re.IGNORECASE)

# The field of a part by which vLLM caches its processed media, and the fields whose lists hold parts. The parts of a
# batch's chats are the deepest: below are arguments of tools, in which the same names mean something else.
NAME: Final = "uuid"
_LISTS: Final = ("content", "output")
_DEEPEST_PART: Final = 5

# Values that are checked in one step.
_TOGETHER: Final = 10_000


def parts_of(body: dict[str, Any]) -> list[Any]:
    """The contents of a chat's messages that are not texts: each a list or an object."""
    messages = body.get("messages")
    if type(messages) is dict:
        messages = [{"content": messages.get("user")}]
    elif type(messages) is not list:
        return []
    parts = []
    for message in messages:
        try:
            said = message["content"]
        except (KeyError, TypeError):  # vLLM refuses it; checking first would cost every valid message
            continue
        if type(said) is not str and type(said) in (list, dict):
            parts.append(said)
    return parts


def check_any(value: Any, content: bytes, media_domains: frozenset[str], refuses_names: bool) -> None:
    """Raises ForeignMedia if a value (a body, or the parts of one) holds a URL of a host that is not allowed.

    Raises Rejected if `refuses_names` and a part has a name. `content` holds the bytes that the value was read from.
    """
    if _may_hold_any(content, refuses_names):
        deque(_check(value, media_domains, refuses_names), 0)


def check_in_steps(value: Any, content: bytes, media_domains: frozenset[str], refuses_names: bool) -> Iterator[None]:
    """Like `check_any`, but in steps, as a body of many values takes long."""
    if _may_hold_any(content, refuses_names):
        return _check(value, media_domains, refuses_names)
    return iter(())


def _may_hold_any(content: bytes, names: bool) -> bool:
    # Walking through a large body takes longer than all other work. A name may be written with escapes.
    return b"\\u" in content or b'url"' in content.lower() or (names and b'"uuid"' in content)


def _check(value: Any, media_domains: frozenset[str], refuses_names: bool) -> Iterator[None]:
    for found in _found(value):
        if found is None:
            yield
            continue
        name, url = found
        if name == NAME:
            if refuses_names:
                raise Rejected(
                    f"{NAME} of a content part is not taken here (GATEWAY_REFUSED_FIELDS): leave it out, and send the "
                    "media themselves.",
                    param=NAME,
                )
            continue
        if url[:5].lower() == "data:":
            continue
        plain = _PLAIN.fullmatch(url)
        if plain is None:
            raise ForeignMedia(f"{name} must be a data: URL, or a plain http or https one.", param=name)
        host = plain[1].lower()
        if host not in media_domains:
            raise ForeignMedia(
                f"{name} must be a data: URL, or of a host that is named (GATEWAY_MEDIA_DOMAINS), but its host is "
                f"{host[:100]!r}.",
                param=name,
            )


def _found(value: Any) -> Iterator[tuple[str, str] | None]:
    """Every string under a name that ends in `url`, or in a list under one, and NAME for each part that has a name.

    Yields None at the end of each step.
    """
    # A list holds a chat's parts, as returned by `parts_of`.
    level = _parts("content" if type(value) is list else "", value)
    seen = depth = 0
    while level:
        below: list[tuple[str, Any]] = []
        for name, outer in level:
            seen += len(outer)
            if seen > _TOGETHER:
                seen = 0
                yield None
            if name in _LISTS and depth <= _DEEPEST_PART and type(outer) is dict and outer.get(NAME) is not None:
                yield NAME, ""
            for key, inner in outer.items() if type(outer) is dict else ((name, one) for one in outer):
                kind = type(inner)
                if kind is str:
                    if key[-3:].lower() == "url":
                        yield key, inner
                elif kind is dict or kind is list:
                    below += _parts(key, inner)
        level = below
        depth += 1


def _parts(name: str, value: Any) -> list[tuple[str, Any]]:
    if type(value) is dict or len(value) <= _TOGETHER:
        return [(name, value)]
    return [(name, value[at : at + _TOGETHER]) for at in range(0, len(value), _TOGETHER)]
