"""The log line of each request, as JSON or text."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import orjson

from gateway.relay.record import Record

Format = Literal["json", "text"]


class Lines(Protocol):
    """The destination of log lines."""

    def write(self, lines: bytes, count: int = 1) -> None:
        """Queue `count` lines for writing; the last has no newline."""


class RequestLog:
    """Logs one line per request: never a prompt, a reply or a key."""

    def __init__(self, writer: Lines | None, log_format: Format) -> None:
        """With `writer` None no lines are logged."""
        self._writer = writer
        self._log_format = log_format

    def records(self, records: list[Record]) -> None:
        """Log data-path requests that have ended."""
        if self._writer is not None:
            # The offset from the records' monotonic clock to the wall clock.
            ahead = time.time() - time.monotonic()
            # Written as one block: thousands of small blocks a second would fill megabytes before the thread runs.
            lines = []
            # Most records of a batch begin in the same second, so its text is cached.
            second, text = -1, ""
            for record in records:
                seconds, rest = divmod(int((record.started_at + ahead) * 1000), 1000)
                if seconds != second:
                    second, text = seconds, _second(seconds)
                lines.append(self._request_line(record, f"{text}.{_three_digits(rest)}Z"))
            if lines:
                self._writer.write(b"\n".join(lines), len(lines))

    def _request_line(self, record: Record, began: str) -> bytes:
        started, first, ended = record.started_at, record.first_byte_at, record.ended_at
        tokens, trace = record.tokens, record.trace
        fields = {
            "time": began,
            "request_id": record.request_id,
            "upstream_request_id": None if record.sent_at is None else record.upstream_id,
            "method": record.route.method,
            "path": record.route.path,
            "client": record.address or None,
            "key": record.key.name if record.key else None,
            "form": record.form or None,
            "model": record.model and record.model[:200],
            "upstream": record.upstream.url if record.upstream else None,
            "status": record.status,
            "first_token_s": None if first is None else _in_microseconds(first - started),
            "total_s": _in_microseconds((ended or started) - started),
            "prompt_tokens": tokens[0] if tokens else None,
            "completion_tokens": tokens[1] if tokens else None,
            "tokens_estimated": tokens[2] if tokens else None,
            "bytes": record.bytes_out,
            "outcome": record.outcome,
        }
        if record.cached_tokens:
            fields["cached_tokens"] = record.cached_tokens
        if record.alias is not None:
            fields["alias"] = record.alias[:200]
        if trace is not None:
            fields["trace_id"], fields["span_id"] = trace.trace_id, trace.span_id
        return self._line(fields)

    def other(self, request_id: str, method: str, path: str, client: str, status: int, total: float) -> None:
        """Log a request that is not relayed; `client` is its address, if any, and `total` is in seconds."""
        if self._writer is None:
            return
        line = self._line(
            {
                "time": iso(int((time.time() - total) * 1000)),
                "request_id": request_id,
                "method": method,
                "path": path,
                "client": client or None,
                "status": status,
                "total_s": _in_microseconds(total),
                "outcome": "done",
            }
        )
        self._writer.write(line)

    def _line(self, fields: dict[str, Any]) -> bytes:
        if self._log_format == "json":
            line = orjson.dumps(fields)
            # Non-ASCII text is escaped: it may hold control characters that a terminal obeys.
            return line if line.isascii() else json.dumps(fields, separators=(",", ":")).encode()
        return _as_text(fields).encode(errors="backslashreplace")


def _as_text(fields: dict[str, Any]) -> str:
    """`time status method path`, then `name=value` for each field that is not None."""
    head = f"{fields.pop('time')} {fields.pop('status')} {fields.pop('method')} {_word(fields.pop('path'))}"
    return " ".join([head, *(f"{name}={_word(value)}" for name, value in fields.items() if value is not None)])


def _word(value: Any) -> str:
    """The text unchanged if it is plain, else quoted and escaped, so that no value can forge a field or a line."""
    text = str(value)[:200]
    return text if re.fullmatch(r"[!#-&(-<>-\[\]-~]+", text) else json.dumps(text)


def _in_microseconds(seconds: float) -> float:
    return int(seconds * 1e6) / 1e6


def iso(milliseconds: int) -> str:
    """Format milliseconds since 1970 as ISO 8601 in UTC."""
    seconds, rest = divmod(milliseconds, 1000)
    return f"{_second(seconds)}.{_three_digits(rest)}Z"


def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:-6]


def _three_digits(number: int) -> str:
    return str(1000 + number)[1:]
