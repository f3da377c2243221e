"""Token counts, found by a byte scan of the end of an answer."""

from __future__ import annotations

import re

# Inside a JSON string every quote is escaped, so a model that writes this text is not mistaken for vLLM.
_COUNTS = re.compile(rb'"(prompt|completion)_tokens":\s*(\d{1,18})\b')
# Enough for the counts, which come before the details.
_LONG = 300


def usage_text(tail: bytes) -> bytes:
    """The beginning of the last `usage` object in `tail`; empty where vLLM reported none."""
    at = tail.rfind(b'"usage":')
    return tail[at : at + _LONG] if at >= 0 else b""


def usage_in(tail: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens of the last `usage` object in `tail`; None where vLLM reported none."""
    counts = dict(_COUNTS.findall(usage_text(tail)))
    return (int(counts[b"prompt"]), int(counts[b"completion"])) if len(counts) == 2 else None
