"""Token counts of a call by byte scans of it: what vLLM told in its answer, and what is estimated where it did not."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Final

_NAME: Final = b'"usage":'
# Responses and Messages call them input and output. Inside a JSON string every quote is escaped, so a model that writes
# this text is not mistaken for vLLM.
_PROMPT: Final = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,18})\b')
_COMPLETION: Final = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,18})\b')
_USUAL: Final = b'"usage":{"prompt_tokens":'
_USUAL_SIZE: Final = len(_USUAL)
_COMPLETION_NAME: Final = b'"completion_tokens":'
# What Messages leave out of theirs.
_CACHED: Final = re.compile(rb'"cache_(?:read|creation)_input_tokens":\s*(\d{1,18})\b')
# Those of them that it had, in the details of a prompt's.
_FOUND_TOKENS: Final = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)":\s*(\d{1,18})\b')
# An object and those in it, up to its end or its first that holds others.
_OBJECT: Final = re.compile(rb'"usage":\s*\{(?:[^{}]++|\{[^{}]*+\})*+')
# Enough for an object whose details are of each turn of a long conversation.
_LONG: Final = 4096

# A text is a quarter as many tokens as bytes; a picture or a recording, whose bytes say nothing, a thousand.
TOKEN: Final = 4
ITEM: Final = 1000 * TOKEN
# So many are told from text, and so much is looked through in a step.
_MOST_ITEMS: Final = 256
_STEP: Final = 1024 * 1024
# One byte in so many says what a body is made of.
_SAMPLED: Final = 61
# Where one is in a body. What is written of one inside a text has its quotes escaped.
_MARKS: Final = (b";base64,", b'"data":', b'_embeds":')
_BEFORE_URL: Final = re.compile(rb'url"\s*:\s*"data:[^"\s]*$', re.IGNORECASE)
_BASE64: Final = re.compile(rb'\s{0,8}"([A-Za-z0-9+/=_\\-]{256})')

_EVENT: Final = re.compile(rb"^(?:event|data):", re.MULTILINE)
_TEXT: Final = re.compile(
    rb'"(?:content|reasoning(?:_content)?|text|delta|arguments|partial_json|thinking)":\s*"([^"\\]*+(?:\\.[^"\\]*+)*+)'
)


def usage_text(tail: bytes, first: bytes = b"") -> bytes:
    """The beginning of a `usage` object in the end of an answer, or of its `first`; empty where vLLM reported none.

    Of these two it is the last, unless that tells of fewer: what a client sent may come back behind vLLM's own.
    """
    first = first if first.startswith(_NAME) else b""
    at = tail.rfind(_NAME)
    if at < 0:
        return first
    last = tail[at : at + _LONG]
    begin = tail.find(_NAME, 0, at)
    if begin < 0 and not first:
        return last
    return max(last, first or tail[begin : begin + _LONG], key=_told)


def first_usage(found: bytes, data: bytes) -> bytes:
    """The beginning of an answer's first `usage` object, or what may be one, as `found` so far and with `data` more."""
    if found.startswith(_NAME):
        return found + data[: _LONG - len(found)]
    joined = found + data
    at = joined.find(_NAME)
    return joined[at : at + _LONG] if at >= 0 else joined[1 - len(_NAME) :]


def usage_in(text: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens in what `usage_text` has found; None where vLLM reported none.

    A call that completes nothing, as an embedding does, may leave out the second.
    """
    # As vLLM mostly writes it, by its bytes: a regular expression takes ten times as long.
    if text[:_USUAL_SIZE] == _USUAL:
        end = text.find(b"}")
        at = text.find(_COMPLETION_NAME, _USUAL_SIZE, end) if end > 0 else -1
        if at > 0:
            first = last = 0
            place = _USUAL_SIZE
            while 48 <= text[place] <= 57:
                first = first * 10 + text[place] - 48
                place += 1
            at += len(_COMPLETION_NAME)
            stop = at
            while 48 <= text[stop] <= 57:
                last = last * 10 + text[stop] - 48
                stop += 1
            # A comma comes next, or the object's end.
            if (
                0 < place - _USUAL_SIZE < 19
                and 0 < stop - at < 19
                and (text[place] == 44 or text[place] == 125)
                and (text[stop] == 44 or text[stop] == 125)
            ):
                return first, last
    told = _OBJECT.match(text)
    if told is None or (prompt := _PROMPT.search(told[0])) is None:
        return None
    completion = _COMPLETION.search(told[0])
    cached = sum(map(int, _CACHED.findall(told[0]))) if b'"cache_' in told[0] else 0
    return int(prompt[1]) + cached, int(completion[1]) if completion else 0


def cached_in(text: bytes) -> int:
    """How many of the prompt's tokens vLLM had in its prefix cache, of what `usage_text` has found; 0: none is told."""
    told = _OBJECT.match(text)
    found = None if told is None else _FOUND_TOKENS.search(told[0])
    return 0 if found is None else int(found[1])


def _told(text: bytes) -> int:
    return sum(usage_in(text) or (-1,))


def prompt_size(content: bytes) -> int:
    """How many bytes of text a body is worth: what it has of pictures and recordings counts as an item each."""
    # What is text nearly all through has a space in eight bytes, as no base64 has; a few say so.
    sample = content[::_SAMPLED]
    if 8 * sample.count(b" ") >= len(sample):
        return len(content)
    steps = prompt_size_in_steps(content)
    while len(content) > ITEM:
        try:
            next(steps)
        except StopIteration as end:
            return int(end.value)
    return len(content)


def prompt_size_in_steps(content: bytes) -> Generator[None, None, int]:
    """As `prompt_size`, step by step."""
    size = len(content)
    if size <= ITEM:
        return size
    items = 0
    for mark in _MARKS:
        at = 0
        while at < len(content) and items < _MOST_ITEMS:
            found = content.find(mark, at, at + _STEP)
            if found < 0:
                at += _STEP - len(mark) + 1
                yield
                continue
            items += 1
            at = found + len(mark)
            if mark == _MARKS[0]:
                is_item = _BEFORE_URL.search(content, max(0, found - 200), found) is not None
                begin = found
            else:
                is_item = (value := _BASE64.match(content, at)) is not None
                begin = value.start(1) if value else at
            if is_item:
                at = max(at, content.find(b'"', begin))
                size -= max(0, at - begin - ITEM)
    return size


def text_size(tail: bytes, events: int, size: int) -> int:
    """How many bytes of text are in the `events` of a stream of this `size`, the last of which `tail` holds.

    A server may write many tokens in one event. What is no text in an event that has one is as much as in these.
    """
    text, other, begun = 0, 0, False
    for event in tail.split(b"\n\n"):
        if (begin := _EVENT.search(event)) is None:
            continue
        length, texts = len(event) + 2 - begin.start(), _TEXT.findall(event)
        if texts:
            told = sum(map(len, texts))
            text, other = text + told, min(other or length, length - told)
        else:
            events, size = events - 1, size - length
        begun = True
    if begun and not other:
        return 0
    return max(text, size - max(0, events) * other)
