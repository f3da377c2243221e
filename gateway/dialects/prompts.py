"""Translates calls of older servers with a bare prompt to vLLM's completions and back; pure functions on values.

`POST /generate`, of vLLM's first server, and `POST /api/v1/ask`, of vllm-app:

    {"prompt": str, "stream": bool?, …}    ->  {"text": [prompt + output, …]}, or a stream of these objects with all
                                               of the text so far, each followed by a NUL
    {"question": str, …}                   ->  server-sent events of answer parts
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.dialects.json_body import kind_of
from gateway.dialects.streams import TextStream
from gateway.wire import sse
from gateway.wire.errors import BadRequest, Rejected, UpstreamBroken
from gateway.wire.heads import AnswerHead

Json = dict[str, Any]

# Each text of `/generate` repeats the prompt. This limits the characters in all, as a large `n` is sent in a few bytes.
_MOST_REPEATED = 4 * 1024 * 1024
# In a stream each token's object repeats the prompt.
_MOST_STREAMED = 64 * 1024 * 1024
# Default limits of the answer's tokens: vllm-app's own, and vLLM's for a completion.
_ASK_TOKENS = 2048
_GENERATE_TOKENS = 16


@dataclass(slots=True)
class Prompted:
    """A checked request: the completion's body without its model, and the prompt, if the reply repeats it.

    `context` returns the most tokens that a model takes; None if the body has a limit of its own.
    """

    call: Json
    model: str | None
    streaming: bool
    prompt: str | None
    context: Callable[[str], float] | None = None

    target = "/v1/completions"

    def to_call(self, model: str) -> bytes:
        """The completion's body; raises BadRequest if orjson cannot write it."""
        if self.context is not None:
            # vLLM ends an answer at the end of its context, but refuses a call that asks for more tokens.
            self.call["max_tokens"] = min(_ASK_TOKENS, self.context(model))
        try:
            return orjson.dumps({"model": model, **self.call})
        except TypeError:
            raise BadRequest("The request's body is nested too deeply.") from None

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply; raises UpstreamBroken if the answer is not a completion."""
        try:
            choices = sorted(orjson.loads(answer)["choices"], key=lambda choice: choice["index"])
            return orjson.dumps({"text": [(self.prompt or "") + choice["text"] for choice in choices]})
        except (orjson.JSONDecodeError, LookupError, TypeError):
            raise UpstreamBroken("The model server's answer is not a completion.") from None

    def to_stream(self) -> TextStream | GenerateStream:
        """The translator from the completion's stream to the reply's."""
        if self.prompt is None:
            return TextStream("answer_part", None, [], lambda choice: choice["text"])
        return GenerateStream(self.prompt)


def from_generate(body: Json, *, disable_streaming: bool) -> Prompted:
    """A call of `/generate`; `disable_streaming` answers each call whole. Raises BadRequest, which names the field."""
    streaming = body.get("stream")
    if streaming is not None and not isinstance(streaming, bool):
        raise BadRequest(f"stream must be true or false, but it is {kind_of(streaming)}.", param="stream")
    prompt, count = _text(body, "prompt"), body.get("n")
    if count is not None and type(count) is not int:
        raise BadRequest(f"n must be an integer, but it is {kind_of(count)}.", param="n")
    if len(prompt) * (count or 1) > _MOST_REPEATED:
        raise BadRequest(
            f"n times the prompt, which each text repeats, must be at most {_MOST_REPEATED} characters.", param="n"
        )
    streams = bool(streaming) and not disable_streaming
    tokens = body.get("max_tokens")
    tokens = _GENERATE_TOKENS if tokens is None else int(tokens)
    if streams and len(prompt) * (count or 1) * tokens > _MOST_STREAMED:
        raise Rejected(
            f"n times the prompt times max_tokens must be at most {_MOST_STREAMED} characters in a stream, as each "
            "object repeats the prompt: ask for a whole answer, or call /v1/completions.",
            param="stream",
        )
    call = {**_others(body, "prompt"), "prompt": prompt, "stream": streams}
    call.pop("echo", None)  # the prompt would be repeated twice
    if not streams:
        call.pop("stream_options", None)
    return Prompted(call, _model(body), streams, prompt)


def from_ask(body: Json, context: Callable[[str], float]) -> Prompted:
    """A call of `/api/v1/ask`, which is always streamed; raises BadRequest, which names the field.

    `context` returns the most tokens that a model takes.
    """
    question = _text(body, "question")
    call = {**_others(body, "question"), "prompt": question, "stream": True}
    return Prompted(call, _model(body), True, None, None if "max_tokens" in call else context)


class GenerateStream:
    """Translates a completion's chunks to `/generate`'s stream: one object with all texts so far per read."""

    head = AnswerHead(200, [], streams=True)
    paced = False
    fingerprint: bytes | None = None

    def __init__(self, prompt: str) -> None:
        self._decoder = sse.Decoder(limit=1024 * 1024)
        self._prompt = prompt
        self._texts: dict[int, list[str]] = {}
        self._new = False

    def feed(self, data: bytes) -> bytes:
        """The object for these bytes; raises UpstreamBroken if they do not hold chunks."""
        try:
            told = b"".join(map(self._take, self._decoder.feed(data)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UpstreamBroken(
                "The model server's stream holds something that is not a completion's chunk."
            ) from error
        if self._new:
            self._new = False
            texts = ["".join(self._texts[index]) for index in sorted(self._texts)]
            told = orjson.dumps({"text": texts}) + b"\0" + told
        return told

    def comment(self, data: bytes) -> bytes:
        """Nothing: the reply's stream is not server-sent events."""
        return b""

    def failed(self, envelope: bytes) -> bytes:
        """An error as the last object."""
        return envelope + b"\0"

    def _take(self, data: bytes) -> bytes:
        """Keep the texts of a chunk; return the bytes to send for any other event."""
        if data == sse.DONE:
            return b""
        chunk = orjson.loads(data)
        if "error" in chunk:
            return self.failed(orjson.dumps(chunk))
        for choice in chunk["choices"]:
            if not isinstance(choice["text"], str):
                raise TypeError(choice)
            self._texts.setdefault(choice["index"], [self._prompt]).append(choice["text"])
            self._new = True
        return b""


def _text(body: Json, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequest(
            f"{name} must be a string that is not empty, but it is {'empty' if value == '' else kind_of(value)}.",
            param=name,
        )
    return value


def _others(body: Json, name: str) -> Json:
    return {field: value for field, value in body.items() if field not in (name, "model") and value is not None}


def _model(body: Json) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest(f"model must be a string, but it is {kind_of(model)}.", param="model")
    return model or None
