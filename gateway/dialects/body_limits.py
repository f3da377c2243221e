"""Limits on the contents of a request body."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Iterator
from typing import Any, Final

from gateway.dialects.json_body import in_parts, shown
from gateway.dialects.media_urls import NAME
from gateway.wire.errors import BadRequest, Rejected, TooLarge
from gateway.wire.routes import BodyKind

# The depth that the parser itself accepts.
DEEPEST: Final = 1024

_COPIES: Final = ("n", "best_of")
_TOKENS: Final = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens", "min_tokens")
# Fields that may hold several inputs: prompts, texts, documents to rank, the two sides of pairs.
_PROMPTS: Final[tuple[str, ...]] = ("prompt", "prompt_embeds")
_INPUTS: Final[tuple[str, ...]] = (
    *_PROMPTS,
    "input",
    "documents",
    "text_1",
    "text_2",
    "data_1",
    "data_2",
    "queries",
    "items",
)
_COUNTED: Final = frozenset((*_INPUTS, "data"))

# By the kind of a call, the fields that limit its answer's length. Without one the answer may fill the model's context.
_OWN_LIMITS: Final[dict[BodyKind, tuple[str, ...]]] = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "batch": ("max_completion_tokens", "max_tokens"),
    "completion": ("max_tokens",),
    "response": ("max_output_tokens",),
}
_COMPLETION_TOKENS: Final = 16
# An object whose fields vLLM passes to its engine together with those of the body itself.
_MORE: Final = "vllm_xargs"

# One value in so many may be an array or object, and one a name: these cost a parser ten times as much as other values.
_FLAT: Final = 10
# Bytes that do not show where strings end or values begin: all except quotes, brackets, commas, colons, the backslash
# and the characters that may follow a backslash (RFC 8259, 7). Without them a third of most texts is left to scan.
_MEANINGLESS: Final = bytes(set(range(256)).difference(b'"{[,:\\/bfnrtu'))

_ASCII: Final = bytes(range(128))


class BodyLimits:
    """The limits of a call, by the settings' names; `max_new_tokens` of None leaves this limit to the model.

    `refuses_media_names` says that content parts may have no NAME. Elsewhere a field of this name means nothing.
    """

    __slots__ = (
        "_fields",
        "_looked_at",
        "_max_inputs",
        "_max_json_depth",
        "_max_json_values",
        "_max_messages",
        "_max_n",
        "_refused",
        "max_json_bytes",
        "max_new_tokens",
        "refuses_media_names",
    )

    def __init__(
        self,
        *,
        max_n: int,
        max_new_tokens: int | None,
        max_messages: int,
        max_inputs: int,
        max_json_depth: int,
        max_json_values: int,
        max_json_bytes: int,
        refused_fields: Collection[str],
    ) -> None:
        # Not `float` alone: compiled code would turn 64 into 64.0.
        self.max_new_tokens: int | float = math.inf if max_new_tokens is None else max_new_tokens
        self._fields: dict[str, tuple[int | float, str]] = dict.fromkeys(_COPIES, (max_n, "GATEWAY_MAX_N"))
        self._fields |= dict.fromkeys(_TOKENS, (self.max_new_tokens, "GATEWAY_MAX_NEW_TOKENS"))
        self._refused = frozenset(refused_fields) - {NAME}
        self.refuses_media_names = NAME in refused_fields
        self._looked_at = self._refused.union(self._fields, _COUNTED, (_MORE,))
        self._max_n = max_n
        self._max_messages = max_messages
        self._max_inputs = max_inputs
        self._max_json_depth = max_json_depth
        self._max_json_values = max_json_values
        self.max_json_bytes = max_json_bytes

    def check_size(self, content: bytes, shortened: bytes) -> Iterator[None]:
        """Raises TooLarge if a body has too many values: these, not its bytes, determine the parser's time.

        Works in steps, as counting takes long, too. `shortened` is the body without its long strings: a parser reads a
        hundred times as many bytes of long strings in the same time.
        """
        if len(shortened) > self.max_json_bytes:
            raise TooLarge(
                f"The request's body must be at most {self.max_json_bytes} bytes (GATEWAY_MAX_JSON_BYTES) without its "
                "long strings."
            )
        if len(content) < 2 * self._max_json_values // _FLAT or (yield from self._may_be(in_parts(shortened))):
            return
        if not (yield from self._may_be(_without_strings(shortened))):
            each = self._max_json_values // _FLAT
            raise TooLarge(
                f"The request's body must hold at most {self._max_json_values} values, {each} of them arrays and "
                f"objects, and {each} names (GATEWAY_MAX_JSON_VALUES)."
            )

    def check_whole(self, content: bytes, shortened: bytes) -> None:
        """Raises TooLarge if it would take too long to parse a body with its long strings and to write it again.

        An escaped character takes half the time of a byte outside long strings, and a byte that is not ASCII a quarter.
        """
        if 2 * len(shortened) + len(content) <= self.max_json_bytes:
            return  # no byte is both escaped and not ASCII; counting them takes as long as parsing
        foreign = 0 if content.isascii() else len(content.translate(None, _ASCII))
        if 2 * len(shortened) + content.count(b"\\") + foreign // 2 > self.max_json_bytes:
            raise TooLarge(
                "The request's body has to be read as a whole: without its long strings, and with half of their "
                "escaped characters and a quarter of their bytes that are not ASCII, it must be at most "
                f"{self.max_json_bytes // 2} bytes, half of GATEWAY_MAX_JSON_BYTES."
            )

    def _may_be(self, parts: Iterable[bytes]) -> Generator[None, None, bool]:
        """Whether the numbers of commas, brackets and colons are within the limits."""
        each = self._max_json_values // _FLAT
        nested = names = values = 0
        for part in parts:
            nested += part.count(b"{") + part.count(b"[")
            names += part.count(b":")
            values += part.count(b",")
            if nested > each or names > each or nested + values > self._max_json_values:
                return False
            yield
        return True

    def check(self, body: dict[str, Any]) -> None:
        """Raises BadRequest, which names the field."""
        if names := self._looked_at.intersection(body):
            self._check_fields(body, names)
        stream, messages = body.get("stream"), body.get("messages")
        if type(stream) is not bool and stream is not None:
            raise BadRequest(f"stream must be true or false, but it is {shown(stream)}.", param="stream")
        if type(messages) is list and (len(messages) > self._max_messages or (messages and type(messages[0]) is list)):
            self._check_messages(messages)
        if self._max_json_depth < DEEPEST and _deeper(body, self._max_json_depth):
            raise Rejected(
                f"The request's body is nested more than {self._max_json_depth} deep (GATEWAY_MAX_JSON_DEPTH)."
            )

    def missing_limit(self, kind: BodyKind, body: dict[str, Any]) -> dict[str, int | float] | None:
        """The field and value that limit the answer to `max_new_tokens`; None if the call needs no such limit."""
        names = _OWN_LIMITS.get(kind)
        if names is None or any(body.get(name) is not None for name in names):
            return None
        if kind == "completion" and "max_tokens" not in body and self.max_new_tokens >= _COMPLETION_TOKENS:
            return None  # vLLM's default for a completion is within the limit
        return {names[0]: self.max_new_tokens}

    def check_parts(self, parts: list[Any]) -> None:
        """Raises Rejected if messages hold too many content parts."""
        count = sum([len(part) for part in parts if type(part) is list])
        if count > self._max_inputs:
            raise Rejected(
                f"messages must hold at most {self._max_inputs} parts (GATEWAY_MAX_INPUTS), but they hold {count}.",
                param="messages",
            )

    def answers(self, body: dict[str, Any]) -> int:
        """How many answers a checked body asks for: `n` for each prompt, or for each chat of a batch."""
        copies, messages = body.get("n"), body.get("messages")
        is_batch = type(messages) is list and bool(messages) and type(messages[0]) is list
        prompts = len(messages) if is_batch and messages else _prompts(body)
        return prompts * (copies if type(copies) is int and copies > 0 else 1)

    def _check_fields(self, body: dict[str, Any], names: frozenset[str]) -> None:
        """Check only these `names`, which the body has: most calls have one or none, and each lookup costs time."""
        for name in sorted(names):
            value = body[name]
            if value is None:
                continue
            if name in self._refused:
                raise Rejected(f"{name} is not taken here (GATEWAY_REFUSED_FIELDS).", param=name)
            if name in self._fields:
                most, setting = self._fields[name]
                # vLLM would also accept a number in a string, and true as 1.
                if type(value) is not int and not (type(value) is float and value.is_integer()):
                    raise BadRequest(f"{name} must be an integer, but it is {shown(value)}.", param=name)
                if value > most:
                    raise Rejected(f"{name} must be at most {most} ({setting}), but it is {value}.", param=name)
            elif name == _MORE and type(value) is dict:
                self._check_more(value)
        if not _COUNTED.isdisjoint(names):
            self._check_inputs(body)

    def _check_more(self, more: dict[str, Any]) -> None:
        for name in self._refused:
            if name in more:
                named = f"{_MORE}.{name}"
                raise Rejected(f"{named} is not taken here (GATEWAY_REFUSED_FIELDS).", param=named)

    def _check_messages(self, messages: list[Any]) -> None:
        # In a batch each element is a chat of its own.
        chats = [chat for chat in messages if type(chat) is list]
        if len(chats) > self._max_inputs:
            raise Rejected(
                f"messages must be at most {self._max_inputs} chats (GATEWAY_MAX_INPUTS), but they are {len(chats)}.",
                param="messages",
            )
        count = len(messages) - len(chats) + sum(map(len, chats))
        if count > self._max_messages:
            raise Rejected(
                f"messages must be at most {self._max_messages} (GATEWAY_MAX_MESSAGES), but they are {count}.",
                param="messages",
            )

    def _check_inputs(self, body: dict[str, Any]) -> None:
        data = body.get("data")
        # Only the fields that are present: most calls have none, and each check would be a function call.
        inputs = [(name, body[name]) for name in _INPUTS if name in body]
        if type(data) is dict:
            inputs.append(("data.reranked_docs", data.get("reranked_docs")))
        for name, value in inputs:
            count = _count(value)
            if count > self._max_inputs:
                raise Rejected(
                    f"{name} must be at most {self._max_inputs} (GATEWAY_MAX_INPUTS), but they are {count}.", param=name
                )
        answers = _prompts(body) * max(body.get("n") or 1, body.get("best_of") or 1)
        most = max(self._max_inputs, self._max_n)
        if answers > most:
            raise Rejected(
                f"n times the prompts must be at most {most} answers (GATEWAY_MAX_INPUTS), but it is {answers:g}.",
                param="n",
            )


def _without_strings(content: bytes) -> Iterator[bytes]:
    """The bytes outside strings, in parts."""
    inside = 0
    for part in in_parts(content):
        # An escaped quote ends no string. Once these are removed, every second piece between quotes is a string.
        plain = part.translate(None, _MEANINGLESS).replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = plain.split(b'"')
        yield b"".join(pieces[inside::2])
        inside ^= (len(pieces) - 1) & 1


def _count(value: Any) -> int:
    """How many inputs a field holds: a text, an object or a list of tokens is one."""
    if type(value) is not list or (value and type(value[0]) is int):
        return 1
    return len(value)


def _prompts(body: dict[str, Any]) -> int:
    """How many prompts a call has: vLLM adds those in texts or tokens to those in vectors."""
    return sum([_count(body[name]) for name in _PROMPTS if body.get(name) is not None]) or 1


def _deeper(value: Any, most: int) -> bool:
    """Whether objects and arrays are nested deeper than `most`; by levels, as recursion could exhaust the stack."""
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
