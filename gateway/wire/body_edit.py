"""Edits a JSON body in its own bytes: the model replaced, fields added; every other byte stays as it came."""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

# In JSON a quote inside a string is escaped, so that this is a name wherever it stands.
_MODEL: Final = re.compile(rb'"model"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*"|null)')
_TOKEN: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]')
_DEPTH: Final = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}
# Of a body so much is looked at, in bytes, to see whether a name is its own.
_LOOKS: Final = 64 * 1024


def edited(content: bytes, body: dict[str, Any], *, model: str | None = None, **added: Any) -> bytes:
    """`content`, the bytes of `body`, with this model in the place of its own, and with fields added at its end.

    Of a name that stands there twice the last one wins, in vLLM as in orjson. `body` need not hold its long strings.
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
    """Where the value of the body's own `model` stands; None where that is not plain to see."""
    # Of two names the last one counts, and a name may be written with escapes.
    if content.count(b'"model"') != 1 or b"\\u006" in content:
        return None
    found = _MODEL.search(content, 0, _LOOKS)
    if found is None:
        return None
    depth = sum(_DEPTH.get(token[0], 0) for token in _TOKEN.finditer(content, 0, found.start()))
    return found.span(1) if depth == 1 else None
