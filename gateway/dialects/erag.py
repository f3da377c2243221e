"""Replies, streams and errors as a release of the replaced microservice wrote them; pure functions on values.

What a release got wrong is not repeated: a finish reason is the true one, a status, too.
"""

from __future__ import annotations

from typing import Any, Literal

import orjson

from gateway.dialects.langchain import Flattened
from gateway.dialects.simplified import Simplified
from gateway.dialects.text_stream import Style, TextStream
from gateway.wire import sse

Release = Literal["erag-1.4", "erag-2.1"]

# How its streams look where nobody says otherwise.
STYLES: dict[Release, Style] = {"erag-1.4": "repr", "erag-2.1": "openai"}

_FIELDS: dict[Release, tuple[str, ...]] = {
    "erag-1.4": ("id", "text", "prompt", "streaming", "output_guardrail_params", "data"),
    "erag-2.1": ("id", "text", "prompt", "stream", "output_guardrail_params", "data"),
}


class Released:
    """A simplified request that is answered as a release did."""

    def __init__(self, request: Simplified | Flattened, compat: Release) -> None:
        self.model = request.model
        self.streaming = request.streaming
        self.target = request.target
        self.to_call = request.to_call
        self._request = request
        self._compat = compat

    def to_reply(self, answer: bytes) -> bytes:
        """The whole reply, of that release's fields alone; raises UpstreamBroken."""
        reply = orjson.loads(self._request.to_reply(answer))
        found = {name: reply.get(name) for name in _FIELDS[self._compat]}
        if self._compat == "erag-2.1":
            found["choices"] = list(map(_choice, reply["choices"]))
        return orjson.dumps(found)

    def to_stream(self) -> TextStream | Followed | None:
        """What makes the reply's stream of vLLM's, where that does not go on as it is."""
        data = self._request.echoed["data"]
        return self._request.to_stream() or (Followed(data) if data is not None else None)


class Followed:
    """vLLM's chunks as they are and, after their end, a line of its own with what is cited."""

    head = TextStream.head

    def __init__(self, data: dict[str, Any]) -> None:
        self._sources = b"json: " + orjson.dumps(data) + b"\n\n"

    def feed(self, data: bytes) -> bytes:
        """The same events, and the line after the last one."""
        return data + self._sources if sse.has_end(data, "done") else data

    def failed(self, envelope: bytes) -> bytes:
        """An error as an event, and the end."""
        return sse.encode(envelope) + sse.encode(sse.DONE)


def to_error(answer: bytes) -> bytes:
    """vLLM's error in the words of those releases: `{"detail": …}`."""
    try:
        error = orjson.loads(answer)["error"]
        said = error["message"] if isinstance(error, dict) else error
    except (orjson.JSONDecodeError, LookupError, TypeError):
        said = answer.decode(errors="replace")
    return detail(str(said))


def detail(message: str) -> bytes:
    """An error in the words of those releases."""
    return orjson.dumps({"detail": message})


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    # A completion's has a text, a chat's a message.
    message = choice.get("message") or {"role": "assistant", "content": choice.get("text")}
    said = {"role": "assistant", "content": message.get("content"), "audio": None}
    if calls := message.get("tool_calls"):
        said["tool_calls"] = calls
    return {
        "index": choice.get("index", 0),
        "message": said,
        "finish_reason": choice.get("finish_reason"),
        "metadata": None,
    }
