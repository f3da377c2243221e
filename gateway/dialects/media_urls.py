"""Media of a call: of which host the model server may fetch them, as it reaches what a client may not, and by what name
it keeps them, as it gives what it has under a name to whoever says that.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from typing import Any, Final

from gateway.wire.errors import ForeignMedia, Rejected

# Of the plainest form alone: what two parsers may read in two ways is refused.
_PLAIN: Final = re.compile(r"https?://([A-Za-z0-9.-]+)(?::\d{1,5})?(?:[/?#][!-\[\]-~]*)?", re.IGNORECASE)

# A part's own name, by which vLLM keeps what it makes of the part's media, and the lists that parts stand in. Deeper
# than in a batch's chats stand tools' arguments, in which the same words mean something else.
NAME: Final = "uuid"
_LISTS: Final = ("content", "output")
_DEEPEST_PART: Final = 5

# So many values are looked at in a step.
_TOGETHER: Final = 10_000


def parts_of(body: dict[str, Any]) -> list[Any]:
    """What a chat's messages hold that is no text: a list or an object each."""
    messages = body.get("messages")
    if type(messages) is dict:
        messages = [{"content": messages.get("user")}]
    elif type(messages) is not list:
        return []
    parts = []
    for message in messages:
        try:
            said = message["content"]
        except (KeyError, TypeError):  # what is none is for vLLM to refuse, and costs no other a look
            continue
        if type(said) is not str and type(said) in (list, dict):
            parts.append(said)
    return parts


def check_any(value: Any, content: bytes, media_domains: frozenset[str], refuses_names: bool) -> None:
    """Raises ForeignMedia where a value, a body or the parts of one, holds a URL of another host.

    And Rejected where `refuses_names` and a part has a name. `content` is what the value was read from.
    """
    if _may_hold_any(content, refuses_names):
        deque(_check(value, media_domains, refuses_names), 0)


def check_in_steps(value: Any, content: bytes, media_domains: frozenset[str], refuses_names: bool) -> Iterator[None]:
    """As `check_any`, step by step, as a body of many values takes long."""
    if _may_hold_any(content, refuses_names):
        return _check(value, media_domains, refuses_names)
    return iter(())


def _may_hold_any(content: bytes, names: bool) -> bool:
    # To walk through all of a large body takes longer than all else; a name may be written with escapes.
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
    """Every string that stands under a name that ends in `url`, or in an object or a list under one; None by times.

    And NAME for each part that has one.
    """
    # A list is that of a chat's parts, by `parts_of`.
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
