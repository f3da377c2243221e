"""The simplified form: translates requests to chat calls, and replies and streams back; pure functions on values.

A request of this form, as the systems that it comes from really accept it:

    {"messages": {"system": str?, "user": str | [part, …]}, "max_new_tokens": int?, "streaming": bool?, …}
    {"messages": str, …}                  a user's text alone
    {"query": str, …}                     the same, in their first releases
    {"messages": [{role, content}, …], "max_new_tokens": …, "stream": …}    their last ones
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, get_args

import orjson

from gateway.dialects.citations import cited
from gateway.dialects.field_names import OWN_FIELDS, refuse_misspelt
from gateway.dialects.json_body import kind_of, shown
from gateway.dialects.streams import ChunkStream, Style, TextStream
from gateway.wire.errors import BadRequest, Rejected, UpstreamBroken

Json = dict[str, Any]

MAX_NEW_TOKENS: Final = 1024
TEMPERATURE: Final = 0.01
TOP_P: Final = 0.95

# Names of one field, the first of them our own.
_MAX_TOKENS: Final = ("max_new_tokens", "max_tokens", "max_completion_tokens")
_STREAMING: Final = ("streaming", "stream")

# vLLM counts tokens in 32 bits; any number that fits is left to the model's own limit.
_MOST_TOKENS: Final = 2**31 - 1

# The fields that most requests consist of.
_USUAL_FIELDS: Final = frozenset({"max_new_tokens", "messages", "model", "streaming", "temperature", "top_p"})

# Fields that OpenAI's call with a list of messages does not have.
_FIELDS_OF_LISTS: Final = frozenset(
    {"data", "input_guardrail_params", "max_new_tokens", "output_guardrail_params", "streaming"}
)

# `id` was a field of the replaced systems' class for messages.
_OF_MESSAGES: Final = frozenset({"id", "system", "user"})

# Consumed here. `typical_p` has no counterpart in vLLM, and `id` was the replaced system's own.
_OWN_FIELDS: Final = OWN_FIELDS | {
    "id",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "stream",
    "temperature",
    "top_p",
    "typical_p",
}


@dataclass(slots=True)
class Simplified:
    """A checked simplified request.

    `chat` is the chat call's body without its model; `model` is the request's model, if any. `streaming` says whether
    the answer is a stream. `echoed` holds the fields of the request that the reply repeats, and `citations` those of
    its documents. `hides_usage` says that vLLM is asked for a stream's usage, which is hidden from the client.
    """

    chat: Json
    model: str | None
    streaming: bool
    style: Style
    echoed: Json
    citations: list[Json]
    hides_usage: bool
    target: str = "/v1/chat/completions"

    def to_call(self, model: str) -> bytes:
        """The chat call's body; raises BadRequest if orjson cannot write it."""
        self.chat["model"] = model
        try:
            return orjson.dumps(self.chat)
        except TypeError:
            raise _too_deep(self.chat) from None

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply: vLLM's chat completion unchanged, with the text before and the echoed fields after it.

        Raises UpstreamBroken if the answer is not a chat completion.
        """
        try:
            completion = orjson.loads(answer)
            text = completion["choices"][0]["message"]["content"] or ""
            if not isinstance(text, str):
                raise TypeError(text)
            if not completion.keys().isdisjoint(self.echoed) or "text" in completion:
                return orjson.dumps({"text": text, **completion, **self.echoed})
        except (orjson.JSONDecodeError, LookupError, TypeError):
            raise UpstreamBroken("The model server's answer is not a chat completion.") from None
        # vLLM's bytes are copied: they need not be serialized again.
        return b"".join(
            (b'{"text":', orjson.dumps(text), b",", answer.strip()[1:-1], b",", orjson.dumps(self.echoed)[1:])
        )

    def to_texts(self, data: Json | None) -> TextStream | None:
        """The translator from vLLM's chunks to texts, followed by `data`; None if the stream is in vLLM's own style."""
        if self.style == "openai":
            return None
        return TextStream(self.style, data, self.citations, lambda choice: choice["delta"].get("content"))

    def to_stream(self) -> TextStream | ChunkStream | None:
        """The translator from vLLM's stream to the reply's; None if the stream is relayed unchanged."""
        if self.style != "openai":
            return self.to_texts(self.echoed["data"])
        if not self.citations and not self.hides_usage:
            return None
        return ChunkStream(self.citations, hides_usage=self.hides_usage)


def usage_options(options: Any) -> Json | None:
    """A stream's options with `include_usage`; None if they have it already or are not an object."""
    if not isinstance(options, (dict, type(None))) or (options and options.get("include_usage")):
        return None
    # A client that sets `continuous_usage_stats` without `include_usage` asks for no usage, so the former is dropped.
    others = {name: value for name, value in (options or {}).items() if name != "continuous_usage_stats"}
    return {**others, "include_usage": True}


def is_simplified(body: Json) -> bool:
    """Whether the body of a chat completion is in the simplified form; any other body is in OpenAI's."""
    messages = body.get("messages")
    if isinstance(messages, list):
        return not _FIELDS_OF_LISTS.isdisjoint(body)
    return isinstance(messages, (dict, str)) or (messages is None and "query" in body)


def from_body(
    body: Json,
    stream_style: Style,
    system_role: Literal["system", "merge"],
    *,
    disable_streaming: bool,
    max_new_tokens: int | float = MAX_NEW_TOKENS,
    counts_tokens: bool = False,
    checked: bool = False,
    with_text: bool = False,
) -> Simplified:
    """A checked request; raises BadRequest, which names the field.

    `disable_streaming` answers each request whole. A request that states no limit asks for at most `max_new_tokens`.
    `counts_tokens` asks vLLM for a stream's usage. If the fields were `checked` already, further checks are left to
    vLLM. `with_text` says that citations hold their documents' texts.
    """
    messages, prompt = (
        _from_object(said, checked) if isinstance(said := body.get("messages"), dict) else _messages(body, checked)
    )
    if system_role == "merge":
        messages = _merged(messages)
    others: Json | None = None
    guardrail: Any = None
    data: Json | None = None
    citations: list[Json] = []
    if not body.keys() <= _USUAL_FIELDS:  # most requests have no other fields and skip these checks
        others = {name: value for name, value in body.items() if name not in _OWN_FIELDS and value is not None}
        if not checked:
            refuse_misspelt(others)
        guardrail = body.get("output_guardrail_params")
        data, citations = _cited(body.get("data"), with_text)
        if body.get("stream_style") is not None:
            stream_style = _style(body["stream_style"])
        body = {**body, _MAX_TOKENS[0]: _one_of(body, _MAX_TOKENS, _as_it_is if checked else _max_tokens)}
        body[_STREAMING[0]] = _one_of(body, _STREAMING, _streaming)
    model, asked = body.get("model"), body.get("streaming")
    if model is not None and not isinstance(model, str):
        raise BadRequest(f"model must be a string, but it is {kind_of(model)}.", param="model")
    asked = asked is None or _streaming(asked, "streaming")
    streaming = asked and not disable_streaming
    chat = {"messages": messages, **_sampling(body, max_new_tokens, checked), "stream": streaming}
    if others:
        if not streaming:
            others.pop("stream_options", None)
        chat |= others
    options = usage_options(chat.get("stream_options")) if counts_tokens and streaming else None
    if options:
        chat["stream_options"] = options
    echoed = {
        "prompt": prompt,
        # As requested, not as answered: a guard behind this gateway decides by it whether its own answer is a stream.
        "streaming": asked,
        "stream": asked,
        "output_guardrail_params": guardrail,
        "data": data,
    }
    if (guardrail or data) and not _can_be_written(echoed):
        raise _too_deep(echoed)  # now, while the request can still be refused
    return Simplified(chat, model or None, streaming, stream_style, echoed, citations, options is not None)


def _cited(data: Any, with_text: bool) -> tuple[Json | None, list[Json]]:
    """The `data` that the reply repeats, and the citations in it."""
    if data is not None and not isinstance(data, dict):
        raise BadRequest(f"data must be an object, but it is {kind_of(data)}.", param="data")
    if not data or "reranked_docs" not in data:
        return data, []
    citations = cited(data, with_text=with_text)
    return {**data, "reranked_docs": citations}, citations


def _sampling(body: Json, max_new_tokens: int | float, checked: bool) -> Json:
    """The sampling parameters; the defaults are those of the replaced systems."""
    tokens, temperature, top_p = body.get("max_new_tokens"), body.get("temperature"), body.get("top_p")
    if not checked:
        tokens = None if tokens is None else _max_tokens(tokens, "max_new_tokens")
        temperature = None if temperature is None else _temperature(temperature)
        top_p = None if top_p is None else _top_p(top_p)
    return {
        "max_tokens": min(MAX_NEW_TOKENS, max_new_tokens) if tokens is None else tokens,
        "temperature": TEMPERATURE if temperature is None else temperature,
        "top_p": TOP_P if top_p is None else top_p,
    }


def _too_deep(fields: Json) -> BadRequest:
    # orjson reads four times as deep as it writes.
    name = next(name for name, value in fields.items() if not _can_be_written([value]))
    return BadRequest(f"{name} is nested too deeply.", param=name)


def _can_be_written(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


def _messages(body: Json, checked: bool) -> tuple[list[Json], str]:
    messages = body.get("messages")
    if isinstance(messages, list):
        return _from_list(messages, checked)
    name = "query" if messages is None else "messages"
    text = _text(body[name], name, may_be_empty=checked)
    return [{"role": "user", "content": text}], text


def _from_object(messages: Json, checked: bool) -> tuple[list[Json], str]:
    if not checked and not messages.keys() <= _OF_MESSAGES:
        name = next(name for name in messages if name not in _OF_MESSAGES)
        raise BadRequest(
            f"messages.{name[:40]} is not a field, as messages holds system and user: a history belongs in a list of "
            "messages with role and content.",
            param=f"messages.{name[:40]}",
        )
    user = messages.get("user")
    prompt = _texts_of(user) if isinstance(user, list) else _text(user, "messages.user", may_be_empty=checked)
    system = messages.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRequest(f"messages.system must be a string, but it is {kind_of(system)}.", param="messages.system")
    turn = {"role": "user", "content": user}
    return [{"role": "system", "content": system}, turn] if system else [turn], prompt


def _texts_of(parts: list[Any]) -> str:
    """The text of OpenAI's content parts. Some parts may be images, which the model server judges."""
    for at, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadRequest(
                f"messages.user[{at}] must be an object with a type, as OpenAI's content parts are.",
                param=f"messages.user[{at}]",
            )
    if not parts:
        raise BadRequest("messages.user must be a string or content parts, but it is empty.", param="messages.user")
    return "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def _from_list(messages: list[Any], checked: bool) -> tuple[list[Json], str]:
    for at, message in enumerate(messages):
        name = f"messages[{at}]"
        if not isinstance(message, dict):
            raise BadRequest(
                f"{name} must be an object with a role and a content, but it is {kind_of(message)}.", param=name
            )
        if not isinstance(message.get("role"), str):
            raise BadRequest(
                f"{name}.role must be a string, but it is {kind_of(message.get('role'))}.", param=f"{name}.role"
            )
        if checked and not isinstance(message.get("content"), (str, list)) and not message.get("tool_calls"):
            raise BadRequest(
                f"{name}.content must be a string, but it is {kind_of(message.get('content'))}.",
                param=f"{name}.content",
            )
    users = [message.get("content") for message in messages if message["role"] == "user"]
    if not users:
        raise Rejected("messages must hold at least one message of role 'user'.", param="messages")
    prompt = users[-1]
    return messages, prompt if isinstance(prompt, str) else ""


def _merged(messages: list[Json]) -> list[Json]:
    """The same conversation without a system role: the system text stands before the first user's text."""
    system = [message.get("content") for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    first = next((at for at, message in enumerate(rest) if message["role"] == "user"), None)
    if not system or first is None:
        return messages
    user = rest[first].get("content")
    if not all(isinstance(text, str) for text in system) or not isinstance(user, (str, list)):
        raise BadRequest("messages must hold strings, as this gateway merges the system text.", param="messages")
    text = "\n\n".join(cast(list[str], system))
    content = f"{text}\n\n{user}" if isinstance(user, str) else [{"type": "text", "text": f"{text}\n\n"}, *user]
    return [*rest[:first], {**rest[first], "content": content}, *rest[first + 1 :]]


def _text(value: Any, name: str, *, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a string that is not empty, but it is {kind_of(value)}.", param=name)
    if (not value or value.isspace()) and not may_be_empty:
        raise BadRequest(f"{name} must be a string that is not empty, but it is empty.", param=name)
    return value


def _as_it_is(value: Any, name: str) -> Any:
    return value


def _max_tokens(value: Any, name: str) -> int:
    if type(value) is float and value.is_integer() and value <= _MOST_TOKENS:
        value = int(value)  # 5.0 is an integer in JSON, and was for the replaced systems
    if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
        raise BadRequest(f"{name} must be an integer from 1 to {_MOST_TOKENS}, but it is {shown(value)}.", param=name)
    return value


def _streaming(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, but it is {shown(value)}.", param=name)
    return value


def _one_of(body: Json, names: tuple[str, ...], check: Callable[[Any, str], Any]) -> Any:
    """The checked value of a field that has several names, whose values may not contradict each other."""
    first, said = names[0], None
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if said is None:
            first, said = name, value
        elif value != said or type(value) is not type(said):
            raise BadRequest(
                f"{first} and {name} mean the same but differ ({shown(said)} and {shown(value)}): send one of them.",
                param=first,
            )
    return None if said is None else check(said, first)


def _temperature(value: Any) -> int | float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise BadRequest(f"temperature must be a number of at least 0, but it is {shown(value)}.", param="temperature")
    return cast(int | float, value)


def _top_p(value: Any) -> int | float:
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise BadRequest(f"top_p must be a number above 0 and at most 1, but it is {shown(value)}.", param="top_p")
    return cast(int | float, value)


def _style(value: Any) -> Style:
    if value not in get_args(Style):
        allowed = " or ".join(map(repr, get_args(Style)))
        raise BadRequest(f"stream_style must be {allowed}, but it is {shown(value)}.", param="stream_style")
    return cast(Style, value)
