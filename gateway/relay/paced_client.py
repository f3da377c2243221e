"""A client that gets a stream's events one by one, for readers that take what one read brings for one event."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from gateway.relay.interfaces import Client
from gateway.wire import sse
from gateway.wire.heads import AnswerHead

# Between two events, in seconds: readers on a busy machine still take each for itself, and tokens come more slowly.
_APART = 0.001
# So many bytes wait at most; a stream that comes faster than that is no model's, and goes on as it comes.
_MOST = 64 * 1024


class PacedClient:
    """Writes each event for itself, some time after the one before; the end waits behind them."""

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
        """All of the answer at once."""
        self._client.whole(head, content, request_id)

    def abort(self) -> None:
        """The answer breaks off."""
        self._events.clear()
        self._client.abort()

    def is_gone(self) -> bool:
        """Whether nothing can reach it any more."""
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
