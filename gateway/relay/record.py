"""What observers read of one call: logs, metrics, traces and the page."""

from __future__ import annotations

from typing import Protocol

from gateway.pool.keys import Key
from gateway.pool.upstream_pool import Upstream
from gateway.relay.usage import usage_in
from gateway.wire.heads import RequestHead, new_request_id
from gateway.wire.routes import Route

CLIENT_LEFT = 499  # as nginx logs it; never sent


class Trace(Protocol):
    """What names a request where it is traced: its trace, and the span that is its own."""

    trace_id: str
    span_id: str


class Record:
    """One call, as far as it has come. Observers may hold it for a while after its end: it keeps nothing that is large.

    Times are the clock's seconds, None for what has not happened. `form` is `openai`, `simplified`, `generate` or
    `ask`; empty where it is not known. `target` is what the upstream is asked for, `status` what the client got.
    `trace` is there once something traces it. `outcome` is `done`, `client_left`, `refused`, `upstream_error`,
    `drained` or `timeout:<which>`, and empty until the end. `bytes_out` and `events` are those of the answer.
    """

    __slots__ = (
        "_request",
        "_usage",
        "_usage_text",
        "bytes_out",
        "ended_at",
        "events",
        "first_byte_at",
        "form",
        "key",
        "model",
        "outcome",
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
    )

    def __init__(self, route: Route, target: str, head: RequestHead, started_at: float) -> None:
        self.route = route
        self.target = target
        self.trace: Trace | None = None
        self.request_id = head.request_id or new_request_id()
        self.form = ""
        self.key: Key | None = None
        self.model: str | None = None
        self.upstream: Upstream | None = None
        self.status = 0
        self.streaming = False
        self.outcome = ""
        self.events = 0
        self.bytes_out = 0
        self.started_at = started_at
        self.received_at: float | None = None
        self.sent_at: float | None = None
        self.first_byte_at: float | None = None
        self.upstream_ended_at: float | None = None
        self.ended_at: float | None = None
        self._request = head
        self._usage: tuple[int, int] | None = None
        self._usage_text = b""

    @property
    def lines(self) -> bytes:
        """The headers of the request that may go to an upstream."""
        return self._request.lines

    @property
    def usage(self) -> tuple[int, int] | None:
        """Prompt and completion tokens, where vLLM has reported them."""
        if self._usage_text:
            self._usage = usage_in(self._usage_text)
            self._usage_text = b""
        return self._usage
