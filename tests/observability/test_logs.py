"""Log lines: whole, in order, never in the way of a request, and never more than one for a request."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import shlex
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.observability.logs import LineWriter, configure
from gateway.observability.request_log import Format, RequestLog, iso
from tests.support.paths import ROOT
from tests.support.recorders import Conversation

FORMATS = pytest.mark.parametrize("form", ["json", "text"])
HOSTILE = ["/a\nb", "/a\r\nb", "/it's", '/"q"', "/\x1b[31mred", "/\x00", "/\u2028", "/a\tb", "/" + "x" * 9999, "/é"]


class Log:
    """A writer on a pipe, and all that it wrote."""

    def __init__(self) -> None:
        self.read, self._write = os.pipe()
        self.writer = LineWriter(self._write)

    def lines(self) -> list[bytes]:
        """Close the writer; every line that it wrote."""
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(_all_of(self.read)))
        reader.start()
        self.writer.close()
        os.close(self._write)
        reader.join()
        assert found[0].endswith(b"\n") or not found[0]
        return found[0].split(b"\n")[:-1]


def read_from(log: Log, size: int) -> bytes:
    assert select.select([log.read], [], [], 20)[0], "nothing was written within 20 s"
    return os.read(log.read, size)


def write_numbers(writer: LineWriter, count: int) -> None:
    for number in range(count):
        writer.write(b"%d" % number)


def _all_of(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def own_logging() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("", "httpx", "httpcore", "uvicorn")]
    before = [(logger, logger.level) for logger in loggers]
    handlers = loggers[0].handlers[:]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in before:
        logger.setLevel(level)


def test_lines_are_written_in_their_order(log: Log) -> None:
    write_numbers(log.writer, 20_000)
    assert log.lines() == [b"%d" % number for number in range(20_000)]


def test_a_line_is_written_soon_without_another_to_push_it(log: Log) -> None:
    log.writer.write(b"one")
    assert read_from(log, 10) == b"one\n"
    log.writer.write(b"two")
    assert read_from(log, 10) == b"two\n"
    assert log.lines() == []


def test_a_stuck_reader_stops_no_write_and_the_lines_past_the_bound_are_counted(log: Log) -> None:
    log.writer.write(b"x" * 1024 * 1024)
    assert read_from(log, 1) == b"x"  # the writer is now stuck: a pipe holds less than this line
    writing = threading.Thread(target=write_numbers, args=(log.writer, 200_000), daemon=True)
    writing.start()
    writing.join(20)
    assert not writing.is_alive()
    _, *kept, last = log.lines()
    assert kept == [b"%d" % number for number in range(50_000)]
    assert json.loads(last)["level"] == "WARNING"
    assert "150000 log lines were lost" in json.loads(last)["message"]


def test_lines_are_written_again_after_some_were_lost(log: Log) -> None:
    log.writer.write(b"x" * 1024 * 1024)
    assert read_from(log, 1) == b"x"
    for _ in range(50_001):
        log.writer.write(b"")
    rest = b""
    while b"1 log lines were lost" not in rest:
        rest = rest[-100:] + read_from(log, 65536)
    log.writer.write(b"after")
    assert log.lines()[-1] == b"after"


def test_a_closed_pipe_raises_nowhere() -> None:
    read, write = os.pipe()
    writer = LineWriter(write)
    os.close(read)
    writer.write(b"one")
    writer.close()
    writer.write(b"two")
    os.close(write)


@FORMATS
@pytest.mark.parametrize("path", HOSTILE)
def test_a_request_is_one_line_of_plain_characters_whatever_its_path_holds(form: Format, path: str, log: Log) -> None:
    RequestLog(log.writer, form).other("id-1", "GET", path, "192.0.2.1", 404, 0.25)
    (line,) = log.lines()
    assert not set(line) & set(range(32))
    if form == "json":
        assert json.loads(line)["path"] == path


@given(path=st.text(), form=st.sampled_from(["json", "text"]))
@settings(max_examples=15)
def test_any_path_makes_one_line(path: str, form: Format) -> None:
    log = Log()
    RequestLog(log.writer, form).other("id-1", "GET", path, "192.0.2.1", 404, 0.25)
    (line,) = log.lines()
    assert not set(line) & set(range(32))


def test_a_path_cannot_forge_another_field_of_a_text_line(log: Log) -> None:
    RequestLog(log.writer, "text").other("id-1", "GET", "/x request_id=forged", "192.0.2.1", 404, 0.25)
    (line,) = log.lines()
    named = [part for part in shlex.split(line.decode()) if part.startswith("request_id=")]
    assert named == ["request_id=id-1"]


def ended(model: str = "demo") -> Conversation:
    talk = Conversation(models=(model,), headers=((b"x-request-id", b"id-1"), (b"authorization", b"Bearer secret")))
    talk.ask({"messages": {"user": "a prompt"}, "model": model, "streaming": False})
    talk.connect()
    talk.clock.advance(1.5)
    talk.head(200, [(b"content-type", b"application/json")])
    usage = '"usage":{"prompt_tokens":3,"completion_tokens":4}'
    talk.exchange.upstream_body(b'{"choices":[{"message":{"content":"a reply"}}],%s}' % usage.encode())
    talk.clock.advance(0.5)
    talk.exchange.upstream_end()
    return talk


@given(st.integers(min_value=0, max_value=4_000_000_000_000))
def test_a_time_is_in_utc_and_has_milliseconds(milliseconds: int) -> None:
    told = iso(milliseconds)
    assert len(told) == len("2026-11-23T08:08:08.123Z")
    assert datetime.fromisoformat(told) == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)


def test_a_relayed_request_is_told_by_what_operators_ask_for(log: Log) -> None:
    talk = ended()
    RequestLog(log.writer, "json").records([talk.exchange])
    (line,) = map(json.loads, log.lines())
    assert line.pop("time").endswith("Z")
    assert line == {
        "request_id": "id-1",
        "upstream_request_id": talk.exchange.upstream_id,
        "method": "POST",
        "path": "/v1/chat/completions",
        "client": "192.0.2.1",
        "key": None,
        "form": "simplified",
        "model": "demo",
        "upstream": "http://vllm-0:8008",
        "status": 200,
        "first_token_s": 1.5,
        "total_s": 2.0,
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "tokens_estimated": False,
        "bytes": len(talk.client.content),
        "outcome": "done",
    }


def test_the_table_of_fields_has_each_of_a_lines(log: Log) -> None:
    talk = ended()
    RequestLog(log.writer, "json").records([talk.exchange])
    (line,) = map(json.loads, log.lines())
    table = (ROOT / "docs/metrics.md").read_text().partition("| Field |")[2].partition("\n\n")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    # The last four are told where there is something to tell.
    assert named == [*line, "cached_tokens", "alias", "trace_id", "span_id"]


def test_a_text_line_starts_with_what_the_eye_looks_for_and_leaves_out_what_is_unknown(log: Log) -> None:
    talk = Conversation(models=(), headers=((b"x-request-id", b"id-1"),))
    talk.ask(b"no JSON")
    RequestLog(log.writer, "text").records([talk.exchange])
    (line,) = log.lines()
    time, rest = line.split(b" ", 1)
    assert time.endswith(b"Z")
    size = len(talk.client.content)
    expected = f"400 POST /v1/chat/completions request_id=id-1 client=192.0.2.1 total_s=0.0 bytes={size} outcome=done"
    assert rest.decode() == expected


@FORMATS
def test_no_prompt_reply_or_key_is_logged(form: Format, log: Log) -> None:
    RequestLog(log.writer, form).records([ended().exchange])
    (line,) = log.lines()
    assert b"id-1" in line
    assert not [secret for secret in (b"a prompt", b"a reply", b"secret") if secret in line]


@FORMATS
def test_a_client_cannot_make_a_line_long_by_the_name_of_a_model(form: Format, log: Log) -> None:
    talk = Conversation(headers=((b"x-request-id", b"id-1"),))
    talk.ask({"messages": [], "model": "x" * 50_000})
    talk.leave()
    RequestLog(log.writer, form).records([talk.exchange])
    (line,) = log.lines()
    assert len(line) < 1000


@FORMATS
def test_without_a_writer_nothing_is_logged(form: Format) -> None:
    RequestLog(None, form).other("id-1", "GET", "/", "", 200, 0.0)
    RequestLog(None, form).records([ended().exchange])


@pytest.mark.usefixtures("own_logging")
def test_every_logger_writes_json_on_one_line_with_its_exception(log: Log) -> None:
    configure(log.writer, "json", "INFO")
    logging.getLogger("some.module").debug("left out")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("some.module").exception("it failed: %s", "why")
    (line,) = map(json.loads, log.lines())
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", "some.module", "it failed: why")
    assert "ValueError: two\nlines" in line["exception"]


@pytest.mark.usefixtures("own_logging")
def test_a_text_line_of_the_program_has_its_time_level_and_message(log: Log) -> None:
    configure(log.writer, "text", "INFO")
    logging.getLogger("httpx").info("a probe of many")
    logging.getLogger("some.module").info("it starts")
    (line,) = log.lines()
    assert line.split(b" ", 1)[1] == b"INFO    it starts"


@FORMATS
@pytest.mark.usefixtures("own_logging")
def test_a_message_with_a_lone_surrogate_is_still_logged(form: Format, log: Log) -> None:
    # As Python reads bytes of the environment that are not UTF-8.
    configure(log.writer, form, "INFO")
    logging.getLogger("some.module").warning("odd: %s", "\udcff")
    (line,) = log.lines()
    assert b"odd: " in line


def test_lines_that_a_full_disk_takes_not_are_counted_and_told_once_it_takes_some() -> None:
    read, write = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(os.dup(full))
    for number in range(1000):
        writer.write(b"%d" % number)
    until = time.monotonic() + 20
    while writer.lost < 1000 and time.monotonic() < until:
        time.sleep(0.01)
    assert writer.lost == 1000
    os.dup2(write, writer._fd)  # there is room again
    writer.write(b"after")
    writer.close()
    os.close(write)
    told, after = os.read(read, 1000).splitlines()
    assert json.loads(told)["message"] == "1000 log lines were lost: they could not be written"
    assert (after, writer.lost) == (b"after", 1000)
    for fd in (read, full, writer._fd):
        os.close(fd)
