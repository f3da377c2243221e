"""The command `chat`: at a pseudo-terminal, in pipes and in this process, in front of a scripted vLLM."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import orjson
import pytest

from gateway.cli import main
from gateway.config.load import load
from tests.support.fake_vllm import DONE, EVENTS, STREAM_HEAD, FakeVllm, Hold, Step, chunk, event, response, stream
from tests.support.gateway_process import Gateway, running
from tests.support.paths import AUTHORITY, CERTIFICATES, ROOT
from tests.support.ports import free_port

TEXT = 'It\'s a "q"\n end'
CUT_SHORT = "vllm-gateway: The answer is cut short (finish_reason length).\n"
KEY = "sk-4f7d0c9a2b6e81d35a"
# Colours, a title, the cursor, a bell, and the same in one character of C1; a line's end is none of these.
DRIVING = "a\x1b[31mb\x1b]0;c\x07d\re\u009b2Jf\x7fg\r\n\th"
CTRL_D = b"\x04"
GOOD = str(CERTIFICATES / "good.pem")


class Ended(NamedTuple):
    status: int
    out: str
    err: str


Ask = Callable[..., Ended]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Ask]:
    """The command in this process, as a start takes longer than most tests; nothing is at its standard input."""
    before = signal.getsignal(signal.SIGINT)

    def ask(*arguments: str, piped: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
        with pytest.raises(SystemExit) as ended:
            main(["chat", *arguments], prog_name="vllm-gateway")
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, *capfd.readouterr())

    yield ask
    signal.signal(signal.SIGINT, before)


class Terminal:
    """The command at a terminal of its own; `out` is where else its standard output goes."""

    def __init__(self, *arguments: str, out: int | None = None, **environment: str) -> None:
        self._master, slave = pty.openpty()
        # A session's first opening of a terminal makes it the one that Ctrl-C comes from.
        start = "import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); from gateway.cli import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, "chat", *arguments],
            stdin=slave,
            stdout=slave if out is None else out,
            stderr=slave,
            env={**os.environ, "TERM": "dumb", **environment},
            start_new_session=True,
        )
        os.close(slave)
        self._said = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def press_ctrl_c(self) -> None:
        """Once it waits: Python sees one that comes just before it waits only when something else comes."""
        until = time.monotonic() + 20
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0] != "S":
            assert time.monotonic() < until, "it never waits"
        os.write(self._master, b"\x03")

    def expect(self, text: str) -> str:
        """What is shown up to this text and with it."""
        until = time.monotonic() + 20
        while text.encode() not in self._said:
            assert select.select([self._master], [], [], max(0, until - time.monotonic()))[0], self._said
            self._said += os.read(self._master, 4096)
        shown, found, self._said = self._said.partition(text.encode())
        return (shown + found).decode(errors="replace")

    def status(self) -> int:
        return self.process.wait(20)


def asked(fake: FakeVllm, number: int = 1) -> list[tuple[str, str]]:
    """The messages of a call that came upstream."""
    body = json.loads(fake.wait_for_request(number).body)
    return [(message["role"], message["content"]) for message in body["messages"]]


def say(text: str, finish: str = "stop") -> list[Step]:
    return stream([event({"content": text}), event({}, finish), DONE])


# One question


def test_the_answer_alone_is_on_standard_output(ask: Ask, gateway: Gateway, fake: FakeVllm) -> None:
    assert ask("What is Deep Learning?", "--url", f"{gateway.url}/v1/") == (0, f"{TEXT}\n", CUT_SHORT)
    assert asked(fake) == [("user", "What is Deep Learning?")]

    fake.queue(say("Yes.\n"))
    assert ask("Sure?", "--url", gateway.url) == (0, "Yes.\n", "")


def test_what_is_piped_in_is_asked_below_the_prompt(ask: Ask, gateway: Gateway, fake: FakeVllm) -> None:
    prompts: list[tuple[list[str], bytes, str]] = [
        (["Hi"], b"", "Hi"),
        (["Hi"], b"\n", "Hi"),
        ([], "Gr\u00fc\u00df\n".encode(), "Gr\u00fc\u00df"),
        (["Summarize:"], b"  one\n\ntwo\r\n", "Summarize:\n\n  one\n\ntwo"),
        ([""], b"one", "one"),
    ]
    for number, (arguments, piped, prompt) in enumerate(prompts, 1):
        assert ask(*arguments, "--url", gateway.url, piped=piped).status == 0
        assert asked(fake, number) == [("user", prompt)]


def test_options_go_upstream(ask: Ask, gateway: Gateway, fake: FakeVllm) -> None:
    ask("Hi", "--url", gateway.url, "--system", "Be short.", "--model", "demo", "--max-tokens", "7")
    ask("Hi", "--url", gateway.url, "--temperature", "0.5")

    sent = [json.loads(received.body) for received in fake.received]
    assert asked(fake) == [("system", "Be short."), ("user", "Hi")]
    assert [(call["model"], call["max_tokens"], call["temperature"]) for call in sent] == [
        ("demo", 7, 0.01),
        ("demo", 1024, 0.5),
    ]


def test_the_gateway_of_this_machines_settings_is_asked(
    ask: Ask, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_PORT", str(gateway.port))
    assert ask("Hi").out == f"{TEXT}\n"

    monkeypatch.setenv("GATEWAY_TLS_CERT_FILE", GOOD)
    monkeypatch.setenv("GATEWAY_HOST", "::1")
    assert f"https://[::1]:{gateway.port} cannot be reached" in ask("Hi").err


@pytest.mark.parametrize(
    "settings",
    [
        {"stream_style": "repr"},
        {"disable_streaming": True},
        {"disable_streaming": True, "compat": "erag-1.4"},
        {"disable_streaming": True, "compat": "erag-2.1"},
    ],
)
def test_it_understands_the_gateway_whatever_its_settings(ask: Ask, fake: FakeVllm, settings: dict[str, Any]) -> None:
    with running(fake.url, **settings) as gateway:
        got = ask("Hi", "--url", gateway.url)

    assert (got.status, got.out) == (0, "It's.\n" if "disable_streaming" in settings else f"{TEXT}\n")


def test_it_understands_completions(ask: Ask, fake: FakeVllm) -> None:
    parts = [orjson.dumps({"choices": [{"index": 0, "text": text}]}) for text in ("a", "b")]
    fake.queue(stream([*(b"data: " + part + b"\n\n" for part in parts), DONE]))
    with running(fake.url, connector="langchain") as gateway:
        assert ask("Hi", "--url", gateway.url) == (0, "ab\n", "")


# From documents


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "deep.md").write_text("Deep learning is \u2026\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("More.")
    return ["--context", "docs/deep.md", "--context", "b.txt"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"disable_streaming": True},
        {"stream_style": "repr"},
        {"compat": "erag-1.4"},
        {"compat": "erag-1.4", "disable_streaming": True},
        {"compat": "erag-2.0"},
        {"compat": "erag-2.0", "disable_streaming": True},
        {"compat": "erag-2.1"},
        {"compat": "erag-2.1", "disable_streaming": True},
    ],
)
def test_it_answers_from_documents_and_cites_them_below(
    ask: Ask, fake: FakeVllm, documents: list[str], settings: dict[str, Any]
) -> None:
    with running(fake.url, **settings) as gateway:
        got = ask("What is Deep Learning?", "--url", gateway.url, *documents)

    text = "It's.\n" if "disable_streaming" in settings else f"{TEXT}\n"
    note = "" if "disable_streaming" in settings else CUT_SHORT
    assert got == (0, text, f"[1] docs/deep.md\n[2] b.txt\n{note}")
    (_, system), (_, user) = asked(fake)
    assert system.startswith("### You are a helpful, respectful and honest assistant. Answer the question from the")
    assert system.endswith(" ### Search results: Deep learning is \u2026\n\n\nMore. \n\n")
    assert user == "### Question: What is Deep Learning? \n\n"


def test_the_readmes_own_instruction_is_given_unless_another_is(
    ask: Ask, gateway: Gateway, fake: FakeVllm, documents: list[str]
) -> None:
    ask("Hi", "--url", gateway.url, *documents)
    ask("Hi", "--url", gateway.url, *documents, "--system", "Be short.")

    given = asked(fake)[0][1].partition(" ### Search results: ")[0]
    assert given in (ROOT / "README.md").read_text()
    assert asked(fake, 2)[0][1].startswith("Be short. ### Search results: Deep")


def test_json_has_the_citations_where_documents_were_given(ask: Ask, gateway: Gateway, documents: list[str]) -> None:
    got = json.loads(ask("Hi", "--url", gateway.url, "--json", *documents).out)

    scores = {"vector_distance": 1.0, "reranker_score": 0.0}
    assert got["citations"] == [
        {"type": "file", "source": "docs/deep.md", **scores, "citation_id": 1},
        {"type": "file", "source": "b.txt", **scores, "citation_id": 2},
    ]


def test_a_conversation_cites_below_each_answer(gateway: Gateway, fake: FakeVllm, documents: list[str]) -> None:
    fake.queue(say("One."), say("Two."))
    with Terminal("--url", gateway.url, *documents) as terminal:
        for question, answer in ((b"first\n", "One."), (b"second\n", "Two.")):
            terminal.expect("> ")
            terminal.type(question)
            terminal.expect(f"{answer}\r\n[1] docs/deep.md\r\n[2] b.txt\r\n")
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.status() == 0

    roles = [role for role, _ in asked(fake, 2)]
    assert roles == ["system", "user", "assistant", "user"]
    assert asked(fake, 2)[3][1] == "### Question: second \n\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "--context file cannot be read (No such file or directory): name text files."),
        (b"\xff", "--context file is not UTF-8: name text files."),
        (b" \n", "--context file is empty: leave it out."),
    ],
)
def test_a_document_that_is_no_text_is_wrong_usage(
    ask: Ask, content: bytes | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("file").write_bytes(content)
    got = ask("Hi", "--context", "file")
    assert (got.status, got.out) == (2, "")
    assert says in got.err


# As JSON


def test_json_has_all_that_is_known(ask: Ask, gateway: Gateway) -> None:
    got = ask("Hi", "--url", gateway.url, "--json")

    (line,) = got.out.splitlines()
    (logged,) = gateway.log(1)
    answer = json.loads(line)
    assert (got.status, got.err) == (0, "")
    assert 0 <= answer.pop("seconds_to_first_token") <= answer.pop("seconds") < 20
    assert answer == {
        "text": TEXT,
        "finish_reason": "length",
        "usage": {"prompt_tokens": 31, "total_tokens": 35, "completion_tokens": 4},
        "model": "demo",
        "request_id": logged["request_id"],
    }


def test_what_fails_is_json_too(ask: Ask, gateway: Gateway, fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, chunk(EVENTS[1]), "close"])
    cut = ask("Hi", "--url", gateway.url, "--json")
    fake.queue([response("404 Not Found", b'{"error":{"message":"no such model","code":404}}')])
    refused = ask("Hi", "--url", gateway.url, "--json", "--model", "none")
    unreachable = ask("Hi", "--url", f"http://127.0.0.1:{free_port()}", "--json")

    got = [json.loads(ended.out) for ended in (cut, refused, unreachable)]
    assert [ended.status for ended in (cut, refused, unreachable)] == [1, 1, 3]
    assert [answer["error"]["code"] for answer in got] == ["upstream_broken", 404, "unreachable"]
    assert [answer["text"] for answer in got] == ["It's", "", ""]
    assert (got[0]["error"]["request_id"], got[2]["request_id"]) == (got[0]["request_id"], None)


# What goes wrong


def test_an_answer_that_is_cut_is_a_failure(ask: Ask, gateway: Gateway, fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, chunk(EVENTS[1]), "close"])

    got = ask("Hi", "--url", gateway.url)

    (logged,) = gateway.log(1)
    assert (got.status, got.out) == (1, "It's\n")
    assert got.err.startswith("vllm-gateway: The model server broke off")
    assert got.err.endswith(f" (request {logged['request_id']})\n")


def test_the_models_own_refusal_is_shown(ask: Ask, fake: FakeVllm) -> None:
    told = b'{"error":{"message":"This model\'s maximum context length\\n is 1024 tokens.\\u001b[2J","code":400}}'
    for settings in ({}, {"compat": "erag-1.4"}):
        fake.queue([response("400 Bad Request", told)])
        with running(fake.url, **settings) as gateway:
            got = ask("Hi", "--url", gateway.url)
        assert (got.status, got.out) == (1, "")
        assert "vllm-gateway: This model's maximum context length is 1024 tokens.\\u001b[2J (request " in got.err


def test_a_model_that_is_not_known_yet(ask: Ask) -> None:
    with running(f"http://127.0.0.1:{free_port()}") as early:
        too_early = ask("Hi", "--url", early.url)

    assert too_early.status == 1
    assert "No model server has answered yet" in too_early.err


def test_a_key_comes_from_the_environment(ask: Ask, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(fake.url, api_keys=KEY) as gateway:
        without = ask("Hi", "--url", gateway.url)
        monkeypatch.setenv("GATEWAY_CHAT_KEY", KEY)
        with_it = ask("Hi", "--url", gateway.url)
        load()  # it is no name that stops a gateway
        monkeypatch.setenv("GATEWAY_CHAT_KEY", "no key\n")
        wrong = ask("Hi", "--url", gateway.url)
        logged = gateway.log(2)

    assert (without.status, with_it.status, wrong.status) == (1, 0, 2)
    assert "A key is needed" in without.err
    assert "`chat` takes it from GATEWAY_CHAT_KEY." in without.err
    assert "no key" not in wrong.err
    assert KEY not in str(logged) + without.err


HTML = [response("200 OK", b"<html>", kind="text/html; charset=utf-8")]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (HTML, "does not seem to be a gateway: it answers 200 with text/html."),
        ([response("404 Not Found", b"no", kind="text/plain")], "it answers 404 with text/plain."),
        ([response("302 Found", b"", "location: /login", kind="")], "it answers 302 with no content type."),
        ([response("200 OK", b'{"hello": 1}')], "it answers 200 with application/json."),
        ([response("200 OK", b'{"text": ["Hi"]}')], "it answers 200 with application/json."),
        ([response("200 OK", b"[1]")], "it answers 200 with application/json."),
        ([response("500 Oops", b'{"text": "Hi"}')], "it answers 500 with application/json."),
        (stream([b"data: 'a'\n\n"]), "it answers 200 with text/event-stream."),
        (stream([b"data: {}\n\n"]), "it answers 200 with text/event-stream."),
        (stream([b"data: " + b"a" * 2_000_000]), "it answers 200 with text/event-stream."),
        (stream([EVENTS[1]]), "broke off: the answer has no end."),
        ([STREAM_HEAD, chunk(EVENTS[1]), "close"], "broke off: peer closed connection without sending complete"),
        (["close"], "broke off: Server disconnected without sending a response."),
        (["reset"], "broke off: Connection reset by peer."),
        ([b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "close"], "broke off: illegal status line"),
        ([response("404 Not Found", b'{"detail": "Not Found"}')], "vllm-gateway: Not Found"),
    ],
)
def test_what_is_no_gateway_is_told_of(ask: Ask, fake: FakeVllm, script: Sequence[Step], says: str) -> None:
    fake.queue(script)

    got = ask("Hi", "--url", fake.url)

    assert got.status == 1
    assert says in got.err
    assert got.err.count("\n") == 1


def test_a_gateway_that_cannot_be_reached_has_a_status_of_its_own(
    ask: Ask, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert ask("Hi", "--url", url) == (
        3,
        "",
        f"vllm-gateway: {url} cannot be reached (Connection refused): `vllm-gateway up` or `serve` starts a gateway, "
        "--url names another.\n",
    )
    with running(fake.url, tls_cert_file=GOOD) as gateway:
        unknown = ask("Hi", "--url", gateway.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
        known = ask("Hi", "--url", gateway.url)
    assert (unknown.status, known.status) == (3, 0)
    assert "(certificate verify failed: unable to get local issuer certificate)" in unknown.err


@pytest.mark.parametrize(
    ("arguments", "piped", "says"),
    [
        ([], b"", "There is nothing to ask: give a prompt, or pipe a text in."),
        ([" "], b"\n", "There is nothing to ask"),
        ([], b"\xff", "What is piped in is not UTF-8."),
        (["\udcff"], b"", "Invalid value for '[PROMPT]': it is not UTF-8."),
        (["Hi", "--url", "localhost:9000"], b"", "a gateway is named as http://host:9000"),
        (["Hi", "--url", "http://me:secret@host"], b"", "without a user or password"),
        (["Hi", "--max-tokens", "0"], b"", "'--max-tokens'"),
    ],
)
def test_wrong_usage_has_a_status_of_its_own(ask: Ask, arguments: list[str], piped: bytes, says: str) -> None:
    got = ask(*arguments, piped=piped)

    assert (got.status, got.out) == (2, "")
    assert says in got.err
    assert "secret" not in got.err


def test_a_wrong_setting_matters_where_it_is_read(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "x")

    assert ask("Hi") == (2, "", "vllm-gateway: GATEWAY_PORT is wrong: 'x'. Allowed: a number.\n")
    assert ask("Hi", "--url", f"http://127.0.0.1:{free_port()}").status == 3


# Pipes and terminals


def test_who_stops_reading_ends_it_quietly(gateway: Gateway, fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue([STREAM_HEAD, chunk(event({"content": "one\n"})), hold, chunk(event({"content": "two\n"})), 30.0])
    reads, writes = os.pipe()
    command = [sys.executable, "-m", "gateway", "chat", "--url", gateway.url, "Hi"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writes, stderr=subprocess.PIPE) as process:
        os.close(writes)
        assert os.read(reads, 100) == b"one\n"
        os.close(reads)
        hold.release()
        _, err = process.communicate(timeout=20)

    assert (process.returncode, err) == (128 + signal.SIGPIPE, b"")
    assert fake.wait_for_request().closed.wait(5)


def test_an_answer_that_cannot_be_written_is_a_failure(
    ask: Ask, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        no_room = ask("Hi", "--url", gateway.url)
    monkeypatch.setattr(sys, "stdout", None)  # as a start with >&- has it
    closed = ask("Hi", "--url", gateway.url)

    assert no_room == (1, "", "vllm-gateway: The answer cannot be written: No space left on device.\n")
    assert closed == (1, "", "vllm-gateway: The answer cannot be written: it is closed.\n")


def test_an_answer_does_not_drive_the_terminal(
    ask: Ask, gateway: Gateway, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.queue(say(DRIVING), say(DRIVING), say(DRIVING))
    assert ask("Hi", "--url", gateway.url).out == f"{DRIVING}\n"

    master, slave = pty.openpty()
    with os.fdopen(master, "rb") as terminal, os.fdopen(slave, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        ask("Hi", "--url", gateway.url)
        # By lines: a terminal may hand over what was written to it in several pieces.
        assert terminal.readline() == b"a\\u001b[31mb\\u001b]0;c\\u0007de\\u009b2Jf\\u007fg\r\n"
        assert terminal.readline() == b"\th\r\n"
        ask("Hi", "--url", gateway.url, "--json")
        assert json.loads(terminal.readline())["text"] == DRIVING


def test_what_the_terminal_has_no_letter_for_is_no_error(
    ask: Ask, gateway: Gateway, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake.queue(say("Gr\u00fc\u00df \u2603"), say("\u2603"))
    file = tmp_path / "out"
    with file.open("w", encoding="latin-1") as out:
        monkeypatch.setattr(sys, "stdout", out)
        ask("Hi", "--url", gateway.url)
        ask("Hi", "--url", gateway.url, "--json")

    text, answer = file.read_bytes().splitlines()
    assert text == "Gr\u00fc\u00df ?".encode("latin-1")
    assert json.loads(answer)["text"] == "\u2603"


def test_ctrl_c_ends_the_reading_of_a_pipe(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("gateway.commands.chat.read_prompt", interrupted)
    assert ask("Hi") == (130, "", "")


def test_in_the_background_ctrl_c_stays_ignored(ask: Ask, gateway: Gateway) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert ask("Hi", "--url", gateway.url).status == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_ctrl_c_ends_one_answer_with_a_status_of_its_own(gateway: Gateway, fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, chunk(EVENTS[1]), 30.0])
    with Terminal("Hi", "--url", gateway.url) as terminal:
        terminal.expect("It's")
        terminal.press_ctrl_c()
        assert terminal.expect("Stopped.\r\n") == "^C\r\nvllm-gateway: Stopped.\r\n"
        assert terminal.status() == 130

    assert fake.received[0].closed.wait(5)


# A conversation


def test_a_conversation(gateway: Gateway, fake: FakeVllm, tmp_path: Path) -> None:
    """It is told whole each time; Ctrl-C stops an answer, and nothing else; Ctrl-D leaves."""
    going: list[Step] = [STREAM_HEAD, chunk(event({"content": "Some"})), 30.0]
    fake.queue(say("One."), going, [30.0], say("Two."), say("Three."))
    with Terminal("--url", gateway.url, "--system", "Be short.", HOME=str(tmp_path)) as terminal:
        greeting = terminal.expect("> ")
        assert f"Talking to {gateway.url}." in greeting
        assert "Ctrl-D or /exit leaves." in greeting
        terminal.type(b"first\n")
        assert terminal.expect("> ").endswith("first\r\nOne.\r\n> ")
        terminal.type(b"\n")
        assert terminal.expect("> ") == "\r\n> "

        terminal.type(b"second\n")
        terminal.expect("Some")
        terminal.press_ctrl_c()
        assert terminal.expect("> ") == "^C\r\nvllm-gateway: Stopped.\r\n> "
        assert fake.wait_for_request(2).closed.wait(5)

        terminal.type(b"third\n")
        fake.wait_for_request(3)
        terminal.press_ctrl_c()
        assert terminal.expect("> ") == "third\r\n^C\r\nvllm-gateway: Stopped.\r\n> "
        assert fake.received[2].closed.wait(5)

        terminal.type(b"never sent")
        terminal.expect("sent")
        terminal.press_ctrl_c()
        assert terminal.expect("> ").endswith("\r\nvllm-gateway: Ctrl-D or /exit leaves.\r\n> ")
        terminal.type(b"fourth\n")
        terminal.expect("Two.\r\n> ")
        terminal.type(b"\x1b[A\n")  # the arrow that brings the last line again
        terminal.expect("Three.\r\n> ")
        terminal.type(CTRL_D)
        assert terminal.status() == 0

    said = [("system", "Be short."), ("user", "first"), ("assistant", "One."), ("user", "second")]
    said += [("assistant", "Some"), ("user", "fourth")]
    assert [asked(fake, 2), asked(fake, 3), asked(fake, 4)] == [said[:4], [*said[:5], ("user", "third")], said]
    assert asked(fake, 5) == [*said, ("assistant", "Two."), ("user", "fourth")]
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_in_json_goes_on_after_what_fails(gateway: Gateway, fake: FakeVllm) -> None:
    refused = response("400 Bad Request", b'{"error":{"message":"Too long."}}')
    fake.queue(say("One."), [refused], [30.0], say("Two."))
    reads, writes = os.pipe()
    with Terminal("--url", gateway.url, "--json", out=writes) as terminal, os.fdopen(reads) as lines:
        os.close(writes)
        for number, text in enumerate((b"first\n", b"\xff\n", b"second\n", b"stopped\n", b"third\n", b" /exit\n")):
            terminal.expect("> ")
            terminal.type(text)
            if number == 3:
                fake.wait_for_request(3)
                terminal.press_ctrl_c()
        assert terminal.status() == 0
        got = [json.loads(line) for line in lines]

    assert [(answer["text"], answer.get("error")) for answer in got] == [
        ("One.", None),
        ("", {"message": "Too long."}),
        ("", {"message": "Stopped.", "code": "stopped"}),
        ("Two.", None),
    ]
    assert asked(fake, 4) == [("user", "first"), ("assistant", "One."), ("user", "third")]
