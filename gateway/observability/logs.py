"""Log lines: one a request, and those of the program, as JSON or as text."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import deque
from datetime import UTC, datetime
from functools import lru_cache
from queue import SimpleQueue
from typing import Any, Literal

import orjson

from gateway.relay.record import Record

Format = Literal["json", "text"]

# Past this many unwritten lines new ones are dropped and counted: a stuck reader must not eat the memory.
_PENDING = 50_000
# Lines of this long are written together, in seconds.
_TOGETHER = 0.1
_LOST = b'{"level":"WARNING","message":"%d log lines were lost: %b"}'


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own, so that a slow disk or pipe stops no request."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, True)
        self._pending: deque[tuple[bytes, int]] = deque()
        # Each is changed by one thread alone: what was taken and what dropped, and what the lines' own thread did.
        self._taken = 0
        self._dropped = 0
        self._written = 0
        self._failed = 0
        self._dropped_told = 0
        self._failed_told = 0
        self._closing = False
        self._woken = False
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, lines: bytes, count: int = 1) -> None:
        """Write so many lines, the last without its end, soon."""
        if self._taken - self._written >= _PENDING:
            self._dropped += count
            return
        self._taken += count
        self._pending.append((lines, count))
        if not self._woken:
            self._woken = True
            self._wake.put(None)

    def close(self) -> None:
        """Write what is left; wait at most 5 s for it."""
        self._closing = True
        self._wake.put(None)
        self._thread.join(5)

    def _run(self) -> None:
        while not self._closing:
            self._wake.get()
            time.sleep(_TOGETHER)
            self._woken = False
            self._flush()
        self._flush()

    @property
    def lost(self) -> int:
        """How many lines were dropped or could not be written since the start."""
        return self._dropped + self._failed

    def _flush(self) -> None:
        taken = [self._pending.popleft() for _ in range(len(self._pending))]
        lines = [block for block, _ in taken]
        self._written += sum(count for _, count in taken)
        told = self._dropped
        if told > self._dropped_told:
            lines.append(_LOST % (told - self._dropped_told, b"their reader is too slow"))
            self._dropped_told = told
        if lines:
            self._write(b"\n".join([*lines, b""]))

    def _write(self, data: bytes) -> None:
        failed = self._failed - self._failed_told
        if failed:
            data = _LOST % (failed, b"they could not be written") + b"\n" + data
        lines = data.count(b"\n")
        left = data
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            # A full disk or a closed pipe must not end the process: the gateway serves on without its log.
            self._failed += min(left.count(b"\n"), lines - bool(failed))
        if failed and left.count(b"\n") < lines:
            self._failed_told += failed


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _iso(int(record.created * 1000)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # Not orjson, which refuses the lone surrogates of an environment that is not UTF-8.
        return json.dumps(line)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # What an upstream said may stand in a message, and must not start a line of its own.
        message = record.getMessage().replace("\n", "\\n")
        text = f"{_iso(int(record.created * 1000))} {record.levelname:<7} {message}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _Handler(logging.Handler):
    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        self._writer.write(self.format(record).encode(errors="backslashreplace"))


def configure(writer: LineWriter, log_format: Format, log_level: str) -> None:
    """Send every logger of the process through `writer`."""
    handler = _Handler(writer)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.basicConfig(level=log_level, handlers=[handler], force=True)
    # httpx tells of every probe, urllib3 of every batch of spans, uvicorn of every start and stop of its own.
    for name in ("httpx", "httpcore", "urllib3", "uvicorn"):
        logging.getLogger(name).setLevel("WARNING")


class RequestLog:
    """One line a request: never a prompt, a reply or a key."""

    def __init__(self, writer: LineWriter | None, log_format: Format) -> None:
        """`writer` None: no lines."""
        self._writer = writer
        self._log_format = log_format

    def records(self, records: list[Record]) -> None:
        """The lines of data-path requests that have ended."""
        if self._writer is not None:
            # What the wall's clock shows more than the records'.
            ahead = time.time() - time.monotonic()
            # As one piece: thousands of small ones a second would fill megabytes before the thread has its turn.
            lines = [self._request_line(record, ahead) for record in records]
            if lines:
                self._writer.write(b"\n".join(lines), len(lines))
            # Made amid a thousand requests and kept when they are gone, it would keep a megabyte.
            _second.cache_clear()

    def _request_line(self, record: Record, ahead: float) -> bytes:
        started, first, ended = record.started_at, record.first_byte_at, record.ended_at
        tokens, trace = record.tokens, record.trace
        fields = {
            "time": _iso(int((started + ahead) * 1000)),
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
        """The line of a request that is not relayed; `client` is its address, if any, `total` in seconds."""
        if self._writer is None:
            return
        line = self._line(
            {
                "time": _iso(int((time.time() - total) * 1000)),
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
            # Beyond ASCII are characters, too, that a terminal obeys.
            return line if line.isascii() else json.dumps(fields, separators=(",", ":")).encode()
        return _as_text(fields).encode(errors="backslashreplace")


def _as_text(fields: dict[str, Any]) -> str:
    """`time status method path`, then `name=value` for what is known."""
    head = f"{fields.pop('time')} {fields.pop('status')} {fields.pop('method')} {_word(fields.pop('path'))}"
    return " ".join([head, *(f"{name}={_word(value)}" for name, value in fields.items() if value is not None)])


def _word(value: Any) -> str:
    """As it is where that is plain, else quoted and escaped, so that nothing can forge a field or a line."""
    text = str(value)[:200]
    return text if re.fullmatch(r"[!#-&(-<>-\[\]-~]+", text) else json.dumps(text)


def _in_microseconds(seconds: float) -> float:
    return int(seconds * 1e6) / 1e6


def _iso(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{_second(seconds)}.{rest:03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    # Where so many lines are written that their cost matters, most begin in the same second.
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:-6]
