"""The record of one call, which its observers read: logs, metrics, traces and the page."""

from __future__ import annotations

from typing import Final, Protocol

from gateway.admission.keys import Key
from gateway.pool.upstream_pool import Upstream
from gateway.relay.usage import TOKEN, cached_in, usage_in
from gateway.wire.heads import RequestHead, new_request_id
from gateway.wire.routes import Route

CLIENT_LEFT: Final = 499  # as nginx logs it; never sent


class Trace(Protocol):
    """The ids of a traced request: its trace, and its own span."""

    trace_id: str
    span_id: str


class Record:
    """The state of one call. Observers may hold it for a while after its end, so it keeps nothing that is large.

    Times are the clock's seconds, None for events that have not happened. `form` is `openai`, `simplified`, `generate`
    or `ask`; empty if it is not known. `target` is the path that is sent to the upstream, and `status` the status that
    the client got. `trace` is set once the call is traced. `outcome` is `done`, `client_left`, `refused`,
    `upstream_error`, `drained`, `shortage` (of memory, for data that the client did not read) or `timeout:<which>`; it
    is empty until the end. `address` is the client's, as far as it is known. `alias` is the name by which the model was
    asked for, None if that was its own. `request_id` is the client's id for the call, or a new one. `upstream_id` is
    the id that is sent upstream, which a client cannot choose: vLLM ends calls by their ids. `bytes_in` is the size of
    the request's body, `prompt_bytes` the part of it that counts as text, and `bytes_out` and `events` are the size of
    the answer. `cached_tokens` are the prompt's tokens that vLLM had in its prefix cache, as far as it reports them.
    `error` is the code and the message of an error of the gateway's own, which hold no text of the request.
    """

    __slots__ = (
        "_refused",
        "_request",
        "_text_bytes",
        "_usage",
        "_usage_text",
        "address",
        "alias",
        "bytes_in",
        "bytes_out",
        "cached_tokens",
        "ended_at",
        "error",
        "events",
        "first_byte_at",
        "form",
        "key",
        "model",
        "outcome",
        "prompt_bytes",
        "received_at",
        "request_id",
        "route",
        "sent_at",
        "started_at",
        "status",
        "streaming",
        "target",
        "trace",
        "upstream",
        "upstream_ended_at",
        "upstream_id",
    )

    def __init__(self, route: Route, target: str, head: RequestHead, started_at: float) -> None:
        self.route = route
        self.target = target
        self.trace: Trace | None = None
        self.request_id = head.request_id or new_request_id()
        self.upstream_id = new_request_id() if head.names_itself else self.request_id
        self.form = ""
        self.address = ""
        self.key: Key | None = None
        self.model: str | None = None
        self.alias: str | None = None
        self.upstream: Upstream | None = None
        self.status = 0
        self.streaming = False
        self.outcome = ""
        self.error: tuple[str, str] | None = None
        self.events = 0
        self.bytes_in = 0
        self.prompt_bytes = 0
        self.bytes_out = 0
        self.cached_tokens = 0
        self.started_at = started_at
        self.received_at: float | None = None
        self.sent_at: float | None = None
        self.first_byte_at: float | None = None
        self.upstream_ended_at: float | None = None
        self.ended_at: float | None = None
        self._refused = False  # by the last upstream; a stream that a heartbeat has begun keeps its status
        self._request = head
        self._text_bytes = 0  # of a stream without usage
        self._usage: tuple[int, int] | None = None
        self._usage_text = b""

    @property
    def lines(self) -> bytes:
        """The headers of the request that may be sent to an upstream."""
        return self._request.lines

    @property
    def usage(self) -> tuple[int, int] | None:
        """Prompt and completion tokens, if vLLM has reported them; this also sets `cached_tokens`."""
        if self._usage_text:
            self._usage = usage_in(self._usage_text)
            if b'"cache' in self._usage_text:
                self.cached_tokens = cached_in(self._usage_text)
            self._usage_text = b""
        return self._usage

    @property
    def tokens(self) -> tuple[int, int, bool] | None:
        """Prompt and completion tokens, and whether they are an estimate, as for a stream without usage.

        The estimate is a quarter of the text's bytes; for the answer, at least the number of events that may hold text.
        """
        usage = self.usage if self._usage_text else self._usage
        if usage is not None:
            return *usage, False
        if not self.streaming or not self._took_tokens:
            return None
        without_text = (self.route.body == "chat") + (self.outcome == "done")
        return self.prompt_bytes // TOKEN, max(0, self.events - without_text, self._text_bytes // TOKEN), True

    @property
    def _took_tokens(self) -> bool:
        """Whether vLLM has worked on this call, as far as is known: it was sent and not refused."""
        if self.sent_at is None or self.received_at is None or self._refused:
            return False
        return self.status in (200, CLIENT_LEFT) or self.outcome.startswith("timeout:")
