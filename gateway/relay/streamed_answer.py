"""A streamed answer: its whole events, unchanged or translated, and the comments that keep it open."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Final

from gateway.dialects.reader import TranslatedStream
from gateway.dialects.streams import EVENTS_HEAD, FINISH, ChunkStream
from gateway.relay.interfaces import Client
from gateway.relay.keyed_record import KeyedRecord
from gateway.wire import sse
from gateway.wire.errors import GatewayError, NotServed, UpstreamRefused
from gateway.wire.heads import AnswerHead

# A comment as vLLM writes it.
HEARTBEAT: Final = b": keep-alive\n\n"
# The head of an answer whose own head has not arrived when a heartbeat is due.
_STREAM: Final = EVENTS_HEAD


class StreamedAnswer(KeyedRecord):
    """A record with the stream of its answer, which an exchange sends by `_start` and its client.

    `_awaited` says that no byte of a stream has arrived, and that its upstream counts it as awaited. `_last` and
    `_before_last` are its last two pieces, which hold its end and usage. `_rewritten` is how many bytes more arrived
    than were sent. `_write_chunk` relays a chunk of whole events unchanged; it is None if the next chunk must be
    inspected. Comments show no progress of the model.
    """

    __slots__ = (
        "_awaited",
        "_before_last",
        "_client",
        "_events",
        "_head",
        "_last",
        "_rewritten",
        "_started",
        "_stream",
        "_write_chunk",
    )

    _awaited: bool
    _before_last: bytes
    _client: Client
    _events: sse.WholeEvents | None
    _head: AnswerHead | None
    _last: bytes
    _rewritten: int
    _started: bool
    _stream: TranslatedStream | None
    _write_chunk: Callable[[bytes], None] | None

    @abstractmethod
    def _start(self) -> None:
        """Send the answer's head."""

    @abstractmethod
    def _choose_body_mode(self, head: AnswerHead, length: bytes | None) -> None:
        """Choose how the body of an answer with this head is sent."""

    @abstractmethod
    def _upstream_failed(self, error: GatewayError) -> None:
        """End with the upstream's fault."""

    @abstractmethod
    def _uses_erag_errors(self) -> bool:
        """Whether the call's errors have a release's form."""

    @abstractmethod
    def _event_of(self, error: GatewayError, tail: bytes) -> bytes:
        """An error as the end of a stream."""

    @abstractmethod
    def _answered(self, *, failed: bool, outcome: str) -> None:
        """The upstream has answered: record whether it failed, and finish."""

    def _whole_events(self, events: sse.WholeEvents, data: bytes) -> bytes:
        """The whole events of this read, without those that are sent on separately as they show no progress.

        These are comments and, of a response, the events that vLLM writes before its engine begins.
        """
        was_cut = events.is_cut
        data = events.feed(data)
        if not (was_cut or events.is_cut):
            data = self._without_comments(data)
        awaits_engine = self.first_byte_at is None and self.route.ends == "responses"
        if awaits_engine and sse.only_announces(data, events.beginning):
            self._before_last, self._last = self._last, data
            self._comment(data)
            data = b""
        elif not data and events.held[:1] not in b":" and not awaits_engine:  # a part of an event has arrived
            self._last_read_at = self._path.time()
            if self.first_byte_at is None:
                self._first_byte(self._last_read_at)
        self._write_chunk = self._chunk_writer() if self._started else None
        return data

    def _chunk_writer(self) -> Callable[[bytes], None] | None:
        """The function that relays a chunk of whole events unchanged; None if the next chunk must be inspected."""
        events, stream = self._events, self._stream
        if events is None or events.unfinished or self.first_byte_at is None:
            return None
        if stream is None:
            return self._client.chunk
        plain = self._client.chunk is not None and isinstance(stream, ChunkStream) and stream.passes
        return self._write_until_finish if plain else None

    def _write_until_finish(self, chunk: bytes) -> None:
        """Relay a chunk of whole events unchanged, unless it holds a finish reason."""
        if FINISH not in chunk:
            assert self._client.chunk is not None
            self._client.chunk(chunk)
            return
        self._write_chunk = None
        data = chunk[chunk.index(b"\n") + 1 : -2]
        self.bytes_out -= len(data)
        if data := self._translate_stream(data):
            self.bytes_out += len(data)
            self._client.body(data)

    def _translate_stream(self, data: bytes) -> bytes:
        assert self._stream is not None
        came = len(data)
        try:
            data = self._stream.feed(data)
        except GatewayError as error:
            self._upstream_failed(error)
            return b""
        self._rewritten += came - len(data)
        if self._write_chunk is not None:
            self._write_chunk = self._chunk_writer()  # the stream may now hold events until the next one
        return data

    def _first_byte(self, now: float) -> None:
        """The first byte of the model's output has arrived."""
        self.first_byte_at = now
        if self.upstream is not None:
            self.upstream.awaited -= self._awaited
        self._awaited = False
        self._write_chunk = self._chunk_writer() if self._started else None  # a comment may have started the answer

    def _beat_if_due(self, now: float) -> None:
        """Write a comment if nothing was received and no comment was sent for the heartbeat's interval."""
        if self._path.limits.heartbeat_interval is None or now < self._next_heartbeat():
            return
        self._commented_at = now
        if self.streaming and self.route.streams and not self._paused and self._streams_comments():
            self._comment(HEARTBEAT)

    def _streams_comments(self) -> bool:
        """Whether a comment may be sent now; if nothing of the answer has arrived, it then begins as a stream.

        This is the price of a heartbeat: the status is 200, and later errors are reported in the stream.
        """
        if self._head is None and not self._started:
            if self._uses_erag_errors() or self.route.body == "generate":
                return False  # clients of these forms know no comments
            self._head = _STREAM
            self.status = _STREAM.status
            self._choose_body_mode(_STREAM, None)
        return self._events is not None and not self._events.is_cut

    def _tell_in_stream(self, refused: UpstreamRefused | NotServed) -> None:
        """End a stream that a heartbeat has begun, after the upstream has refused the call."""
        self.status, self.first_byte_at, self._refused = _STREAM.status, None, True
        event = self._event_of(refused, b"")
        self._answered(failed=not 400 <= refused.status < 500, outcome="refused")
        self._client.body(event)
        self._client.end()

    def _without_comments(self, data: bytes) -> bytes:
        """The whole events without comments, which are sent on separately as they show no progress of the model.

        Comments among other events stay in place if these events are relayed unchanged.
        """
        if data[:1] in b"de" and b"\n:" not in data:
            return data  # vLLM's events begin with `data` or `event`
        parts = sse.split(data)
        told = [part for part in parts if sse.data_of(part) is not None]
        comments = b"".join([part for part in parts if sse.data_of(part) is None])
        if told and (self._stream is None or isinstance(self._stream, ChunkStream)):
            self.events -= comments.count(b"\n\n")
            return data
        self._comment(comments)
        return b"" if self.outcome else b"".join(told)

    def _comment(self, comments: bytes) -> None:
        """Send comments, in the styles that have them."""
        if self._stream is not None:
            comments = self._stream.comment(comments)
        if not comments:
            return
        self._commented_at = self._path.time()
        if not self._started:
            self._start()
        self.bytes_out += len(comments)
        self._client.body(comments)
