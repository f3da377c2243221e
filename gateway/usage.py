"""Token counts, found by a byte scan of the end of an answer."""

from __future__ import annotations

import re

# Inside a JSON string every quote is escaped, so a model that writes this text is not mistaken for vLLM.
_COUNTS = re.compile(rb'"(prompt|completion)_tokens":\s*(\d{1,18})\b')


def usage_in(tail: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens of the last `usage` object in `tail`; None where vLLM reported none."""
    at = tail.rfind(b'"usage":')
    if at < 0:
        return None
    counts = dict(_COUNTS.findall(tail, at))
    return (int(counts[b"prompt"]), int(counts[b"completion"])) if len(counts) == 2 else None
