"""vLLM's chunks in, a stream of texts out: the stream styles that are not vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import orjson

from gateway.wire import sse
from gateway.wire.errors import UpstreamBroken
from gateway.wire.heads import AnswerHead

Json = dict[str, Any]

Style = Literal["openai", "repr", "answer_part"]


class TextStream:
    """vLLM's chunks in, a stream of texts out, in a style that is not vLLM's own.

    `repr` is what callers of the replaced releases 1.2 to 1.5 parse: each event is Python's `repr` of a
    piece of text, then comes `[DONE]` and, where the request had `data`, a line of its own with what is
    cited. `answer_part` is vllm-app's: JSON of a type and the text, at last one of type `done`. Text is
    never left out, not even where it shares a chunk with the finish reason; what is no text has no place.
    """

    head = AnswerHead(
        200, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")], streams=True
    )

    def __init__(self, style: Style, data: Json | None, text_of: Callable[[Json], str | None]) -> None:
        """`text_of` takes a choice of a chunk."""
        self._decoder = sse.Decoder(limit=1024 * 1024)
        self._as_repr = style == "repr"
        self._text_of = text_of
        self._sources = b"json: " + orjson.dumps(data) + b"\n\n" if data is not None else b""

    def feed(self, data: bytes) -> bytes:
        """The events for these bytes; raises UpstreamBroken where they hold no chunks."""
        try:
            return b"".join(map(self._event, self._decoder.feed(data)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UpstreamBroken("The model server's stream holds something that is not a chat chunk.") from error

    def failed(self, envelope: bytes) -> bytes:
        """An error as an event, and the end."""
        return self._error(orjson.loads(envelope)) + self._end()

    def _event(self, data: bytes) -> bytes:
        if data == sse.DONE:
            return self._end() + (self._sources if self._as_repr else b"")
        chunk = orjson.loads(data)
        if "error" in chunk:
            return self._error(chunk)
        texts = [self._text_of(choice) for choice in chunk["choices"] if choice["index"] == 0]
        return b"".join(self._piece(text) for text in texts if text is not None)

    def _piece(self, text: str) -> bytes:
        if self._as_repr:
            return sse.encode(repr(text).encode())
        return sse.encode(orjson.dumps({"type": "answer_part", "data": text})) if text else b""

    def _error(self, told: Json) -> bytes:
        if self._as_repr:
            return sse.encode(orjson.dumps(told))
        # A caller that knows no such type may still show its data.
        error = told["error"]
        said = error.get("message") if isinstance(error, dict) else error
        return sse.encode(orjson.dumps({"type": "error", "data": said, **told}))

    def _end(self) -> bytes:
        return sse.encode(sse.DONE if self._as_repr else b'{"type":"done"}')
