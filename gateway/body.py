"""A request's body as a JSON object, with a sentence for whatever else it is."""

from __future__ import annotations

import re
from typing import Any

import orjson

from gateway.errors import BadRequest

# The field whose value the parser stopped in: the last `"name":` before that point.
_FIELD_BEFORE = re.compile(r'"([A-Za-z0-9_]{1,64})"\s*:\s*"?[^",:{}\[\]]*$')
_NOT_JSON_NUMBER = re.compile(r"-?(NaN|Infinity)", re.IGNORECASE)


def to_object(body: bytes | memoryview) -> dict[str, Any]:
    """The object in `body`; raises BadRequest, which says what is wrong and where."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _not_json(bytes(body), error) from None
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise BadRequest(f"The request's body must be a JSON object, but it is {kind}.")
    return value


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
