"""Simplified calls as completions of one text, as the replaced microservices' connector for LangChain made them."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.dialects.simplified import Simplified
from gateway.dialects.streams import ChunkStream, TextStream
from gateway.wire.errors import BadRequest, UpstreamBroken

# As LangChain writes a chat as a string.
_ROLES = {"system": "System", "user": "Human", "assistant": "AI"}


class Flattened:
    """A checked simplified request whose prompt is its messages, one per line."""

    target = "/v1/completions"

    def __init__(self, request: Simplified) -> None:
        """Raises BadRequest if the content of a message is not a text."""
        self.model = request.model
        self.streaming = request.streaming
        self.echoed = request.echoed
        self.citations = request.citations
        self.hides_usage = request.hides_usage
        self._request = request
        self._prompt = "\n".join(map(_line, request.chat["messages"]))

    def to_call(self, model: str) -> bytes:
        """The completion's body; raises BadRequest if orjson cannot write it."""
        others = {name: value for name, value in self._request.chat.items() if name != "messages"}
        try:
            return orjson.dumps({**others, "model": model, "prompt": self._prompt})
        except TypeError:
            raise BadRequest("The request's body is nested too deeply.") from None

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply: vLLM's completion, the text and the echoed fields; raises UpstreamBroken."""
        try:
            completion = orjson.loads(answer)
            text = completion["choices"][0]["text"]
            if not isinstance(text, str):
                raise TypeError(text)
            return orjson.dumps({"text": text, **completion, **self.echoed})
        except (orjson.JSONDecodeError, LookupError, TypeError):
            raise UpstreamBroken("The model server's answer is not a completion.") from None

    def to_texts(self, data: dict[str, Any] | None) -> TextStream | None:
        """The translator from the completion's chunks to texts; None if the reply's stream is in vLLM's own style.

        Empty texts are dropped, as LangChain passes on none.
        """
        if self._request.style == "openai":
            return None
        return TextStream(self._request.style, data, self.citations, lambda choice: choice["text"] or None)

    def to_stream(self) -> TextStream | ChunkStream | None:
        """The translator from the completion's stream to the reply's; None if the stream is relayed unchanged."""
        request = self._request
        if request.style != "openai":
            return self.to_texts(self.echoed["data"])
        if not self.citations and not request.hides_usage:
            return None
        return ChunkStream(self.citations, hides_usage=request.hides_usage, kind="text_completion")


def _line(message: dict[str, Any]) -> str:
    role, content = message["role"], message.get("content")
    if not isinstance(content, str):
        raise BadRequest("messages must hold strings, as this gateway makes one text of them.", param="messages")
    return f"{_ROLES.get(role, role)}: {content}"
