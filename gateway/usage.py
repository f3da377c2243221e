"""Token counts, found by a byte scan of the end of an answer."""

from __future__ import annotations

import re

# Inside a JSON string every quote is escaped, so a model that writes this text is not mistaken for vLLM.
_PROMPT = re.compile(rb'"prompt_tokens":\s*(\d{1,18})\b')
_COMPLETION = re.compile(rb'"completion_tokens":\s*(\d{1,18})\b')


def usage_in(tail: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens of the last `usage` object in `tail`; None where vLLM reported none."""
    at = tail.rfind(b'"usage":')
    if at < 0:
        return None
    prompt, completion = _PROMPT.search(tail, at), _COMPLETION.search(tail, at)
    return (int(prompt[1]), int(completion[1])) if prompt and completion else None
