"""The command `chat`: asks a running gateway and shows the answer as it streams."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click
import httpx
import orjson

from gateway.config.settings import CLIENT_KEY
from gateway.wire import sse

Json = dict[str, Any]

# Exit statuses; 2 is click's, for wrong usage.
FAILED = 1
UNREACHABLE = 3
STOPPED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE

_CHAT = "/v1/chat/completions"
_CONNECT_SECONDS = 5
_LARGEST_EVENT = 1024 * 1024
# The prompt of a RAG pipeline, as in the README.
_INSTRUCTION = (
    "### You are a helpful, respectful and honest assistant. Answer the question from the search results, which come "
    "from the local knowledge base. Ignore what is not relevant to the question. If you do not know the answer, say so."
)
_SOURCES = b"json: "
_LEAVING = "Ctrl-D or /exit leaves."
# Control characters in an answer must not reach a terminal. Escaped as \uXXXX, JSON stays valid JSON.
_DRIVING = [code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\r\n\t"]
_SHOWN = {ord("\r"): "", **{code: f"\\u{code:04x}" for code in _DRIVING}}


class Unwritable(Exception):
    """Standard output cannot be written any more; the cause says why."""


class Failed(Exception):
    """The answer is missing or incomplete; holds the error in OpenAI's form and the exit status."""

    def __init__(self, error: Json, status: int = FAILED) -> None:
        super().__init__(error["message"])
        self.error = error
        self.status = status


@dataclass(frozen=True)
class ChatOptions:
    """The gateway to ask, and the request; `fields` are the request's fields beside its messages.

    `documents` are the context of the answer, in the form of a retriever's documents.
    """

    url: str
    key: str | None = field(repr=False)
    system: str | None
    fields: Json
    as_json: bool
    documents: list[Json] = field(default_factory=list)

    def system_text(self) -> str | None:
        """The text of the system message, with the documents."""
        if not self.documents:
            return self.system
        results = "\n\n".join(document["text"] for document in self.documents)
        return f"{self.system or _INSTRUCTION} ### Search results: {results} \n\n"

    def user_text(self, prompt: str) -> str:
        """The text of the user message."""
        return f"### Question: {prompt} \n\n" if self.documents else prompt


@dataclass
class Answer:
    """The answer received so far; its fields are the fields of the JSON output."""

    text: str = ""
    finish_reason: str | None = None
    usage: Json | None = None
    model: str | None = None
    request_id: str | None = None
    seconds_to_first_token: float | None = None
    seconds: float = 0.0
    citations: list[Json] | None = None

    def take(self, told: Json) -> str:
        """Store the values of a chunk or a whole reply, and return its text.

        Raises ValueError, LookupError, TypeError or AttributeError for data that is neither.
        """
        self.model = told.get("model") or self.model
        self.usage = told.get("usage") or self.usage
        self.cite(told.get("data"))
        for choice in told.get("choices", []):
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return "".join([told["text"]] if "text" in told else map(_text, told["choices"]))

    def cite(self, data: Json | None) -> None:
        """Store the citations of a reply's `data`, if it has any."""
        if data and data.get("reranked_docs"):
            self.citations = [{**one} for one in data["reranked_docs"]]


class CtrlC:
    """Makes Ctrl-C raise KeyboardInterrupt inside `heard`, once, and nowhere else."""

    def __init__(self) -> None:
        self._heard = False
        # A shell makes its background processes ignore SIGINT; keep that.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._pressed)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Ctrl-C raises KeyboardInterrupt inside this context."""
        self._heard = True
        try:
            yield
        finally:
            self._heard = False

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self._heard:
            self._heard = False
            raise KeyboardInterrupt


class Output:
    """Standard output, which gets the answers and nothing else."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise Unwritable from OSError("it is closed")
        self._terminal = sys.stdout.isatty()
        self._in_line = False

    def write(self, text: str, encoding: str | None = None) -> None:
        """Write and flush, in the encoding of standard output unless another is given. Raises Unwritable."""
        if self._terminal:
            text = text.translate(_SHOWN)
        if not text:
            return
        self._in_line = not text.endswith("\n")
        try:
            sys.stdout.buffer.write(text.encode(encoding or sys.stdout.encoding, "replace"))
            sys.stdout.buffer.flush()
        except OSError as error:
            # Python would flush the rest of the buffer at its exit, and report the error again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise Unwritable from error

    def end_line(self) -> None:
        """End the current line, so that the next text begins a line."""
        if self._in_line:
            self.write("\n")


def read_prompt(prompt: str | None) -> str | None:
    """The prompt, with piped input below it; None if there is neither and standard input is a terminal.

    Raises ValueError, whose text says why there is nothing to ask.
    """
    piped = None
    if sys.stdin is not None and not sys.stdin.isatty():
        try:
            piped = sys.stdin.buffer.read().decode().strip("\r\n")
        except UnicodeDecodeError:
            raise ValueError("What is piped in is not UTF-8.") from None
    elif sys.stdin is not None and prompt is None:
        return None
    texts = [text for text in (prompt, piped) if text and not text.isspace()]
    if not texts:
        raise ValueError("There is nothing to ask: give a prompt, or pipe a text in.")
    return "\n\n".join(texts)


def read_documents(files: Sequence[str]) -> list[Json]:
    """The files' texts as a retriever's documents, numbered from 1. Raises ValueError, which names the file."""
    documents = []
    for number, file in enumerate(files, 1):
        try:
            text = Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--context {file} is not UTF-8: name text files.") from None
        except OSError as error:
            raise ValueError(f"--context {file} cannot be read ({error.strerror}): name text files.") from None
        if not text.strip():
            raise ValueError(f"--context {file} is empty: leave it out.")
        documents.append({"text": text, "metadata": {"source": file, "citation_id": number}})
    return documents


def run(options: ChatOptions, prompt: str | None) -> int:
    """Ask once, or without a prompt start a conversation at the terminal; returns the exit status."""
    try:
        chat = Chat(options, Output(), CtrlC())
        return chat.talk() if prompt is None else chat.ask(prompt)
    except Unwritable as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return UNREAD
        _note(f"The answer cannot be written: {_reason(error.__cause__)}.")
        return FAILED


class Chat:
    """A conversation with a gateway; each question is sent with all messages before it."""

    def __init__(self, options: ChatOptions, output: Output, ctrl_c: CtrlC) -> None:
        self._options = options
        self._output = output
        self._ctrl_c = ctrl_c
        system = options.system_text()
        self._messages: list[Json] = [{"role": "system", "content": system}] if system else []
        # Only for https: reading all of the system's certificates takes a while.
        secure = options.url.startswith("https:")
        self._tls = ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def talk(self) -> int:
        """Ask each typed question, until the user leaves."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives input() line editing and a history
        _note(f"Talking to {self._options.url}. Ctrl-C stops an answer. {_LEAVING}")
        while True:
            try:
                with self._ctrl_c.heard():
                    prompt = _typed()
            except KeyboardInterrupt:
                _note(_LEAVING, behind_key=True)
            except EOFError:
                click.echo(err=True)
                return 0
            except UnicodeError:
                _note("That was not UTF-8.")
            else:
                if prompt.strip() == "/exit":
                    return 0
                if prompt.strip():
                    self.ask(prompt)

    def ask(self, prompt: str) -> int:
        """Ask, and show the answer; returns the exit status."""
        messages = [*self._messages, {"role": "user", "content": self._options.user_text(prompt)}]
        answer, failure, began = Answer(), None, time.monotonic()
        try:
            with self._ctrl_c.heard():
                self._fetch(messages, answer, began)
        except KeyboardInterrupt:
            failure = Failed({"message": "Stopped.", "code": "stopped"}, STOPPED)
        except Failed as error:
            failure = error
        answer.seconds = _since(began)
        if answer.text:  # drop a question without an answer: models expect questions and answers in turns
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        self._end(answer, failure)
        return failure.status if failure else 0

    def _end(self, answer: Answer, failure: Failed | None) -> None:
        if self._options.as_json:
            told = vars(answer) | ({"error": failure.error} if failure else {})
            if not self._options.documents:
                del told["citations"]
            self._output.write(orjson.dumps(told).decode() + "\n", "utf-8")
            return
        self._output.end_line()
        for citation in answer.citations or []:
            _say(f"[{citation.get('citation_id')}] {_source(citation)}")
        if failure is None:
            if answer.finish_reason not in (None, "stop"):
                _note(f"The answer is cut short (finish_reason {answer.finish_reason}).")
        elif failure.status == STOPPED:
            _note(str(failure), behind_key=not answer.text)
        else:
            hint = f" `chat` takes it from {CLIENT_KEY}." if failure.error.get("code") == "invalid_api_key" else ""
            known = f" (request {answer.request_id})" if answer.request_id else ""
            _note(f"{failure}{hint}{known}")

    def _fetch(self, messages: list[Json], answer: Answer, began: float) -> None:
        """Send the call and show the answer. The connection is closed in any case. Raises Failed."""

        def take(text: str) -> None:
            if text and not answer.text:
                answer.seconds_to_first_token = _since(began)
            answer.text += text
            if not self._options.as_json:
                self._output.write(text)

        options = self._options
        # The simplified form: the gateway then chooses the model and the default sampling.
        body = {"messages": messages, "streaming": True, "stream_style": "openai", **options.fields}
        body["stream_options"] = {"include_usage": True}
        if options.documents:
            body["data"] = {"reranked_docs": options.documents}
        headers = {"content-type": "application/json"}
        if options.key:
            headers["authorization"] = f"Bearer {options.key}"
        # Only a connect timeout: the gateway enforces its own timeouts, and reports them.
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        try:
            with (
                # Ignore the environment's proxy, which is set for downloads.
                httpx.Client(trust_env=False, timeout=timeout, verify=self._tls) as client,
                client.stream("POST", options.url + _CHAT, content=orjson.dumps(body), headers=headers) as reply,
            ):
                answer.request_id = reply.headers.get("x-request-id")
                _read(reply, answer, take, options.url, awaits_sources=bool(options.documents))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            message = (
                f"{options.url} cannot be reached ({_reason(error)}): `vllm-gateway up` or `serve` starts a gateway, "
                "--url names another."
            )
            raise Failed({"message": message, "code": "unreachable"}, UNREACHABLE) from None
        except httpx.HTTPError as error:
            raise _broke_off(options.url, _reason(error)) from None


def _read(
    reply: httpx.Response, answer: Answer, take: Callable[[str], None], url: str, *, awaits_sources: bool
) -> None:
    """Read the gateway's reply, a stream or (if it disables streaming) a whole reply. Raises Failed.

    `awaits_sources`: under GATEWAY_COMPAT the citations come as a line of their own after the end of the stream.
    """
    ok = reply.status_code == httpx.codes.OK
    kind = reply.headers.get("content-type", "").partition(";")[0]
    seems = f"it answers {reply.status_code} with {kind or 'no content type'}"
    if ok and kind == "text/event-stream":
        decoder = sse.Decoder(_LARGEST_EVENT)
        pieces = reply.iter_bytes()
        for data in pieces:
            with _understanding(url, seems):
                events = decoder.feed(data)
            for event in events:
                if event == sse.DONE:
                    if awaits_sources and answer.citations is None:
                        with _understanding(url, seems):
                            answer.cite(_sources_after(data, pieces))
                    return
                with _understanding(url, seems):
                    text = answer.take(_told(event))
                take(text)
        raise _broke_off(url, "the answer has no end")
    content = reply.read() if kind == "application/json" else b""
    with _understanding(url, seems):
        told = _told(content)
        text = answer.take(told if ok else {})
    take(text)


def _sources_after(data: bytes, pieces: Iterator[bytes]) -> Json | None:
    """The JSON of the line after the end of the stream, read from this piece and the next ones."""
    rest = data.rpartition(sse.DONE)[2]
    for piece in pieces:
        rest += piece
        if len(rest) > _LARGEST_EVENT:
            return None
    line = rest.strip()
    told: Json | None = orjson.loads(line.removeprefix(_SOURCES)) if line.startswith(_SOURCES) else None
    return told


def _source(citation: Json) -> str:
    """The source of a cited document."""
    parts = [citation.get(name) for name in ("url", "bucket_name", "object_name", "source")]
    return "/".join(str(part) for part in parts if part)


@contextlib.contextmanager
def _understanding(url: str, seems: str) -> Iterator[None]:
    """Turn the errors of parsing bytes that no gateway would send into Failed."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Failed({"message": f"{url} does not seem to be a gateway: {seems}.", "code": "no_gateway"}) from None


def _told(data: bytes) -> Json:
    told: Json = orjson.loads(data)
    error = told.get("error", told.get("detail"))
    if error is not None:
        raise Failed({"message": error} if isinstance(error, str) else {**error, "message": str(error["message"])})
    return told


def _text(choice: Json) -> str:
    # A chat chunk has a delta, a completion chunk has the text itself.
    return choice["delta"].get("content") or "" if "delta" in choice else choice["text"]


def _broke_off(url: str, why: str) -> Failed:
    return Failed({"message": f"{url} broke off: {why}.", "code": "broke_off"})


def _typed() -> str:
    """Read one line. Raises EOFError at the end of the input, UnicodeError for invalid text."""
    if sys.stdout.isatty():
        line = input("> ")
    else:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
    line.encode()
    return line.removesuffix("\n")


def _note(text: str, *, behind_key: bool = False) -> None:
    """Write a message to standard error; `behind_key` first ends the line on which the terminal shows ^C."""
    if behind_key and sys.stderr is not None and sys.stderr.isatty():
        click.echo(err=True)
    _say(f"vllm-gateway: {text}")


def _say(text: str) -> None:
    click.echo(" ".join(text.split()).translate(_SHOWN), err=True)


def _reason(error: BaseException | None) -> str:
    """The error's text without error numbers and source positions, which only a program reads."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$|\.$", "", str(error)) or type(error).__name__


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
