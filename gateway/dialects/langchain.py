"""Simplified calls as completions of one text, as the replaced microservices' connector for LangChain made them."""

from __future__ import annotations

from typing import Any

import orjson

from gateway.dialects.simplified import Simplified
from gateway.dialects.text_stream import TextStream
from gateway.wire.errors import BadRequest, UpstreamBroken

# As LangChain writes a chat as a string.
_ROLES = {"system": "System", "user": "Human", "assistant": "AI"}


class Flattened:
    """A simplified request that has been checked, its messages one below the other as its prompt."""

    target = "/v1/completions"

    def __init__(self, request: Simplified) -> None:
        """Raises BadRequest where a message is no text."""
        self.model = request.model
        self.streaming = request.streaming
        self.echoed = request.echoed
        self._request = request
        self._prompt = "\n".join(map(_line, request.chat["messages"]))

    def to_call(self, model: str) -> bytes:
        """The completion's body; raises BadRequest for what cannot be written."""
        others = {name: value for name, value in self._request.chat.items() if name != "messages"}
        try:
            return orjson.dumps({**others, "model": model, "prompt": self._prompt})
        except TypeError:
            raise BadRequest("The request's body is nested too deeply.") from None

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply: vLLM's completion and, around it, the text and what was asked; raises UpstreamBroken."""
        try:
            completion = orjson.loads(answer)
            text = completion["choices"][0]["text"]
            if not isinstance(text, str):
                raise TypeError(text)
            return orjson.dumps({"text": text, **completion, **self.echoed})
        except (orjson.JSONDecodeError, LookupError, TypeError):
            raise UpstreamBroken("The model server's answer is not a completion.") from None

    def to_stream(self) -> TextStream | None:
        """What makes the reply's stream of the completion's, where that is not in vLLM's own style."""
        if self._request.style == "openai":
            return None
        return TextStream(self._request.style, self.echoed["data"], lambda choice: choice["text"])


def _line(message: dict[str, Any]) -> str:
    role, content = message["role"], message.get("content")
    if not isinstance(content, str):
        raise BadRequest("messages must hold strings, as this gateway makes one text of them.", param="messages")
    return f"{_ROLES.get(role, role)}: {content}"
