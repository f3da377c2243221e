"""Server-sent events: where they end, what they carry, how they are written.

The grammar is the HTML standard's (section 9.2, "Server-sent events"): lines end with CR LF, LF or
CR; an empty line ends an event; a colon at the start makes a comment; one space after `data:` is
not part of the data; several data lines are joined with a line feed.
"""

from __future__ import annotations

import itertools
import re
from typing import Final, Literal

# How a stream ends: by `[DONE]`, as OpenAI's Responses do, or as Anthropic's Messages do.
Ends = Literal["done", "responses", "messages"]

DONE: Final = b"[DONE]"
# Each ends with one of these events; inside JSON a line cannot begin so.
_END_EVENT: Final = {
    "done": re.compile(rb"(?:^|[\r\n])data: ?\[DONE\](?:[\r\n]|$)"),
    "responses": re.compile(rb"(?:^|[\r\n])event: ?(?:response\.(?:completed|failed|incomplete)|error)(?:[\r\n]|$)"),
    "messages": re.compile(rb"(?:^|[\r\n])event: ?(?:message_stop|error)(?:[\r\n]|$)"),
}
END_NAMES: Final = {"done": "[DONE]", "responses": "response.completed", "messages": "message_stop"}
_ERROR_EVENT: Final = re.compile(rb'(?:^|[\r\n])(?:data: ?\{"error"|event: ?(?:error|response\.failed)[\r\n])')
# What vLLM writes of a response before its engine has begun: no sign of the model.
_ANNOUNCED: Final = re.compile(rb"response\.(?:created|queued|in_progress)")
_EVENT_NAME: Final = re.compile(rb"(?:^|[\r\n])event: ?([^\r\n]*)")
_SEQUENCE: Final = re.compile(rb'"sequence_number": ?(\d{1,9})\b')

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_EVENT_END: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_BLANK: Final = (b"\n\n", b"\n\r\n", b"\r\r")
# What is kept of an event that passes in pieces: its first line names it.
_BEGINNING: Final = 64


def end_of_last_event(data: bytes) -> int:
    """How many bytes of `data` belong to whole events; 0 where none has ended.

    A blank line is an end of line right after an end of line; what ends in CR LF CR LF ends in
    LF CR LF, too.
    """
    if data.endswith(b"\n\n"):
        return len(data)
    return max((at + len(blank) for blank in _BLANK if (at := data.rfind(blank)) >= 0), default=0)


def has_end(data: bytes, ends: Ends) -> bool:
    """Whether the event that ends a stream is in `data`."""
    return _END_EVENT[ends].search(data) is not None


def find_end(data: bytes, ends: Ends) -> int:
    """Where the event that ends a stream begins in `data`, -1 where it is not there."""
    found = _END_EVENT[ends].search(data)
    return -1 if found is None else found.start() + (found[0][:1] in b"\r\n")


def split(data: bytes) -> list[bytes]:
    """The whole events in `data`, each with its blank line, and what is left."""
    ends = [0, *(found.end() for found in _EVENT_END.finditer(data))]
    events = [data[begin:end] for begin, end in itertools.pairwise(ends)]
    return [*events, data[ends[-1] :]] if ends[-1] < len(data) else events


def last_events(data: bytes, size: int) -> bytes:
    """The whole events at the end of `data`, the fewest that have so many bytes together."""
    at = data.rfind(b"\n\n", 0, max(0, len(data) - size))
    return data[at + 2 :] if at >= 0 else data


def has_error(data: bytes) -> bool:
    """Whether an event that tells of an error is in `data`."""
    return _ERROR_EVENT.search(data) is not None


def only_announces(data: bytes, beginning: bytes) -> bool:
    """Whether a response's whole events, or a piece of one with this `beginning`, only say that the call was taken."""
    names = _EVENT_NAME.findall(data) or _EVENT_NAME.findall(beginning)
    return bool(names) and all(map(_ANNOUNCED.fullmatch, names))


def next_sequence_number(data: bytes) -> int:
    """What the event after those in `data` is numbered, as those of Responses are."""
    found = _SEQUENCE.findall(data)
    return int(found[-1]) + 1 if found else 0


def data_of(event: bytes) -> bytes | None:
    """The data of one whole event; None where it has none (a comment, an empty event)."""
    lines = []
    for line in _LINE_END.split(event):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None


class WholeEvents:
    """Whole events pass and the beginning of the next one waits, however the bytes were split.

    An event is held back until its end, up to `limit` bytes in `held`. A larger one passes in pieces: `is_cut` is true
    until it ends, and `beginning` is what it began with. `unfinished` is true while either is so.
    """

    __slots__ = ("_limit", "beginning", "held", "is_cut", "unfinished")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = b""
        self.is_cut = False
        self.beginning = b""
        self.unfinished = False

    def feed(self, data: bytes) -> bytes:
        """The whole events, or the piece of one that is too large, that can go on now."""
        if self.held:
            data = self.held + data
            self.held = b""
        end = end_of_last_event(data)
        if len(data) - end > self._limit:
            if end or not self.is_cut:
                self.beginning = data[end : end + _BEGINNING]
            self.is_cut = self.unfinished = True
            return data
        self.held = data[end:]
        self.is_cut = self.is_cut and not end
        self.unfinished = self.is_cut or bool(self.held)
        return data[:end]


class Decoder:
    """Bytes in, the data of each whole event out, however the bytes were split.

    `limit` is the largest event in bytes; `feed` raises ValueError past it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._events = WholeEvents(limit)

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that end in these bytes."""
        whole = self._events.feed(data)
        if self._events.is_cut:
            raise ValueError(f"an event is larger than {self._limit} bytes")
        return [found for event in _EVENT_END.split(whole) if (found := data_of(event)) is not None]


def encode(data: bytes) -> bytes:
    """One event; `data` has no line ends."""
    return b"data: " + data + b"\n\n"
