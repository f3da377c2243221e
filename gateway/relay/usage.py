"""Token counts of a call by byte scans: the usage that vLLM reports in its answer, or else an estimate."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Final

_NAME: Final = b'"usage":'
# Responses and Messages call the counts input and output tokens. Inside a JSON string every quote is escaped, so a
# model that writes this text is not mistaken for vLLM.
_PROMPT: Final = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,18})\b')
_COMPLETION: Final = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,18})\b')
_USUAL: Final = b'"usage":{"prompt_tokens":'
_USUAL_SIZE: Final = len(_USUAL)
_COMPLETION_NAME: Final = b'"completion_tokens":'
# Tokens that Messages do not include in their input tokens.
_CACHED: Final = re.compile(rb'"cache_(?:read|creation)_input_tokens":\s*(\d{1,18})\b')
# The tokens that were found in the cache, in the details of the prompt's tokens.
_FOUND_TOKENS: Final = re.compile(rb'"(?:cached_tokens|cache_read_input_tokens)":\s*(\d{1,18})\b')
# An object and the objects in it, up to its end or to the first inner object that holds further objects.
_OBJECT: Final = re.compile(rb'"usage":\s*\{(?:[^{}]++|\{[^{}]*+\})*+')
# Enough bytes for a usage object with details of each turn of a long conversation.
_LONG: Final = 4096

# A text has a quarter as many tokens as bytes. A picture or a recording counts as a thousand tokens, whatever its size.
TOKEN: Final = 4
ITEM: Final = 1000 * TOKEN
# The most pictures and recordings that are distinguished from text, and the bytes that are scanned in one step.
_MOST_ITEMS: Final = 256
_STEP: Final = 1024 * 1024
# One byte in so many is sampled to see if a body is all text.
_SAMPLED: Final = 61
# The marks of a picture or recording in a body. Inside a text the quotes of a mark would be escaped.
_MARKS: Final = (b";base64,", b'"data":', b'_embeds":')
_BEFORE_URL: Final = re.compile(rb'url"\s*:\s*"data:[^"\s]*$', re.IGNORECASE)
_BASE64: Final = re.compile(rb'\s{0,8}"([A-Za-z0-9+/=_\\-]{256})')

_EVENT: Final = re.compile(rb"^(?:event|data):", re.MULTILINE)
_TEXT: Final = re.compile(
    rb'"(?:content|reasoning(?:_content)?|text|delta|arguments|partial_json|thinking)":\s*"([^"\\]*+(?:\\.[^"\\]*+)*+)'
)


def usage_text(tail: bytes, first: bytes = b"") -> bytes:
    """The beginning of the `usage` object in an answer's `tail`, or of its `first` one; empty if vLLM reported none.

    This is the last object unless it counts fewer tokens: an object that the client sent may come back after vLLM's.
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
    """The beginning of an answer's first `usage` object, or of a possible one: `found` so far, extended by `data`."""
    if found.startswith(_NAME):
        return found + data[: _LONG - len(found)]
    joined = found + data
    at = joined.find(_NAME)
    return joined[at : at + _LONG] if at >= 0 else joined[1 - len(_NAME) :]


def usage_in(text: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens in the result of `usage_text`; None if vLLM reported none.

    A call that generates nothing, such as an embedding, may lack the completion tokens.
    """
    # The form that vLLM usually writes is parsed byte by byte: a regular expression takes ten times as long.
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
            # Each number must be followed by a comma or the object's end.
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
    """How many prompt tokens vLLM had in its prefix cache, by the result of `usage_text`; 0 if it reports none."""
    told = _OBJECT.match(text)
    found = None if told is None else _FOUND_TOKENS.search(told[0])
    return 0 if found is None else int(found[1])


def _told(text: bytes) -> int:
    return sum(usage_in(text) or (-1,))


def prompt_size(content: bytes) -> int:
    """The size of a body in bytes of text: each picture or recording in it counts as at most ITEM bytes."""
    # A body that is nearly all text has a space in eight bytes, and base64 has none; a sample of bytes shows that.
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
    """Like `prompt_size`, in steps."""
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
    """How many bytes of text are in the `events` of a stream of this `size`; `tail` holds the last of them.

    A server may write many tokens in one event. Each event with text is assumed to hold as many other bytes as those in
    the tail.
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
