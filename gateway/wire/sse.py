"""Server-sent events: finds their ends, reads their data and writes them.

The grammar is the HTML standard's (section 9.2, "Server-sent events"): lines end with CR LF, LF or
CR; an empty line ends an event; a colon at the start makes a comment; one space after `data:` is
not part of the data; several data lines are joined with a line feed.
"""

from __future__ import annotations

import itertools
import re
from typing import Final, Literal

# How a stream ends: with `[DONE]`, like OpenAI's Responses, or like Anthropic's Messages.
Ends = Literal["done", "responses", "messages"]

DONE: Final = b"[DONE]"
# Each kind of stream ends with one of these events; no line inside JSON can begin like them.
_END_EVENT: Final = {
    "done": re.compile(rb"(?:^|[\r\n])data: ?\[DONE\](?:[\r\n]|$)"),
    "responses": re.compile(rb"(?:^|[\r\n])event: ?(?:response\.(?:completed|failed|incomplete)|error)(?:[\r\n]|$)"),
    "messages": re.compile(rb"(?:^|[\r\n])event: ?(?:message_stop|error)(?:[\r\n]|$)"),
}
END_NAMES: Final = {"done": "[DONE]", "responses": "response.completed", "messages": "message_stop"}
_ERROR_EVENT: Final = re.compile(rb'(?:^|[\r\n])(?:data: ?\{"error"|event: ?(?:error|response\.failed)[\r\n])')
# Events that vLLM writes before its engine has begun the response: they show no progress of the model.
_ANNOUNCED: Final = re.compile(rb"response\.(?:created|queued|in_progress)")
_EVENT_NAME: Final = re.compile(rb"(?:^|[\r\n])event: ?([^\r\n]*)")
_SEQUENCE: Final = re.compile(rb'"sequence_number": ?(\d{1,9})\b')

_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
_EVENT_END: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_BLANK: Final = (b"\n\n", b"\n\r\n", b"\r\r")
# Bytes that are kept of an event that passes in pieces: its first line holds its name.
_BEGINNING: Final = 64


def end_of_last_event(data: bytes) -> int:
    """How many bytes of `data` belong to whole events; 0 if no event has ended.

    A blank line is an end of line right after an end of line. Data that ends in CR LF CR LF also
    ends in LF CR LF.
    """
    if data.endswith(b"\n\n"):
        return len(data)
    return max((at + len(blank) for blank in _BLANK if (at := data.rfind(blank)) >= 0), default=0)


def has_end(data: bytes, ends: Ends) -> bool:
    """Whether `data` holds the event that ends a stream."""
    return _END_EVENT[ends].search(data) is not None


def find_end(data: bytes, ends: Ends) -> int:
    """The offset in `data` of the event that ends a stream, -1 if there is none."""
    found = _END_EVENT[ends].search(data)
    return -1 if found is None else found.start() + (found[0][:1] in b"\r\n")


def split(data: bytes) -> list[bytes]:
    """The whole events in `data`, each with its blank line, and the remaining bytes."""
    ends = [0, *(found.end() for found in _EVENT_END.finditer(data))]
    events = [data[begin:end] for begin, end in itertools.pairwise(ends)]
    return [*events, data[ends[-1] :]] if ends[-1] < len(data) else events


def last_events(data: bytes, size: int) -> bytes:
    """The fewest whole events at the end of `data` that have at least `size` bytes together."""
    at = data.rfind(b"\n\n", 0, max(0, len(data) - size))
    return data[at + 2 :] if at >= 0 else data


def has_error(data: bytes) -> bool:
    """Whether `data` holds an error event."""
    return _ERROR_EVENT.search(data) is not None


def only_announces(data: bytes, beginning: bytes) -> bool:
    """Whether whole events, or a piece of one with this `beginning`, only announce that the call was accepted."""
    names = _EVENT_NAME.findall(data) or _EVENT_NAME.findall(beginning)
    return bool(names) and all(map(_ANNOUNCED.fullmatch, names))


def next_sequence_number(data: bytes) -> int:
    """The sequence number of the event after those in `data`, in a stream of Responses."""
    found = _SEQUENCE.findall(data)
    return int(found[-1]) + 1 if found else 0


def data_of(event: bytes) -> bytes | None:
    """The data of one whole event; None if it has none (a comment, an empty event)."""
    lines = []
    for line in _LINE_END.split(event):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines) if lines else None


class WholeEvents:
    """Passes whole events and holds back the beginning of the next one, however the bytes were split.

    An event is held back in `held` until its end, up to `limit` bytes. A larger event passes in pieces: `is_cut` is
    true until it ends, and `beginning` holds its first bytes. `unfinished` is true in both cases.
    """

    __slots__ = ("_limit", "beginning", "held", "is_cut", "unfinished")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = b""
        self.is_cut = False
        self.beginning = b""
        self.unfinished = False

    def feed(self, data: bytes) -> bytes:
        """The bytes to pass on now: whole events, or a piece of an event that is too large."""
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
    """Takes bytes and returns the data of each whole event, however the bytes were split.

    `limit` is the largest event in bytes; `feed` raises ValueError for a larger one.
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
