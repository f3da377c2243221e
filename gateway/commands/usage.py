"""The command `usage`: sums the calls in a gateway's log, by day, key and model."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

STDIN = "-"
_GZIP = b"\x1f\x8b"
_NOBODY = "-"
_COLUMNS = (
    *("day", "key", "model", "calls", "calls_without_tokens"),
    *("prompt_tokens", "completion_tokens", "estimated_tokens"),
)
_WORD = r'(?:"(?:[^"\\]|\\.)*"|\S+)'
# Matches anywhere in a line, because Compose and Kubernetes put prefixes and timestamps before it.
_TEXT = re.compile(rf"(\d{{4}}-\d\d-\d\dT[\d:]{{8}}\.\d{{3}}Z) (\d{{3}}) (\S+) {_WORD}((?: \w+={_WORD})*)$")
_FIELD = re.compile(rf" (\w+)=({_WORD})")
_PROGRAMS_TEXT = re.compile(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
# A spreadsheet takes a cell that begins so for a formula, and a client chooses the model's name.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class UsageError(Exception):
    """There is nothing to sum; the text is a sentence that says why."""


class _Group(NamedTuple):
    day: str
    key: str
    model: str


@dataclass(slots=True)
class _Sum:
    calls: int = 0
    untold: int = 0
    prompt: int = 0
    completion: int = 0
    estimated: int = 0

    def add(self, prompt: int | None, completion: int | None, *, estimated: bool) -> None:
        self.calls += 1
        if prompt is None or completion is None:
            self.untold += 1
            return
        self.prompt += prompt
        self.completion += completion
        self.estimated += prompt + completion if estimated else 0

    def numbers(self) -> tuple[int, ...]:
        return self.calls, self.untold, self.prompt, self.completion, self.estimated


@dataclass
class Usage:
    """The sums of the logs; `unread` counts lines that no gateway wrote, and `first` is the place of the first."""

    sums: dict[_Group, _Sum] = field(default_factory=dict)
    unread: int = 0
    first: str = ""

    def take(self, line: str, number: int, log: str) -> None:
        """Add a line of a log to the sums; `number` is the line's number in the log."""
        try:
            call = _call(line)
        except (ValueError, LookupError, TypeError):
            self.unread += 1
            self.first = self.first or f"line {number} of {'standard input' if log == STDIN else log}"
            return
        if call is not None:
            group = _Group(call["time"][:10], call.get("key") or _NOBODY, call.get("model") or _NOBODY)
            sums = self.sums.setdefault(group, _Sum())
            tokens = call.get("prompt_tokens"), call.get("completion_tokens")
            sums.add(*tokens, estimated=bool(call.get("tokens_estimated")))

    def rows(self) -> Iterator[tuple[str | int, ...]]:
        """The sums by day, key and model, in the order of `_COLUMNS`."""
        for group in sorted(self.sums):
            yield (*group, *self.sums[group].numbers())

    def notes(self) -> Iterator[str]:
        """Remarks on the sums, one sentence each."""
        if self.unread:
            lines = "1 line is no line" if self.unread == 1 else f"{self.unread} lines are no lines"
            yield f"{lines} of a gateway's log, or cut: the first is {self.first}."
        if all(group.key == _NOBODY for group in self.sums):
            yield "No call names a key, as the gateway had none: set GATEWAY_API_KEYS_FILE to tell callers apart."
        if all(sums.untold == sums.calls for sums in self.sums.values()):
            yield "No call tells its tokens: they failed, or the model servers report no usage."


def read(logs: Sequence[str]) -> Usage:
    """Sum these logs, plain or gzip; `-` is standard input. Raises UsageError."""
    usage = Usage()
    for log in logs:
        with _opened(log) as lines:
            for number, line in enumerate(lines, 1):
                usage.take(line.decode(errors="replace"), number, log)
    if not usage.sums:
        raise UsageError(
            f"There is no call in {', '.join(logs)}, of which a gateway logs each at GATEWAY_LOG_LEVEL=INFO: "
            f"{usage.unread} lines are none of its log's."
        )
    return usage


def as_csv(usage: Usage) -> str:
    """The sums as CSV, with the names of the columns first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([_no_formula(cell) for cell in row] for row in usage.rows())
    return text.getvalue()


def as_table(usage: Usage) -> Iterator[str]:
    """The sums as a text table, with the totals at the end."""
    rows = [_COLUMNS, *usage.rows()]
    totals = [sum(column) for column in zip(*(sums.numbers() for sums in usage.sums.values()), strict=True)]
    cells = [[_shown(cell) for cell in row] for row in (*rows, ("all", "", "", *totals))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        names = [word.ljust(width) for word, width in zip(row[:3], widths[:3], strict=True)]
        numbers = [word.rjust(width) for word, width in zip(row[3:], widths[3:], strict=True)]
        yield "  ".join([*names, *numbers])


def _call(line: str) -> dict[str, Any] | None:
    """The fields of a call's line; None for another line of a gateway.

    Raises ValueError, LookupError or TypeError for a line that no gateway wrote.
    """
    line = line.strip()
    begin, text = line.find("{"), _TEXT.search(line)
    if begin >= 0 and (text is None or begin < text.start()):
        return _checked(orjson.loads(line[begin:]))
    if text is not None:
        time, status, method, rest = text.groups()
        fields: dict[str, Any] = {name: _value(word) for name, word in _FIELD.findall(rest)}
        for number in ("prompt_tokens", "completion_tokens", "bytes"):
            if number in fields:
                fields[number] = int(fields[number])
        fields["tokens_estimated"] = fields.get("tokens_estimated") == "True"
        return _checked({"time": time, "status": int(status), "method": method, **fields})
    if not line or _PROGRAMS_TEXT.search(line):
        return None
    raise ValueError


def _value(word: str) -> Any:
    return orjson.loads(word) if word.startswith('"') else word


def _checked(fields: dict[str, Any]) -> dict[str, Any] | None:
    if "method" not in fields:
        fields["level"], fields["message"]  # a line of the program; a KeyError if it is not
        return None
    fields["outcome"]  # the last field of each line; a KeyError if the line is cut
    # Each relayed call has `bytes`; methods other than POST only read, and take no tokens.
    if "bytes" not in fields or fields["method"] != "POST":
        return None
    words = (fields["time"], fields.get("key") or "", fields.get("model") or "")
    numbers = (fields.get("prompt_tokens"), fields.get("completion_tokens"))
    if not (
        all(isinstance(word, str) for word in words)
        and re.match(r"\d{4}-\d\d-\d\dT", fields["time"])
        and all(number is None or type(number) is int for number in numbers)
    ):
        raise ValueError
    return fields


@contextlib.contextmanager
def _opened(log: str) -> Iterator[Iterable[bytes]]:
    try:
        with open(0 if log == STDIN else log, "rb", closefd=log != STDIN) as file:
            if file.peek(2)[:2] == _GZIP:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield unpacked
            else:
                yield file
    except (OSError, EOFError, zlib.error) as error:  # gzip raises each of the three
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{log} cannot be read ({why}): name logs that can, or - for standard input.") from None


def _no_formula(cell: str | int) -> str | int:
    return f"'{cell}" if isinstance(cell, str) and len(cell) > 1 and cell.startswith(_FORMULA) else cell


def _shown(cell: str | int) -> str:
    """The cell with the control characters of a terminal escaped."""
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in str(cell))
