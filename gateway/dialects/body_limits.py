"""How much a call may ask for, by its body."""

from __future__ import annotations

import math
from typing import Any

from gateway.wire.errors import BadRequest

# What the parser itself takes.
DEEPEST = 1024

_COPIES = ("n", "best_of")
_TOKENS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens")


class BodyLimits:
    """The most copies of an answer, tokens of one (None: as many as the model takes), messages, and nesting."""

    __slots__ = ("_fields", "_max_json_depth", "_max_messages", "_names", "max_new_tokens")

    def __init__(self, *, max_n: int, max_new_tokens: int | None, max_messages: int, max_json_depth: int) -> None:
        self.max_new_tokens = math.inf if max_new_tokens is None else max_new_tokens
        self._fields = dict.fromkeys(_COPIES, (max_n, "GATEWAY_MAX_N"))
        if max_new_tokens is not None:
            self._fields |= dict.fromkeys(_TOKENS, (max_new_tokens, "GATEWAY_MAX_NEW_TOKENS"))
        self._names = frozenset(self._fields)
        self._max_messages = max_messages
        self._max_json_depth = max_json_depth

    def check(self, body: dict[str, Any]) -> None:
        """Raises BadRequest, which names the field; what is no number is for others to judge."""
        if not self._names.isdisjoint(body):  # most calls have none of them, and need no more looks
            for name, (most, setting) in self._fields.items():
                value = body.get(name)
                if isinstance(value, int | float) and value > most:
                    raise BadRequest(f"{name} must be at most {most} ({setting}), but it is {value}.", param=name)
        messages = body.get("messages")
        if type(messages) is list and len(messages) > self._max_messages:
            raise BadRequest(
                f"messages must be at most {self._max_messages} (GATEWAY_MAX_MESSAGES), but they are {len(messages)}.",
                param="messages",
            )
        if self._max_json_depth < DEEPEST and _deeper(body, self._max_json_depth):
            raise BadRequest(
                f"The request's body is nested more than {self._max_json_depth} deep (GATEWAY_MAX_JSON_DEPTH)."
            )


def _deeper(value: Any, most: int) -> bool:
    """Whether objects and arrays stand in each other more than so many deep; level by level, as a stack has an end."""
    level = [value]
    for _ in range(most):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True
