"""A client that is sent a stream's events one by one, for readers that take the data of one read for one event."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from gateway.relay.interfaces import Client
from gateway.wire import sse
from gateway.wire.heads import AnswerHead

# Seconds between two events: readers on a busy machine still read each event alone, and tokens arrive more slowly.
_APART = 0.001
# The most bytes that wait. A stream faster than that is not a model's, and is sent as it arrives.
_MOST = 64 * 1024


class PacedClient:
    """Writes each event alone, some time after the event before; the end of the answer waits behind the events."""

    chunk: Callable[[bytes], None] | None = None

    def __init__(self, client: Client, call_later: Callable[[float, Callable[[], None]], object]) -> None:
        self.address = client.address
        self.owner = client.owner
        self._client = client
        self._call_later = call_later
        self._events: deque[bytes] = deque()
        self._size = 0
        self._waits = False
        self._ended = False

    def start(self, head: AnswerHead, length: bytes | None, request_id: str) -> None:
        """The answer's head."""
        self._client.start(head, length, request_id)

    def body(self, data: bytes) -> None:
        """Whole events."""
        self._events.extend(sse.split(data))
        self._size += len(data)
        while self._size > _MOST:
            self._write()
        if not self._waits:
            self._next()

    def end(self) -> None:
        """The answer is complete."""
        self._ended = True
        if not self._events:
            self._client.end()

    def whole(self, head: AnswerHead, content: bytes, request_id: str) -> None:
        """The whole answer at once."""
        self._client.whole(head, content, request_id)

    def abort(self) -> None:
        """The answer is cut short."""
        self._events.clear()
        self._client.abort()

    def is_gone(self) -> bool:
        """Whether nothing can reach the client any more."""
        return self._client.is_gone()

    def _write(self) -> None:
        event = self._events.popleft()
        self._size -= len(event)
        self._client.body(event)

    def _next(self) -> None:
        self._waits = False
        if not self._events or self._client.is_gone():
            return
        self._write()
        if self._events or not self._ended:
            self._waits = True
            self._call_later(_APART, self._next)
        else:
            self._client.end()
