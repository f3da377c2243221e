"""Translates vLLM's chunks to the reply's stream: to texts, or to chunks with one removed or one added."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any, Final, Literal

import orjson

from gateway.wire import sse
from gateway.wire.errors import UpstreamBroken
from gateway.wire.heads import AnswerHead

Json = dict[str, Any]

Style = Literal["openai", "repr", "answer_part"]


# The largest event that is read, in bytes.
_LARGEST: Final = 1024 * 1024
# These cannot match inside a JSON string, in which each quote is escaped.
FINISH: Final = b'"finish_reason":"'
_USAGE: Final = b'"usage":{'
_USAGE_CHUNK: Final = re.compile(rb'"choices":\[\],.*"usage":\{')
_FINGERPRINT: Final = re.compile(rb'"system_fingerprint":("(?:[^"\\]|\\.)*")')


# The head of a stream that the gateway writes itself.
EVENTS_HEAD: Final = AnswerHead(
    200, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")], streams=True
)


class TextStream:
    """Translates vLLM's chunks to a stream of texts, in a style that is not vLLM's own.

    Clients of the replaced releases 1.2 to 1.5 parse `repr`: each event is Python's `repr` of a piece of text, followed
    by `[DONE]` and, if the request had `data`, a line of its own with it. `answer_part` is the style of vllm-app: JSON
    objects of a type and the text, then one of type `citations` if there are any, and a last one of type `done`. Text
    is never dropped, even if it shares a chunk with the finish reason. Anything that is not text is dropped.
    """

    paced = False
    fingerprint: bytes | None = None

    def __init__(
        self, style: Style, data: Json | None, citations: list[Json], text_of: Callable[[Json], str | None]
    ) -> None:
        """`text_of` returns the text of a chunk's choice."""
        self.head = EVENTS_HEAD
        self._decoder = sse.Decoder(_LARGEST)
        self._as_repr = style == "repr"
        self._text_of = text_of
        self._before_end = self._after_end = b""
        if self._as_repr and data is not None:
            self._after_end = b"json: " + orjson.dumps(data) + b"\n\n"
        elif not self._as_repr and citations:
            cited = {"type": "citations", "data": {"reranked_docs": citations}}
            self._before_end = sse.encode(orjson.dumps(cited))

    def feed(self, data: bytes) -> bytes:
        """The events for these bytes; raises UpstreamBroken if they do not hold chunks."""
        try:
            return b"".join(map(self._event, self._decoder.feed(data)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UpstreamBroken("The model server's stream holds something that is not a chat chunk.") from error

    def comment(self, data: bytes) -> bytes:
        """The comments unchanged."""
        return data

    def failed(self, envelope: bytes) -> bytes:
        """An error as an event, and the end."""
        return self._error(orjson.loads(envelope)) + self._end()

    def _event(self, data: bytes) -> bytes:
        if data == sse.DONE:
            return self._before_end + self._end() + self._after_end
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
        # A client that does not know the type `error` may still show its data.
        error = told["error"]
        said = error.get("message") if isinstance(error, dict) else error
        return sse.encode(orjson.dumps({"type": "error", "data": said, **told}))

    def _end(self) -> bytes:
        return sse.encode(sse.DONE if self._as_repr else b'{"type":"done"}')


class ChunkStream:
    """Relays vLLM's chunks. Removes the usage chunk if the client did not ask for it; adds a chunk with the citations.

    If vLLM is asked for usage, it writes `system_fingerprint` into the usage chunk, otherwise into each chunk with a
    finish reason. So a chunk with a finish reason is held until the next event, which usually follows at once, and gets
    the fingerprint back. With several choices, all but the last end before the usage chunk comes. Then `fingerprint`,
    with its quotes, is taken from another answer of this server; if it is not known, the chunks after such an end are
    held, too.

    With `--enable-force-include-usage` vLLM sends usage to every client in every chunk: then nothing is held back.
    """

    paced = False

    def __init__(self, citations: list[Json], *, hides_usage: bool, kind: str = "chat.completion.chunk") -> None:
        """`kind` is the `object` of the added chunk if no chunk of vLLM's has come."""
        self.head = EVENTS_HEAD
        self.hides_usage = hides_usage
        self.fingerprint: bytes | None = None
        self._citations = citations
        self._first: Json = {"id": "", "object": kind, "created": 0, "model": ""}
        self._begun = False
        self._held: list[bytes] = []

    @property
    def passes(self) -> bool:
        """Whether events without a finish reason are relayed unchanged."""
        return not self._citations and not self._held

    def feed(self, data: bytes) -> bytes:
        """The events to send for these whole events."""
        if self._citations and not self._begun:
            self._begin(data)
        if self.hides_usage and (self._held or FINISH in data or _USAGE_CHUNK.search(data)):
            data = b"".join(map(self._event, sse.split(data)))
        return self._with_citations(data) if self._citations else data

    def comment(self, data: bytes) -> bytes:
        """The comments unchanged; held behind the held events, if any."""
        if not self._held:
            return data
        self._held.append(data)
        return b""

    def failed(self, envelope: bytes) -> bytes:
        """The held events, the error as an event, and the end."""
        return self._release(None) + sse.encode(envelope) + sse.encode(sse.DONE)

    def _event(self, event: bytes) -> bytes:
        """The events to send now that `event` has come."""
        if not self.hides_usage:
            return event
        if _USAGE_CHUNK.search(event):
            found = _FINGERPRINT.search(event)
            self.fingerprint = found[1] if found else None
            return self._release(self.fingerprint)
        if not self._held:
            if FINISH in event and _USAGE in event:
                self.hides_usage = False
            if not self.hides_usage or FINISH not in event:
                return event
            self._held.append(event)
            return b""
        if sse.has_end(event, "done") or sse.has_error(event):
            return self._release(None) + event  # the stream ended without a usage chunk
        if self.fingerprint is not None:
            return self._release(self.fingerprint) + self._event(event)
        self._held.append(event)
        return self._release(None) if sum(map(len, self._held)) > _LARGEST else b""

    def _release(self, fingerprint: bytes | None) -> bytes:
        events, self._held = self._held, []
        if fingerprint is None:
            return b"".join(events)
        field = b',"system_fingerprint":' + fingerprint
        return b"".join(_appended(event, field) if FINISH in event else event for event in events)

    def _begin(self, data: bytes) -> None:
        """Take from the first chunk the fields that all chunks share."""
        self._begun = True
        with contextlib.suppress(ValueError, AttributeError):
            chunk = orjson.loads(next(filter(None, map(sse.data_of, sse.split(data))), b""))
            self._first = {name: chunk.get(name, default) for name, default in self._first.items()}

    def _with_citations(self, data: bytes) -> bytes:
        end = sse.find_end(data, "done")
        if end < 0:
            return data
        chunk = {**self._first, "choices": [], "data": {"reranked_docs": self._citations}}
        return data[:end] + sse.encode(orjson.dumps(chunk)) + data[end:]


def _appended(event: bytes, field: bytes) -> bytes:
    """The event with one more field at the end of its object."""
    end = event.rindex(b"}")
    return event[:end] + field + event[end:]
