"""Token counts, found by a byte scan of the end of an answer."""

from __future__ import annotations

import re

# Responses and Messages call them input and output. Inside a JSON string every quote is escaped, so a model that writes
# this text is not mistaken for vLLM.
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,18})\b')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,18})\b')
# Enough for the counts, which come before the details.
_LONG = 300


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
