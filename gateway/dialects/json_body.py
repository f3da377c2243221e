"""Parses a request's body as a JSON object, with an error message for any other body."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Generator, Iterable, Iterator
from json import detect_encoding
from typing import Any, Final

import orjson

from gateway.wire.errors import BadRequest

# The field in whose value the parser stopped: the last `"name":` before that point.
_FIELD_BEFORE: Final = re.compile(r'"([A-Za-z0-9_]{1,64})"\s*:\s*"?[^",:{}\[\]]*$')
# Long strings are removed from bodies of at least LONG_BODY bytes; a string is long above _LONG bytes.
LONG_BODY: Final = 32_768
_LONG: Final = 1024
# The most strings and escaped quotes that may precede a long string, and the bytes for each of which one more may. With
# more of them the parser is faster than this search.
_LOOKS: Final = 48
_LOOK_EACH: Final = 1024
_MOST_QUOTES: Final = 65_536
# Bytes that are scanned in one step, so that a body that is refused is refused early.
PART: Final = 128 * 1024
# The most backslashes before a quote that are counted.
_RUN: Final = 64
_BACKSLASH: Final = ord("\\")
_NOT_JSON_NUMBER: Final = re.compile(r"-?(NaN|Infinity)", re.IGNORECASE)


def to_object(body: bytes) -> dict[str, Any]:
    """The object in `body`; raises BadRequest, which names the fault and its place."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        value = _after_mark(body, error)
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise BadRequest(f"The request's body must be a JSON object, but it is {kind}.")
    return value


def to_utf8(body: bytes) -> bytes:
    """A body in UTF-16 or UTF-32, which vLLM's parser accepts as well, as UTF-8; any other body unchanged.

    The encoding is found by the byte order mark or, as all JSON begins with ASCII, by the positions of zero bytes. Like
    vLLM, this ignores the charset in the headers.
    """
    encoding = detect_encoding(body)
    if encoding in ("utf-8", "utf-8-sig"):
        return body
    try:
        return body.decode(encoding).encode()
    except UnicodeDecodeError:
        return body


def _after_mark(body: bytes, error: orjson.JSONDecodeError) -> Any:
    """The value after a byte order mark, which vLLM's parser skips, too (RFC 8259, 8.1)."""
    if body.startswith(BOM_UTF8):
        body = body.removeprefix(BOM_UTF8)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as behind:
            error = behind
    raise _not_json(body, error) from None


def without_long_strings(body: bytes, strings: Iterable[tuple[int, int]] | None = None) -> bytes:
    """`body` with its long strings emptied, except for a leading "data:", which is needed to recognize a URL.

    Most of a large call is one prompt, which need not be read to be relayed: finding its end takes a twentieth of the
    time of parsing it. The result parses to the same object except for these strings, whose contents the model server
    judges. Long strings among many quotes are found only if `strings` gives their positions.
    """
    kept, pieces = 0, []
    for begin, end in strings if strings is not None else _long_strings(body):
        # Names are kept, as the values of some are checked.
        if body[end + 1 : end + 2] in (b",", b"}", b"]"):
            pieces.append(body[kept : begin + 6] if body[begin + 1 : begin + 6] == b"data:" else body[kept : begin + 1])
            kept = end
    return b"".join([*pieces, body[kept:]])


def _long_strings(body: bytes) -> Iterator[tuple[int, int]]:
    """The positions of long strings; stops when further search would not pay."""
    begin, looks = body.find(b'"'), 0
    while begin > 0 and looks <= _LOOKS + begin // _LOOK_EACH:
        end = body.find(b'"', begin + 1)
        while end > 0 and body[end - 1] == _BACKSLASH:
            run = 1 if body[end - 2] != _BACKSLASH else _backslashes(body, end)
            if run == _RUN or looks > _LOOKS + end // _LOOK_EACH:
                return  # too many backslashes to count again for each quote
            if run % 2 == 0:
                break
            end = body.find(b'"', end + 1)
            looks += 1
        if end - begin > _LONG:
            yield begin, end
        begin = body.find(b'"', end + 1) if end > 0 else -1
        looks += 2


def _backslashes(body: bytes, at: int) -> int:
    """The number of backslashes before `at`, at most _RUN."""
    before = body[max(0, at - _RUN) : at]
    return len(before) - len(before.rstrip(b"\\"))


def long_strings_in_steps(body: bytes) -> Generator[None, None, list[tuple[int, int]]]:
    """The positions of long strings in a body of many strings, part by part; empty if there are too many quotes."""
    found, begin, at, quotes = [], -1, 0, 0
    for part in in_parts(body):
        quote = at - 1
        # An escaped quote ends no string.
        for piece in part.replace(b"\\\\", b"__").replace(b'\\"', b"__").split(b'"')[:-1]:
            quote += len(piece) + 1
            if begin < 0:
                begin = quote
            else:
                if quote - begin > _LONG:
                    found.append((begin, quote))
                begin = -1
            quotes += 1
        if quotes > _MOST_QUOTES:
            return []
        at += len(part)
        yield
    return found


def in_parts(content: bytes) -> Iterator[bytes]:
    """`content` in parts for one step each, never cut between a backslash and the character that it escapes."""
    at = 0
    while at < len(content):
        part = content[at : at + PART]
        if (len(part) - len(part.rstrip(b"\\"))) % 2:
            part = content[at : at + PART + 1]
        yield part
        at += len(part)


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
    # The parser stops after the sign.
    if number := _NOT_JSON_NUMBER.match(text, error.pos - text[: error.pos].endswith("-")):
        return BadRequest(
            f"{field or 'A value'} must be a finite number, but it is {number.group()} ({where}).", param=field
        )
    inside = f" in the value of {field}" if field else ""
    return BadRequest(f"The request's body is not valid JSON: {error.msg} ({where}){inside}.", param=field)


def kind_of(value: Any) -> str:
    """The JSON type of a value. Texts are never shown: they may be a prompt."""
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
