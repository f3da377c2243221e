"""A request's body as a JSON object, with a sentence for whatever else it is."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Generator, Iterable, Iterator
from json import detect_encoding
from typing import Any, Final

import orjson

from gateway.wire.errors import BadRequest

# The field whose value the parser stopped in: the last `"name":` before that point.
_FIELD_BEFORE: Final = re.compile(r'"([A-Za-z0-9_]{1,64})"\s*:\s*"?[^",:{}\[\]]*$')
# From so many bytes on a body is worth a look at its strings, and a string at what it is without.
LONG_BODY: Final = 32_768
_LONG: Final = 1024
# So many strings and escaped quotes may come before a long one, and one more for each so many bytes: past that the
# parser is quicker.
_LOOKS: Final = 48
_LOOK_EACH: Final = 1024
_MOST_QUOTES: Final = 65_536
# Most that is looked at in one step, in bytes: whatever is refused is refused early.
PART: Final = 128 * 1024
# The most backslashes before a quote that are counted.
_RUN: Final = 64
_BACKSLASH: Final = ord("\\")
_NOT_JSON_NUMBER: Final = re.compile(r"-?(NaN|Infinity)", re.IGNORECASE)


def to_object(body: bytes) -> dict[str, Any]:
    """The object in `body`; raises BadRequest, which says what is wrong and where."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        value = _after_mark(body, error)
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        raise BadRequest(f"The request's body must be a JSON object, but it is {kind}.")
    return value


def to_utf8(body: bytes) -> bytes:
    """A body in UTF-16 or UTF-32, which vLLM's parser takes as well, in UTF-8; any other as it came.

    By its byte order mark or, as all JSON begins with ASCII, by where its zeros are: what its headers say of it vLLM
    does not read.
    """
    encoding = detect_encoding(body)
    if encoding in ("utf-8", "utf-8-sig"):
        return body
    try:
        return body.decode(encoding).encode()
    except UnicodeDecodeError:
        return body


def _after_mark(body: bytes, error: orjson.JSONDecodeError) -> Any:
    """What stands behind a byte order mark, which vLLM's parser, too, passes over (RFC 8259, 8.1)."""
    if body.startswith(BOM_UTF8):
        body = body.removeprefix(BOM_UTF8)
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError as behind:
            error = behind
    raise _not_json(body, error) from None


def without_long_strings(body: bytes, strings: Iterable[tuple[int, int]] | None = None) -> bytes:
    """`body` with its long strings empty, of which "data:" stays where one begins so: to see what it is.

    Most of a large call is one prompt, of which nothing needs to be known to send it on: to find its end takes a
    twentieth of what a parser takes to read it. The object that stays is the one that came, but for these strings; what
    they hold is for the model server to judge. Those among many quotes are found only where `strings` says where.
    """
    kept, pieces = 0, []
    for begin, end in strings if strings is not None else _long_strings(body):
        # A name stays: what stands under some is looked at.
        if body[end + 1 : end + 2] in (b",", b"}", b"]"):
            pieces.append(body[kept : begin + 6] if body[begin + 1 : begin + 6] == b"data:" else body[kept : begin + 1])
            kept = end
    return b"".join([*pieces, body[kept:]])


def _long_strings(body: bytes) -> Iterator[tuple[int, int]]:
    """Where long strings begin and end, as long as it is worth to look."""
    begin, looks = body.find(b'"'), 0
    while begin > 0 and looks <= _LOOKS + begin // _LOOK_EACH:
        end = body.find(b'"', begin + 1)
        while end > 0 and body[end - 1] == _BACKSLASH:
            run = 1 if body[end - 2] != _BACKSLASH else _backslashes(body, end)
            if run == _RUN or looks > _LOOKS + end // _LOOK_EACH:
                return  # too many to count, for each quote anew
            if run % 2 == 0:
                break
            end = body.find(b'"', end + 1)
            looks += 1
        if end - begin > _LONG:
            yield begin, end
        begin = body.find(b'"', end + 1) if end > 0 else -1
        looks += 2


def _backslashes(body: bytes, at: int) -> int:
    """How many stand before this place; _RUN for any number of more, too."""
    before = body[max(0, at - _RUN) : at]
    return len(before) - len(before.rstrip(b"\\"))


def long_strings_in_steps(body: bytes) -> Generator[None, None, list[tuple[int, int]]]:
    """Where long strings begin and end, though there are many others; part by part. None where those are too many."""
    found, begin, at, quotes = [], -1, 0, 0
    for part in in_parts(body):
        quote = at - 1
        # What is escaped ends no string.
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
    """What is not to be looked at in one step, cut nowhere behind a backslash that escapes what comes next."""
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
