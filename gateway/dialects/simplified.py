"""The simplified form: request to chat call, reply and stream back; pure functions on values.

A request of this form, with what the systems it comes from really accept:

    {"messages": {"system": str?, "user": str | [part, …]}, "max_new_tokens": int?, "streaming": bool?, …}
    {"messages": str, …}                  a user's text alone
    {"query": str, …}                     the same, in their first releases
    {"messages": [{role, content}, …], "max_new_tokens": …, "stream": …}    their last ones
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import orjson

from gateway.dialects.citations import cited
from gateway.dialects.json_body import kind_of, shown
from gateway.dialects.text_stream import Style, TextStream
from gateway.wire.errors import BadRequest, UpstreamBroken

Json = dict[str, Any]

MAX_NEW_TOKENS = 1024
TEMPERATURE = 0.01
TOP_P = 0.95

# Names of one field, the first of them our own.
_MAX_TOKENS = ("max_new_tokens", "max_tokens", "max_completion_tokens")
_STREAMING = ("streaming", "stream")

# vLLM counts tokens in 32 bits; what fits there is for the model's own limit to judge.
_MOST_TOKENS = 2**31 - 1

# What most requests are made of.
_USUAL_FIELDS = frozenset({"max_new_tokens", "messages", "model", "streaming", "temperature", "top_p"})

# Consumed here. `typical_p` has no counterpart in vLLM, and `id` was the replaced system's own.
_OWN_FIELDS = frozenset(
    {
        "data",
        "id",
        "input_guardrail_params",
        "max_completion_tokens",
        "max_new_tokens",
        "max_tokens",
        "messages",
        "model",
        "output_guardrail_params",
        "query",
        "stream",
        "stream_style",
        "streaming",
        "temperature",
        "top_p",
        "typical_p",
    }
)


@dataclass(slots=True)
class Simplified:
    """A simplified request that has been checked.

    `chat` is the chat call's body but for its model, `model` what the request names, if anything;
    `echoed` is what the reply repeats of the request.
    """

    chat: Json
    model: str | None
    streaming: bool
    style: Style
    echoed: Json

    target = "/v1/chat/completions"

    def to_call(self, model: str) -> bytes:
        """The chat call's body; raises BadRequest for what cannot be written."""
        self.chat["model"] = model
        try:
            return orjson.dumps(self.chat)
        except TypeError:
            raise _too_deep(self.chat) from None

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply: vLLM's chat completion as it came and, around it, the text and what was asked.

        Raises UpstreamBroken where the answer is no chat completion.
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
        # What vLLM wrote need not be written again.
        return b"".join(
            (b'{"text":', orjson.dumps(text), b",", answer.strip()[1:-1], b",", orjson.dumps(self.echoed)[1:])
        )

    def to_stream(self) -> TextStream | None:
        """What makes the reply's stream of vLLM's, where that is not in vLLM's own style."""
        if self.style == "openai":
            return None
        return TextStream(self.style, self.echoed["data"], lambda choice: choice["delta"].get("content"))


def is_simplified(body: Json) -> bool:
    """Whether the body of a chat completion is in the simplified form; any other is OpenAI's."""
    messages = body.get("messages")
    if isinstance(messages, list):
        return "max_new_tokens" in body or "streaming" in body
    return isinstance(messages, (dict, str)) or (messages is None and "query" in body)


def from_body(
    body: Json,
    stream_style: Style,
    system_role: Literal["system", "merge"],
    *,
    disable_streaming: bool,
    max_new_tokens: float = MAX_NEW_TOKENS,
) -> Simplified:
    """A checked request; `disable_streaming` answers every request whole. A request that does not say asks for no more
    than `max_new_tokens`.

    Raises BadRequest, which names the field.
    """
    messages, prompt = _from_object(said) if isinstance(said := body.get("messages"), dict) else _messages(body)
    if system_role == "merge":
        messages = _merged(messages)
    others: Json | None = None
    guardrail = data = None
    if not body.keys() <= _USUAL_FIELDS:  # most have no more, and need no more looks
        others = {name: value for name, value in body.items() if name not in _OWN_FIELDS and value is not None}
        guardrail, data = body.get("output_guardrail_params"), body.get("data")
        if data is not None and not isinstance(data, dict):
            raise BadRequest(f"data must be an object, but it is {kind_of(data)}.", param="data")
        data = data and cited(data)
        if body.get("stream_style") is not None:
            stream_style = _style(body["stream_style"])
        body = {**body, _MAX_TOKENS[0]: _one_of(body, _MAX_TOKENS, _max_tokens)}
        body[_STREAMING[0]] = _one_of(body, _STREAMING, _streaming)
    model, tokens, streaming = body.get("model"), body.get("max_new_tokens"), body.get("streaming")
    if model is not None and not isinstance(model, str):
        raise BadRequest(f"model must be a string, but it is {kind_of(model)}.", param="model")
    streaming = (streaming is None or _streaming(streaming, "streaming")) and not disable_streaming
    chat = {
        "messages": messages,
        "max_tokens": min(MAX_NEW_TOKENS, max_new_tokens) if tokens is None else _max_tokens(tokens, "max_new_tokens"),
        "temperature": TEMPERATURE if body.get("temperature") is None else _temperature(body["temperature"]),
        "top_p": TOP_P if body.get("top_p") is None else _top_p(body["top_p"]),
        "stream": streaming,
    }
    if others:
        if not streaming:
            others.pop("stream_options", None)
        chat |= others
    echoed = {
        "prompt": prompt,
        "streaming": streaming,
        "stream": streaming,
        "output_guardrail_params": guardrail,
        "data": data,
    }
    if (guardrail or data) and not _can_be_written(echoed):
        raise _too_deep(echoed)  # while it can still be refused
    return Simplified(chat, model or None, streaming, stream_style, echoed)


def _too_deep(fields: Json) -> BadRequest:
    # orjson reads four times the depth that it writes.
    name = next(name for name, value in fields.items() if not _can_be_written([value]))
    return BadRequest(f"{name} is nested too deeply.", param=name)


def _can_be_written(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


def _messages(body: Json) -> tuple[list[Json], str]:
    messages = body.get("messages")
    if isinstance(messages, list):
        return _from_list(messages)
    name = "query" if messages is None else "messages"
    text = _text(body[name], name)
    return [{"role": "user", "content": text}], text


def _from_object(messages: Json) -> tuple[list[Json], str]:
    user = messages.get("user")
    prompt = _texts_of(user) if isinstance(user, list) else _text(user, "messages.user")
    system = messages.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRequest(f"messages.system must be a string, but it is {kind_of(system)}.", param="messages.system")
    turn = {"role": "user", "content": user}
    return [{"role": "system", "content": system}, turn] if system else [turn], prompt


def _texts_of(parts: list[Any]) -> str:
    """The text of OpenAI's content parts, of which some may be images; the model judges those."""
    for at, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise BadRequest(
                f"messages.user[{at}] must be an object with a type, as OpenAI's content parts are.",
                param=f"messages.user[{at}]",
            )
    if not parts:
        raise BadRequest("messages.user must be a string or content parts, but it is empty.", param="messages.user")
    return "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def _from_list(messages: list[Any]) -> tuple[list[Json], str]:
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
    users = [message.get("content") for message in messages if message["role"] == "user"]
    if not users:
        raise BadRequest("messages must hold at least one message of role 'user'.", param="messages")
    prompt = users[-1]
    return messages, prompt if isinstance(prompt, str) else ""


def _merged(messages: list[Json]) -> list[Json]:
    """The same conversation without a system role: its text stands before the first user's."""
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


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a string that is not empty, but it is {kind_of(value)}.", param=name)
    if not value or value.isspace():
        raise BadRequest(f"{name} must be a string that is not empty, but it is empty.", param=name)
    return value


def _max_tokens(value: Any, name: str) -> int:
    if type(value) is float and value.is_integer() and value <= _MOST_TOKENS:
        value = int(value)  # to JSON, and to the systems that this replaces, 5.0 is an integer
    if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
        raise BadRequest(f"{name} must be an integer from 1 to {_MOST_TOKENS}, but it is {shown(value)}.", param=name)
    return value


def _streaming(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, but it is {shown(value)}.", param=name)
    return value


def _one_of(body: Json, names: tuple[str, ...], check: Callable[[Any, str], Any]) -> Any:
    """The checked value of a field that goes by several names; they may not contradict each other."""
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


def _temperature(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise BadRequest(f"temperature must be a number of at least 0, but it is {shown(value)}.", param="temperature")
    return cast(float, value)


def _top_p(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= 1:
        raise BadRequest(f"top_p must be a number above 0 and at most 1, but it is {shown(value)}.", param="top_p")
    return cast(float, value)


def _style(value: Any) -> Style:
    if value not in get_args(Style):
        allowed = " or ".join(map(repr, get_args(Style)))
        raise BadRequest(f"stream_style must be {allowed}, but it is {shown(value)}.", param="stream_style")
    return cast(Style, value)
