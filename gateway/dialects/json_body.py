"""A request's body as a JSON object, with a sentence for whatever else it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import orjson

from gateway.wire.errors import BadRequest

# The field whose value the parser stopped in: the last `"name":` before that point.
_FIELD_BEFORE = re.compile(r'"([A-Za-z0-9_]{1,64})"\s*:\s*"?[^",:{}\[\]]*$')
# From so many bytes on a body is worth a look at its strings, and a string at what it is without.
LONG_BODY = 32_768
_LONG = 1024
# So many strings and escaped quotes may come before a long one, and one more for each so many bytes: past that the
# parser is quicker.
_LOOKS, _LOOK_EACH = 48, 1024
# The most backslashes before a quote that are counted.
_RUN = 64
_BACKSLASH = ord("\\")
_NOT_JSON_NUMBER = re.compile(r"-?(NaN|Infinity)", re.IGNORECASE)


def to_object(body: bytes) -> dict[str, Any]:
    """The object in `body`; raises BadRequest, which says what is wrong and where."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _not_json(body, error) from None
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise BadRequest(f"The request's body must be a JSON object, but it is {kind}.")
    return value


def without_long_strings(body: bytes) -> bytes:
    """`body` with its long strings empty, of which "data:" stays where one begins so: to see what it is.

    Most of a large call is one prompt, of which nothing needs to be known to send it on: to find its end takes a
    twentieth of what a parser takes to read it. The object that stays is the one that came, but for these strings; what
    they hold is for the model server to judge.
    """
    kept, pieces, quotes = 0, [], _quotes(body)
    for begin, end in zip(quotes, quotes, strict=False):
        # A name stays: what stands under some is looked at.
        if end - begin > _LONG and body[end + 1 : end + 2] in (b",", b"}", b"]"):
            pieces.append(body[kept : begin + 6] if body[begin + 1 : begin + 6] == b"data:" else body[kept : begin + 1])
            kept = end
    return b"".join([*pieces, body[kept:]])


def _quotes(body: bytes) -> Iterator[int]:
    """Where strings begin and end, by turns, as long as they are worth it."""
    at, looks = body.find(b'"'), 0
    while at > 0 and looks <= _LOOKS + at // _LOOK_EACH:
        if body[at - 1] != _BACKSLASH:
            yield at
        elif body[at - 2] == _BACKSLASH:
            before = body[max(0, at - _RUN) : at]
            run = len(before) - len(before.rstrip(b"\\"))
            if run == _RUN:
                return  # too many to count, for each quote anew
            if run % 2 == 0:
                yield at
        at = body.find(b'"', at + 1)
        looks += 1


def _not_json(body: bytes, error: orjson.JSONDecodeError) -> BadRequest:
    if not body.strip():
        return BadRequest("The request's body must be a JSON object, but it is empty.")
    try:
        text = body.decode()
    except UnicodeDecodeError as wrong:
        return BadRequest(f"The request's body must be UTF-8, but byte {wrong.start} is not.")
    where = f"line {error.lineno}, column {error.colno}"
    found = _FIELD_BEFORE.search(text[max(0, error.pos - 300) : error.pos])
    field = found.group(1) if found else None
    # The parser stops behind the sign.
    if number := _NOT_JSON_NUMBER.match(text, error.pos - text[: error.pos].endswith("-")):
        return BadRequest(
            f"{field or 'A value'} must be a finite number, but it is {number.group()} ({where}).", param=field
        )
    inside = f" in the value of {field}" if field else ""
    return BadRequest(f"The request's body is not valid JSON: {error.msg} ({where}){inside}.", param=field)


def kind_of(value: Any) -> str:
    """What JSON calls it. Texts are never shown: they may be a prompt."""
    if value is None:
        return "missing"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return kinds.get(type(value), "an object")


def shown(value: Any) -> str:
    """A scalar as it was sent, short; anything else by its kind."""
    if isinstance(value, dict | list):
        return kind_of(value)
    text = orjson.dumps(value).decode()
    return text if len(text) <= 40 else f"{text[:40]}…"
