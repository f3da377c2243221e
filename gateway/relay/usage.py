"""Token counts of a call by byte scans of it: what vLLM told in its answer, and what is estimated where it did not."""

from __future__ import annotations

import re
from collections.abc import Generator

# Responses and Messages call them input and output. Inside a JSON string every quote is escaped, so a model that writes
# this text is not mistaken for vLLM.
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,18})\b')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,18})\b')
# Enough for the counts, which come before the details.
_LONG = 300

# A text is a quarter as many tokens as bytes; a picture or a recording, whose bytes say nothing, a thousand.
TOKEN = 4
ITEM = 1000 * TOKEN
# So many are told from text, and so much is looked through in a step.
_MOST_ITEMS = 256
_STEP = 1024 * 1024
# Where one is in a body. What is written of one inside a text has its quotes escaped.
_MARKS = (b";base64,", b'"data":', b'_embeds":')
_BEFORE_URL = re.compile(rb'url"\s*:\s*"data:[^"\s]*$', re.IGNORECASE)
_BASE64 = re.compile(rb'\s{0,8}"([A-Za-z0-9+/=_\\-]{256})')

_EVENT = re.compile(rb"^(?:event|data):", re.MULTILINE)
_TEXT = re.compile(
    rb'"(?:content|reasoning(?:_content)?|text|delta|arguments|partial_json|thinking)":\s*"([^"\\]*+(?:\\.[^"\\]*+)*+)'
)


def usage_text(tail: bytes) -> bytes:
    """The beginning of the last `usage` object in `tail`; empty where vLLM reported none."""
    at = tail.rfind(b'"usage":')
    return tail[at : at + _LONG] if at >= 0 else b""


def usage_in(text: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens in what `usage_text` has found; None where vLLM reported none.

    A call that completes nothing, as an embedding does, may leave out the second.
    """
    prompt, completion = _PROMPT.search(text), _COMPLETION.search(text)
    return (int(prompt[1]), int(completion[1]) if completion else 0) if prompt else None


def prompt_size(content: bytes) -> int:
    """How many bytes of text a body is worth: what it has of pictures and recordings counts as an item each."""
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
