"""Media that the model server is to fetch: only from hosts that are named, as it reaches what a client may not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from gateway.wire.errors import BadRequest

# Of the plainest form alone: what two parsers may read in two ways is refused.
_PLAIN = re.compile(r"https?://([A-Za-z0-9.-]+)(?::\d{1,5})?(?:[/?#][!-\[\]-~]*)?", re.IGNORECASE)


def check_chat(body: dict[str, Any], media_domains: frozenset[str]) -> None:
    """Raises BadRequest where a message's parts hold a URL of another host; texts are not looked at."""
    messages = body.get("messages")
    if type(messages) is list:
        for message in messages:
            try:
                content = message["content"]
            except (KeyError, TypeError):  # what is none is for vLLM to refuse, and costs no other a look
                continue
            if type(content) is not str and type(content) in (list, dict):
                _check(content, media_domains)
    elif type(messages) is dict and type(parts := messages.get("user")) in (list, dict):
        _check(parts, media_domains)


def check_any(body: dict[str, Any], media_domains: frozenset[str]) -> None:
    """The same, wherever it may stand in a body."""
    _check(body, media_domains)


def _check(value: Any, media_domains: frozenset[str]) -> None:
    for name, url in _urls(value):
        if url[:5].lower() == "data:":
            continue
        plain = _PLAIN.fullmatch(url)
        if plain is None:
            raise BadRequest(f"{name} must be a data: URL, or a plain http or https one.", param=name)
        host = plain[1].lower()
        if host not in media_domains:
            raise BadRequest(
                f"{name} must be a data: URL, or of a host that is named (GATEWAY_MEDIA_DOMAINS), but its host is "
                f"{host[:100]!r}.",
                param=name,
            )


def _urls(value: Any) -> Iterator[tuple[str, str]]:
    """Every string that stands under a name that ends in `url`, or in an object or a list under one."""
    level: list[tuple[str, Any]] = [("", value)]
    while level:
        below: list[tuple[str, Any]] = []
        for name, outer in level:
            for key, inner in outer.items() if type(outer) is dict else ((name, one) for one in outer):
                kind = type(inner)
                if kind is str:
                    if key[-3:].lower() == "url":
                        yield key, inner
                elif kind is dict or kind is list:
                    below.append((key, inner))
        level = below
