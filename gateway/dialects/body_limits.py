"""How much a call may ask for, by its body."""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Iterator
from typing import Any, Final

from gateway.dialects.json_body import in_parts, shown
from gateway.dialects.media_urls import NAME
from gateway.wire.errors import BadRequest, Rejected, TooLarge
from gateway.wire.routes import BodyKind

# What the parser itself takes.
DEEPEST: Final = 1024

_COPIES: Final = ("n", "best_of")
_TOKENS: Final = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_output_tokens", "min_tokens")
# What a call brings several of: prompts, texts, documents to rank, the two sides of pairs.
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

# By the kind of a call how it may say how long its answer is: else that is all of the model's context.
_OWN_LIMITS: Final[dict[BodyKind, tuple[str, ...]]] = {
    "chat": ("max_completion_tokens", "max_tokens"),
    "batch": ("max_completion_tokens", "max_tokens"),
    "completion": ("max_tokens",),
    "response": ("max_output_tokens",),
}
_COMPLETION_TOKENS: Final = 16
# An object whose fields vLLM hands to its engine together with those of the body itself.
_MORE: Final = "vllm_xargs"

# One value in so many may be an array or an object, and one a name, which cost a parser ten times what others do.
_FLAT: Final = 10
# What tells nothing of where strings end and values begin: all but quotes, brackets and commas, and but a backslash and
# what may come behind it (RFC 8259, 7). Without it what is left to look through is a third of most texts.
_MEANINGLESS: Final = bytes(set(range(256)).difference(b'"{[,:\\/bfnrtu'))

_ASCII: Final = bytes(range(128))


class BodyLimits:
    """The most that a call may ask for, by the settings' names; `max_new_tokens` of None is what a model takes.

    `refuses_media_names` says that content parts may have no NAME, which elsewhere means nothing.
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
        # A float alone would make 64.0 of 64 where this is compiled.
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
        """Raises TooLarge where a body has more values than may be, as a parser's time goes by these, not by bytes.

        Step by step, as to count takes long, too. `shortened` is the same without its long strings, of which a parser
        makes a hundred times as much in the same time.
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
        """Raises TooLarge where to read all of a body would take too long, its long strings too, and to write it anew.

        An escaped character takes half as long as a byte outside of long strings, and one that is not ASCII a quarter.
        """
        if 2 * len(shortened) + len(content) <= self.max_json_bytes:
            return  # no byte is both; to count them takes as long as the parser
        foreign = 0 if content.isascii() else len(content.translate(None, _ASCII))
        if 2 * len(shortened) + content.count(b"\\") + foreign // 2 > self.max_json_bytes:
            raise TooLarge(
                "The request's body has to be read as a whole: without its long strings, and with half of their "
                "escaped characters and a quarter of their bytes that are not ASCII, it must be at most "
                f"{self.max_json_bytes // 2} bytes, half of GATEWAY_MAX_JSON_BYTES."
            )

    def _may_be(self, parts: Iterable[bytes]) -> Generator[None, None, bool]:
        """Whether there are no more commas, brackets and colons than that."""
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
        """The field by which a call that names no limit of its answer is held to `max_new_tokens`, and that."""
        names = _OWN_LIMITS.get(kind)
        if names is None or any(body.get(name) is not None for name in names):
            return None
        if kind == "completion" and "max_tokens" not in body and self.max_new_tokens >= _COMPLETION_TOKENS:
            return None  # vLLM gives as many to a completion that does not say
        return {names[0]: self.max_new_tokens}

    def check_parts(self, parts: list[Any]) -> None:
        """Raises Rejected where messages hold too many parts that are no plain text."""
        count = sum([len(part) for part in parts if type(part) is list])
        if count > self._max_inputs:
            raise Rejected(
                f"messages must hold at most {self._max_inputs} parts (GATEWAY_MAX_INPUTS), but they hold {count}.",
                param="messages",
            )

    def answers(self, body: dict[str, Any]) -> int:
        """How many a body asks for that has passed `check`: so many for each prompt, or chat of a batch."""
        copies, messages = body.get("n"), body.get("messages")
        is_batch = type(messages) is list and bool(messages) and type(messages[0]) is list
        prompts = len(messages) if is_batch and messages else _prompts(body)
        return prompts * (copies if type(copies) is int and copies > 0 else 1)

    def _check_fields(self, body: dict[str, Any], names: frozenset[str]) -> None:
        """Of these `names` alone, which it has: most calls have one or none, and each look at another costs them."""
        for name in sorted(names):
            value = body[name]
            if value is None:
                continue
            if name in self._refused:
                raise Rejected(f"{name} is not taken here (GATEWAY_REFUSED_FIELDS).", param=name)
            if name in self._fields:
                most, setting = self._fields[name]
                # vLLM reads numbers in texts, too, and true as 1.
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
        # Of a batch each is a chat of its own.
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
        # What is there alone, as most calls have none of these, and each look would be a call of a function.
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
    """What stands outside strings, in parts."""
    inside = 0
    for part in in_parts(content):
        # What is escaped ends no string: without that every second piece between quotes is one.
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
    """How many a call asks to complete: vLLM adds those in texts or tokens to those in vectors."""
    return sum([_count(body[name]) for name in _PROMPTS if body.get(name) is not None]) or 1


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
