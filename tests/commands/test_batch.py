"""The command `batch`: files of requests, through the gateway and against what a server may do to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from gateway.batch import input_file, sending
from gateway.batch.sending import Figures
from gateway.cli import main
from gateway.commands import batch as command
from tests.support.fake_vllm import (
    CLOSE,
    DONE,
    RESET,
    STREAM_HEAD,
    FakeVllm,
    Hold,
    Received,
    Step,
    chunk,
    completion,
    response,
    stream,
)
from tests.support.gateway_process import Gateway, running
from tests.support.paths import AUTHORITY, CERTIFICATES
from tests.support.ports import free_port

CHAT = "/v1/chat/completions"
KEY = "sk-4f7d0c9a2b6e81d35a"
GOOD = str(CERTIFICATES / "good.pem")
OK: list[Step] = [response("200 OK", completion())]


class Ended(NamedTuple):
    status: int
    out: str
    err: str


Send = Callable[..., Ended]


def line(custom_id: str, body: Any = None, url: str = CHAT) -> bytes:
    body = {"messages": [{"role": "user", "content": custom_id}]} if body is None else body
    return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def written(path: Path, *lines: bytes) -> str:
    path.write_bytes(b"".join(one + b"\n" for one in lines))
    return str(path)


def results(text: str | bytes) -> dict[str, dict[str, Any]]:
    """The results by their ids, each of which is there once."""
    found = [json.loads(one) for one in text.splitlines()]
    by_id = {one["custom_id"]: one for one in found}
    assert len(by_id) == len(found)
    return by_id


def statuses(path: str) -> dict[str, int | None]:
    found = results(Path(path).read_bytes())
    return {name: one["response"] and one["response"]["status_code"] for name, one in sorted(found.items())}


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out.jsonl")


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, out: str) -> Send:
    """The command in this process, as a start takes longer than most tests; its output is `out`."""

    def send(*arguments: str, piped: bytes = b"", output: str = out) -> Ended:
        stdin = tmp_path / "stdin"
        stdin.write_bytes(piped)
        with stdin.open() as opened, monkeypatch.context() as patched:
            patched.setattr(sys, "stdin", opened)
            with pytest.raises(SystemExit) as ended:
                main(["batch", "-o", output, *arguments], prog_name="vllm-gateway")
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capfd.readouterr())

    return send


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """Nothing waits to be asked again; these are the seconds that it would have, and why."""
    waited: list[tuple[float, str]] = []

    async def wait(self: sending.Sender, seconds: float, why: str) -> None:
        waited.append((seconds, why))

    monkeypatch.setattr(sending.Sender, "_wait", wait)
    return waited


def answering(monkeypatch: pytest.MonkeyPatch, fake: FakeVllm, answer: Callable[[str], Sequence[Step]]) -> None:
    """Have a server answer by the text of the call."""

    def answer_to(request: Received) -> Sequence[Step]:
        return answer(json.loads(request.body)["messages"][0]["content"])

    monkeypatch.setattr(fake, "answer_to", answer_to)


def asked(fake: FakeVllm) -> list[str]:
    return sorted(json.loads(received.body)["messages"][0]["content"] for received in fake.received)


# What is sent, and what is written


def test_each_line_has_its_result(send: Send, gateway: Gateway, fake: FakeVllm, tmp_path: Path, out: str) -> None:
    source = written(
        tmp_path / "in.jsonl",
        line("openai", {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}),
        line("simplified", {"messages": {"user": "Hi"}}),
        line("legacy", {"query": "Hi"}),
        line("completions", {"prompt": "Hi"}, "/v1/completions"),
        b'{"custom_id": "models", "method": "GET", "url": "/v1/models"}',
    )

    ended = send(source, "--url", f"{gateway.url}/v1", "--max-concurrency", "2")

    assert ended.status == 0
    assert ended.out == ""
    assert ended.err.startswith("vllm-gateway: 5 of 5 requests are answered. It took ")
    found = results(Path(out).read_bytes())
    assert found.keys() == {"openai", "simplified", "legacy", "completions", "models"}
    assert all(one["error"] is None and one["response"]["status_code"] == 200 for one in found.values())
    assert found["openai"]["response"]["body"]["choices"][0]["message"]["content"] == "It's."
    assert found["simplified"]["response"]["body"]["text"] == found["legacy"]["response"]["body"]["text"] == "It's."
    assert found["models"]["response"]["body"]["data"][0]["id"] == "demo"
    logged = {one["request_id"] for one in gateway.log(5)}
    assert {one["response"]["request_id"] for one in found.values()} == logged
    assert len({one["id"] for one in found.values()}) == 5


@pytest.mark.parametrize("compat", ["erag-1.4", "erag-2.0", "erag-2.1"])
def test_answers_are_whole_whatever_release_is_stood_in_for(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, compat: str
) -> None:
    source = written(tmp_path / "in", line("a", {"messages": {"user": "Hi"}}), line("b"))
    with running(fake.url, compat=compat) as gateway:
        assert send(source, "--url", gateway.url).status == 0

    for one in results(Path(out).read_bytes()).values():
        assert "It's." in json.dumps(one["response"]["body"])


def test_a_model_and_a_key_are_sent_and_the_key_is_told_to_nobody(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "in", line("a", {"model": "m", "messages": []}))
    monkeypatch.setenv("GATEWAY_CHAT_KEY", KEY)
    ended = send(source, "--url", fake.url, "--model", "other")

    assert ended.status == 0
    assert fake.received[0].header("authorization") == f"Bearer {KEY}"
    assert json.loads(fake.received[0].body)["model"] == "other"
    assert KEY not in ended.err + Path(out).read_text()


def test_an_answer_that_is_no_json_is_a_text_and_one_that_is_no_text_is_base64(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str
) -> None:
    fake.queue(
        [response("200 OK", "1\n00:00 → Hi\n".encode(), kind="text/plain")],
        [response("200 OK", b"\xff\0", kind="application/octet-stream")],
        [response("200 OK", b'{"a": NaN}')],
        [response("200 OK", b'{\n "a": [1.5, 1e300]\n}\n')],
        [response("200 OK", b"")],
    )
    send(written(tmp_path / "in", *map(line, "abcde")), "--url", fake.url, "--max-concurrency", "1")

    found = results(Path(out).read_bytes())
    bodies = [found[name]["response"]["body"] for name in "abcde"]
    assert bodies == ["1\n00:00 → Hi\n", "/wA=", '{"a": NaN}', {"a": [1.5, 1e300]}, ""]


def test_pipes_are_read_and_written(send: Send, fake: FakeVllm, tmp_path: Path, out: str) -> None:
    content = b"\xef\xbb\xbf" + line("a") + b"\r\n\r\n  \n" + line("b")
    ended = send("-", "--url", fake.url, piped=content, output="-")
    assert ended.status == 0
    assert results(ended.out).keys() == {"a", "b"}

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'wb').write({content!r})"]):
        assert send(str(pipe), "--url", fake.url).status == 0
    assert statuses(out) == {"a": 200, "b": 200}


def test_a_stream_that_says_that_it_broke_is_no_answer(
    send: Send, fake: FakeVllm, gateway: Gateway, tmp_path: Path, out: str
) -> None:
    """vllm-app's path is answered in streams alone."""
    told = [orjson.dumps({"choices": [{"index": 0, "text": text}]}) for text in ("a", "b")]
    events = [b"data: " + one + b"\n\n" for one in told]
    fake.queue([STREAM_HEAD, *map(chunk, events), CLOSE], stream([*events, DONE]))
    source = written(tmp_path / "in", line("a", {"question": "Hi"}, "/api/v1/ask"))

    ended = send(source, "--url", gateway.url)
    assert ended.status == 1
    assert "1 failed (broken_stream: 1)" in ended.err
    found = results(Path(out).read_bytes())["a"]
    assert found["error"]["code"] == "broken_stream"
    assert '"type":"error"' in found["response"]["body"]

    assert send(source, "--url", gateway.url).status == 0
    found = results(Path(out).read_bytes())["a"]
    assert (found["error"], found["response"]["body"].count("answer_part")) == (None, 2)


# Again


def test_what_is_answered_is_not_sent_again_and_what_failed_is(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "in", *map(line, "abc"))
    answering(monkeypatch, fake, lambda text: [response("404 Not Found", b"{}")] if text == "b" else OK)
    ended = send(source, "--url", fake.url)
    assert (ended.status, statuses(out)) == (1, {"a": 200, "b": 404, "c": 200})
    assert "2 of 3 requests are answered; 1 failed (404: 1). It took " in ended.err

    answering(monkeypatch, fake, lambda text: OK)
    with Path(out).open("ab") as file:
        file.write(b'{"id":"batch_req_00')
    ended = send(source, "--url", fake.url)
    assert (ended.status, statuses(out)) == (0, {"a": 200, "b": 200, "c": 200})
    assert "3 of 3 requests are answered, 2 of them before. It took " in ended.err
    assert asked(fake) == ["a", "b", "b", "c"]

    assert send(source, "--url", f"http://127.0.0.1:{free_port()}").status == 0
    assert len(fake.received) == 4


def test_lines_may_be_added_to_the_input_but_an_output_is_of_one(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str
) -> None:
    assert send(written(tmp_path / "in", line("a")), "--url", fake.url).status == 0
    assert send(written(tmp_path / "in", line("b"), line("a")), "--url", fake.url).status == 0
    assert asked(fake) == ["a", "b"]

    ended = send(written(tmp_path / "in", line("b")), "--url", fake.url)
    assert ended == (
        2,
        "",
        f"vllm-gateway: {out} is not this batch's: its line 1 has a custom_id that the input has not. Name another "
        "output.\n",
    )
    assert statuses(out) == {"a": 200, "b": 200}


# What is asked again, and when


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_be_otherwise_soon_is_asked_again(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, waits: list[tuple[float, str]], status: int
) -> None:
    fake.queue([response(f"{status} No", b"{}")], [response(f"{status} No", b"{}")])
    assert send(written(tmp_path / "in", line("a")), "--url", fake.url).status == 0

    assert (statuses(out), len(fake.received)) == ({"a": 200}, 3)
    assert [why for _, why in waits] == [str(status)] * 2
    assert 1 <= waits[0][0] <= 2 <= waits[1][0] <= 4


@pytest.mark.parametrize("status", [400, 402, 403, 404, 405, 408, 409, 413, 422, 500, 501])
def test_anything_else_is_asked_once(send: Send, fake: FakeVllm, tmp_path: Path, out: str, status: int) -> None:
    fake.queue([response(f"{status} No", b'{"error":{"message":"no"}}', "retry-after: 0")])
    ended = send(written(tmp_path / "in", line("a")), "--url", fake.url)

    assert (ended.status, statuses(out), len(fake.received)) == (1, {"a": status}, 1)
    found = results(Path(out).read_bytes())["a"]
    assert (found["response"]["body"], found["error"]) == ({"error": {"message": "no"}}, None)


@pytest.mark.parametrize(("end", "why"), [(RESET, "it reset the connection"), (CLOSE, "it broke off")])
def test_a_connection_that_breaks_is_tried_again_for_some_minutes(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, waits: list[tuple[float, str]], end: Any, why: str
) -> None:
    half = response("200 OK", completion())[:-5]
    # That it was reached shows that these are its own.
    fake.queue(OK, [half, end], [end], [half, end], OK, *[[half, end]] * 10)
    source = written(tmp_path / "in", *map(line, "abc"))
    ended = send(source, "--url", fake.url, "--max-concurrency", "1")

    assert (ended.status, statuses(out)) == (1, {"a": 200, "b": 200, "c": None})
    assert f"1 failed ({why}: 1)" in ended.err
    found = results(Path(out).read_bytes())["c"]
    assert found["error"]["code"] == "no_answer"
    assert found["error"]["message"] == f"There was no answer in 10 tries: {why}."
    seconds = [seconds for seconds, _ in waits[3:]]
    assert len(seconds) == 9
    for tries, wait in enumerate(seconds):
        least = min(30, 2**tries)
        assert least <= wait <= 2 * least


def test_it_gives_up_after_ten_tries_and_after_two_of_what_is_not_to_be_repeated(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, waits: list[tuple[float, str]]
) -> None:
    source = written(tmp_path / "in", line("a"))
    fake.queue(*[[response("503 No", b'{"error":{"message":"none"}}')]] * 10)
    assert send(source, "--url", fake.url).status == 1
    assert (statuses(out), len(fake.received)) == ({"a": 503}, 10)

    fake.queue(*[[response("504 No", b"{}", "x-should-retry: false")]] * 2)
    assert send(source, "--url", fake.url).status == 1
    assert (statuses(out), len(fake.received)) == ({"a": 504}, 12)


def test_it_waits_as_long_as_it_is_told(
    send: Send, fake: FakeVllm, tmp_path: Path, waits: list[tuple[float, str]]
) -> None:
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    told = [
        ("429", "7", 7, 14),
        ("429", "7", 7, 14),
        ("503", "40", 40, 80),
        ("503", "1", 8, 16),
        ("503", date, 80, 180),
        ("429", "99999999", 600, 1200),
        ("503", "soon", 30, 60),
        ("503", "-1", 30, 60),
    ]
    fake.queue(*([response(f"{status} No", b"{}", f"retry-after: {value}")] for status, value, *_ in told))
    assert send(written(tmp_path / "in", line("a")), "--url", fake.url).status == 0
    for (_, value, least, most), (seconds, _) in zip(told, waits, strict=True):
        assert least <= seconds <= most, value


def test_who_finds_no_room_is_patient_for_as_long_as_there_is_some_for_others(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Step] = [response("429 No", b"{}", "retry-after: 1")]
    names = [f"b{number:02}" for number in range(20)]

    async def wait_for_another(self: sending.Sender, seconds: float, why: str) -> None:
        answered = self._figures.answered
        while self._figures.answered == answered < len(names):  # noqa: ASYNC110 - a plain number, of which nothing is told
            await asyncio.sleep(0.001)

    monkeypatch.setattr(sending.Sender, "_wait", wait_for_another)
    answering(monkeypatch, fake, lambda text: refused if text == "a" and not set(names) <= set(asked(fake)) else OK)
    source = written(tmp_path / "in", *map(line, ["a", *names]))
    assert send(source, "--url", fake.url, "--max-concurrency", "2").status == 0
    assert statuses(out) == dict.fromkeys(["a", *names], 200)
    assert asked(fake).count("a") > 10

    monkeypatch.setattr(sending.Sender, "_wait", lambda self, seconds, why: asyncio.sleep(0))
    monkeypatch.setattr(fake, "answer_to", lambda request: refused)
    alone = send(written(tmp_path / "in", line("c")), "--url", fake.url, output=f"{out}.alone")
    assert (alone.status, statuses(f"{out}.alone"), asked(fake).count("c")) == (1, {"c": 429}, 10)


# What ends it early


def test_a_key_that_is_refused_ends_it(send: Send, fake: FakeVllm, tmp_path: Path, out: str) -> None:
    source = written(tmp_path / "in", *(line(str(number)) for number in range(500)))
    with running(fake.url, api_keys=["sk-right-0123456789abcdef"]) as gateway:
        ended = send(source, "--url", gateway.url, "--key", KEY)

    assert (ended.status, Path(out).read_text(), fake.received) == (1, "", [])
    first, second = ended.err.splitlines()
    assert first == (
        "vllm-gateway: The key that was sent is none of this gateway's. `batch` takes a key from GATEWAY_CHAT_KEY. Run "
        "the same again to go on."
    )
    assert second == "vllm-gateway: 0 of 500 requests are answered; 500 are left."


def test_a_redirect_is_not_followed(send: Send, fake: FakeVllm, tmp_path: Path, out: str) -> None:
    fake.queue([response("308 Permanent Redirect", b"", "location: http://192.0.2.1/x")])
    ended = send(written(tmp_path / "in", *map(line, "ab")), "--url", fake.url, "--max-concurrency", "1", "--key", KEY)

    assert (ended.status, Path(out).read_text(), len(fake.received)) == (1, "", 1)
    assert f"{fake.url} redirects to 'http://192.0.2.1/x', where nothing is sent: name the gateway" in ended.err


def test_a_gateway_that_cannot_be_reached_is_told_at_once(send: Send, tmp_path: Path, out: str) -> None:
    port = free_port()
    ended = send(written(tmp_path / "in", *map(line, "ab")), "--url", f"http://127.0.0.1:{port}")

    assert (ended.status, Path(out).read_text()) == (3, "")
    assert ended.err.startswith(
        f"vllm-gateway: http://127.0.0.1:{port} cannot be reached (connection refused): `vllm-gateway up` or `serve` "
        "starts a gateway, --url names another. Run the same again to go on.\n"
    )


def test_a_gateway_that_is_gone_for_good_leaves_the_rest(
    send: Send, tmp_path: Path, out: str, waits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeVllm() as fake:
        source = written(tmp_path / "in", *map(line, "abc"))
        port, wait = fake.port, sending.Sender._wait

        async def gone(self: sending.Sender, seconds: float, why: str) -> None:
            fake._loop.call_soon_threadsafe(fake._server.close)
            await wait(self, seconds, why)

        monkeypatch.setattr(sending.Sender, "_wait", gone)
        fake.queue(OK, [CLOSE])
        ended = send(source, "--url", fake.url, "--max-concurrency", "1")

    assert (ended.status, statuses(out)) == (3, {"a": 200})
    assert f"http://127.0.0.1:{port} cannot be reached (connection refused)" in ended.err
    assert "1 of 3 requests are answered; 2 are left" in ended.err


def test_a_server_of_something_else_is_none(send: Send, fake: FakeVllm, tmp_path: Path, out: str, waits: Any) -> None:
    greeting: list[Step] = [b"220 mail ESMTP\r\n", CLOSE]
    fake.queue(*[greeting] * 20)
    ended = send(written(tmp_path / "in", line("a")), "--url", fake.url)
    assert (ended.status, Path(out).read_text(), len(waits)) == (3, "", 9)


def test_certificates_are_checked(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "in", line("a"))
    with running(fake.url, tls_cert_file=GOOD) as gateway:
        ended = send(source, "--url", gateway.url)
        assert ended.status == 3
        assert "cannot be reached (its certificate is not valid (unable to get local issuer" in ended.err
        monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
        assert send(source, "--url", gateway.url).status == 0


# Wrong input


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line("a"), line("b"), line("a")], "line 3 has the custom_id of line 1: each needs its own."),
        ([line("a"), b"", b"{"], "line 3 is no JSON, from its character 2 on: "),
        ([line("a"), b"[]"], "line 2 is an array: a line is an object, with custom_id"),
        ([line("a"), line("b", url="/v1/chat")], 'line 2 has the url "/v1/chat", which is no path of a gateway\'s'),
        ([line("a"), b'{"custom_id":"\xff"}'], "line 2 is not UTF-8: save the file as UTF-8."),
        ([line("a"), line("b", {"stream": True})], "line 2 asks for a stream, but a batch has whole answers"),
        ([], "has no requests: it is empty."),
        ([b"", b" \r"], "has no requests: it is empty."),
        (['{"custom_id"'.encode("utf-16")], "line 1 is not UTF-8: save the file as UTF-8."),
    ],
)
def test_wrong_input_is_named_by_its_line_and_nothing_is_sent(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, lines: list[bytes], says: str
) -> None:
    name = written(tmp_path / "in", *lines)
    ended = send(name, "--url", fake.url)
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(
        f"vllm-gateway: {name}: {says}" if "line" in says[:4] else f"vllm-gateway: {name} {says}"
    )
    assert len(ended.err.splitlines()) == 1
    assert (fake.received, Path(out).read_text()) == ([], "")


def test_the_longest_line_is_16_mib(send: Send, fake: FakeVllm, tmp_path: Path, out: str) -> None:
    fits = line("a").ljust(16 * 1024 * 1024)
    assert send(written(tmp_path / "in", fits), "--url", fake.url).status == 0

    ended = send(written(tmp_path / "in", line("b"), line("a", {"messages": "x" * 17_000_000})), "--url", fake.url)
    assert ended.status == 2
    assert "line 2 is longer than 16777216 bytes, the most that a gateway takes." in ended.err
    assert len(fake.received) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/", "vllm-gateway: / cannot be read (Is a directory): name a file of requests.\n"),
        ("/nowhere", "vllm-gateway: /nowhere cannot be read (No such file or directory): name a file of requests.\n"),
        ("a\0b", "cannot be read (embedded null byte)"),
    ],
)
def test_an_input_that_cannot_be_read_is_told(send: Send, name: str, says: str, out: str) -> None:
    ended = send(name, "--url", "http://127.0.0.1:1")
    assert ended.status == 2
    assert says in ended.err
    assert not Path(out).exists()


def test_an_input_that_changes_is_told(
    send: Send, fake: FakeVllm, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "in", line("a"), line("b"))
    check = input_file.InputFile.check

    def checked(self: input_file.InputFile, model: str | None) -> dict[bytes, int]:
        lines = check(self, model)
        written(tmp_path / "in", line("a"), line("c"))
        return lines

    monkeypatch.setattr(input_file.InputFile, "check", checked)
    ended = send(source, "--url", fake.url, "--max-concurrency", "1")
    assert ended.status == 2
    assert f"{source}: line 2 has changed since it was checked: run it again." in ended.err
    assert statuses(out) == {"a": 200}


def test_input_and_output_are_two_files(send: Send, tmp_path: Path) -> None:
    source = written(tmp_path / "in", line("a"))
    ended = send(source, "--url", "http://127.0.0.1:1", output=source)
    assert ended == (2, "", "vllm-gateway: The input and the output are one file: name another output.\n")
    assert Path(source).read_bytes() == line("a") + b"\n"


# How far it is


def test_progress_has_a_rate_and_the_time_that_is_left() -> None:
    figures = Figures(50_000, 1_000, answered=3_000, waiting=2, why="503")
    figures.failed["404"] = 10
    assert command._how_far(figures, 10) == (
        "4,010 of 50,000, 10.0 a second, 1 h 16 min left, 10 failed, 2 wait to be asked again (503)"
    )
    assert command._how_far(Figures(5, 0), 0) == "0 of 5, 0.0 a second"
    assert [command._time(seconds) for seconds in (0, 59.4, 60, 7199)] == ["0 s", "59 s", "1 min 0 s", "1 h 59 min"]


def test_progress_goes_into_a_log_as_lines(
    send: Send, fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_BETWEEN_LINES", 0.01)
    hold = Hold()
    fake.queue([hold, *OK])
    source = written(tmp_path / "in", line("a"))
    told: list[str] = []

    def how_far(figures: Any, rate: float) -> str:
        told.append(f"{figures.done} of {figures.total}")
        if len(told) == 3:
            hold.release()
        return told[-1]

    monkeypatch.setattr(command, "_how_far", how_far)
    assert send(source, "--url", fake.url).err.startswith("vllm-gateway: 0 of 1\n" * 3)


# As a process


@contextlib.contextmanager
def sending_to(url: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "batch", "--url", url, *arguments],
        **{"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, **options},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_end_what_runs_and_begins_nothing(
    fake: FakeVllm, tmp_path: Path, out: str, number: signal.Signals
) -> None:
    holds = [Hold(), Hold()]
    for hold in holds:
        fake.queue([hold, *OK])
    source = written(tmp_path / "in", *map(line, "abcd"))
    with sending_to(fake.url, source, "-o", out, "--max-concurrency", "2") as process:
        fake.wait_for_request(2)
        process.send_signal(number)
        assert process.stderr is not None
        said = process.stderr.readline()
        for hold in holds:
            hold.release()
        _, err = process.communicate(timeout=20)

    assert said == b"vllm-gateway: Stopping: what runs may end. Again (Ctrl-C) ends that, too.\n"
    assert process.returncode == 130
    assert (len(statuses(out)), len(fake.received)) == (2, 2)
    assert b"2 of 4 requests are answered; 2 are left" in err


def test_a_second_signal_ends_what_runs_too(fake: FakeVllm, tmp_path: Path, out: str) -> None:
    fake.queue([Hold()])
    source = written(tmp_path / "in", *map(line, "ab"))
    with sending_to(fake.url, source, "-o", out, "--max-concurrency", "1") as process:
        received = fake.wait_for_request()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)

    assert received.closed.wait(10)
    assert (process.returncode, Path(out).read_text()) == (130, "")
    assert b"Traceback" not in err
    assert b"0 of 2 requests are answered; 2 are left" in err


def test_what_waits_to_be_asked_again_ends_at_once(fake: FakeVllm, tmp_path: Path, out: str) -> None:
    fake.queue(*[[response("503 No", b"{}", "retry-after: 500")]] * 2)
    source = written(tmp_path / "in", *map(line, "ab"))
    with sending_to(fake.url, source, "-o", out) as process:
        fake.wait_for_request(2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert (process.returncode, Path(out).read_text()) == (130, "")


def test_whoever_reads_no_more_ends_it(fake: FakeVllm, tmp_path: Path) -> None:
    source = written(tmp_path / "in", *(line(str(number)) for number in range(50)))
    read, write = os.pipe()
    os.close(read)
    with sending_to(fake.url, source, "-o", "-", stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (141, b"")


def test_a_full_disk_is_told_and_once_there_is_room_it_goes_on(fake: FakeVllm, tmp_path: Path, out: str) -> None:
    import resource

    source = written(tmp_path / "in", *(line(str(number)) for number in range(60)))
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))}
    with sending_to(fake.url, source, "-o", out, **limited) as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"{out} takes no more results (File too large): make room. Run the same again to go on.".encode() in err
    before = results(Path(out).read_bytes())
    assert 0 < len(before) < 60

    with sending_to(fake.url, source, "-o", out) as process:
        process.communicate(timeout=20)
    after = results(Path(out).read_bytes())
    assert (process.returncode, len(after)) == (0, 60)
    assert all(after[name] == one for name, one in before.items())

    with sending_to(fake.url, source, "-o", "/dev/full") as process:
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"/dev/full takes no more results (No space left on device): make room." in err


def test_none_is_lost_or_twice_over_five_kills(fake: FakeVllm, tmp_path: Path, out: str) -> None:
    def has_come(count: int) -> bool:
        return len(fake.received) >= count

    names = [f"{number:03}" for number in range(300)]
    source = written(tmp_path / "in", *map(line, names))
    done = 0
    with running(fake.url) as gateway:
        for kill in range(1, 6):
            with sending_to(gateway.url, source, "-o", out, "--max-concurrency", "8") as process:
                fake.wait(partial(has_come, done + 50))
                process.kill()
                process.wait()
            assert process.returncode == -signal.SIGKILL
            done = len(fake.received)
            assert len(Path(out).read_bytes().splitlines()) <= done, kill
        with sending_to(gateway.url, source, "-o", out, "--max-concurrency", "8") as process:
            process.communicate(timeout=60)

    assert process.returncode == 0
    assert statuses(out) == dict.fromkeys(names, 200)
    # Those that ran when it was killed were asked again, and no others.
    assert len(fake.received) <= 300 + 5 * 8


def test_a_gateway_that_is_restarted_costs_no_line(tmp_path: Path, out: str) -> None:
    names = [f"{number:03}" for number in range(100)]
    source = written(tmp_path / "in", *map(line, names))
    with contextlib.ExitStack() as stack:
        with FakeVllm() as fake:
            hold = Hold()
            fake.queue(*[OK] * 20, [hold])
            process = stack.enter_context(sending_to(fake.url, source, "-o", out, "--max-concurrency", "4"))
            assert hold.reached.wait(20)
        assert process.poll() is None
        with FakeVllm(fake.port) as anew:
            process.communicate(timeout=60)

    assert (process.returncode, statuses(out)) == (0, dict.fromkeys(names, 200))
    assert len(fake.received) + len(anew.received) <= 100 + 4


# Of what it does itself, as that of who starts it counts until then.
PEAK = (
    "import atexit, sys; from gateway.cli import main\n"
    "atexit.register(lambda: sys.stderr.write(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]))\n"
    "main()"
)


@pytest.mark.skipif(sys.platform != "linux", reason="what a process had of memory stands in Linux's /proc")
def test_memory_does_not_grow_with_the_file(fake: FakeVllm, tmp_path: Path, out: str) -> None:
    peaks = []
    for count in (100, 3000):
        body = {"messages": [{"role": "user", "content": "x" * 4000}]}
        source = written(tmp_path / "in", *(line(f"{number:0200}", body) for number in range(count)))
        done = subprocess.run(
            [sys.executable, "-c", PEAK, "batch", source, "-o", f"{out}.{count}", "--url", fake.url],
            capture_output=True,
            check=True,
            timeout=120,
        )
        peaks.append(int(done.stderr.splitlines()[-1]) / 1024)
    assert peaks[1] < 150
    # The input is 12 MB, and so is the output.
    assert peaks[1] - peaks[0] < 8
