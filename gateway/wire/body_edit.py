"""Edits the bytes of a JSON body: replaces the model, adds fields, and keeps every other byte."""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

# JSON escapes the quotes inside a string, so a match is always a field name, at any depth.
_MODEL: Final = re.compile(rb'"model"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*"|null)')
_TOKEN: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]')
_DEPTH: Final = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}
# Bytes of a body that are searched for its own `model` field.
_LOOKS: Final = 64 * 1024


def edited(content: bytes, body: dict[str, Any], *, model: str | None = None, **added: Any) -> bytes:
    """`content`, the bytes of `body`, with its model replaced by `model` and with the `added` fields at its end.

    If a name occurs twice, the last one wins, in vLLM as in orjson. `body` may lack its long strings.
    """
    if model is not None:
        place = _place_of_model(content) if "model" in body else None
        if place is None:
            added = {"model": model, **added}
        else:
            content = content[: place[0]] + orjson.dumps(model) + content[place[1] :]
    if not added:
        return content
    end = content.rindex(b"}")
    separator = b"," if body else b""
    return b"".join((content[:end], separator, orjson.dumps(added)[1:-1], content[end:]))


def _place_of_model(content: bytes) -> tuple[int, int] | None:
    """The span of the value of the top-level `model`; None if this search cannot tell."""
    # If the name occurs twice, the last one counts; the name may also be written with escapes (\u006d is `m`).
    if content.count(b'"model"') != 1 or b"\\u006" in content:
        return None
    found = _MODEL.search(content, 0, _LOOKS)
    if found is None:
        return None
    depth = sum(_DEPTH.get(token[0], 0) for token in _TOKEN.finditer(content, 0, found.start()))
    return found.span(1) if depth == 1 else None
