"""Conversations written down, one a file in tests/corpus: what is asked, what goes upstream, what comes back.

A file is made of sections, each begun by a line with three hyphens. Only the first and the last need to be there:

    --- POST /v1/chat/completions stream_style=repr      method, path, settings of the data path
    --- upstream POST /v1/chat/completions               what vLLM is asked; its JSON is compared as values
    --- answer 200 application/json                      what vLLM answers
    --- reply 200 application/json                       what the client gets, to the byte

The last newline before a section is not part of what stands above it. ␀ stands for a NUL. The request's id is `corpus`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.dialects.erag import STYLES
from gateway.wire.routes import ROUTES, Route
from tests.support.recorders import Conversation

FILES = sorted((Path(__file__).parent / "corpus").glob("*.txt"))
BY_PATH: dict[tuple[str, str], Route] = {(route.method, route.path): route for route in ROUTES}


def sections(text: str) -> dict[str, tuple[list[str], bytes]]:
    """The words behind each section's name, and what stands in it."""
    found = {}
    for part in re.split(r"^--- ", text, flags=re.MULTILINE)[1:]:
        line, _, content = part.partition("\n")
        name, *words = line.split()
        if name in ("GET", "POST"):
            name, words = "request", [name, *words]
        found[name] = (words, content.removesuffix("\n").replace("␀", "\0").encode())
    return found


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_conversation_goes_as_it_is_written(file: Path, step: int) -> None:
    parts = sections(file.read_text())
    (method, path, *given), request = parts["request"]
    settings: dict[str, Any] = dict(word.split("=") for word in given)
    if "compat" in settings:
        settings["stream_style"] = STYLES[settings["compat"]]
    talk = Conversation(
        route=BY_PATH[method, path], headers=((b"x-request-id", b"corpus"),), models=("demo",), **settings
    )
    talk.ask(request)

    if "upstream" in parts:
        connection = talk.connect()
        (upstream_method, target), call = parts["upstream"]
        assert connection.request_line.decode() == f"{upstream_method} {target} HTTP/1.1"
        assert orjson.loads(connection.request_body) == orjson.loads(call)
        (status, kind), answer = parts["answer"]
        talk.head(int(status), [(b"content-type", kind.encode())])
        if "␀" in file.read_text():  # what comes at once is one object there
            step = len(answer)
        for at in range(0, len(answer), step):
            talk.exchange.upstream_body(answer[at : at + step])
        talk.exchange.upstream_end()
        talk.clock.advance(1)  # what goes out event by event

    (status, *kinds), reply = parts["reply"]
    assert talk.client.status == int(status)
    assert talk.client.content == reply
    assert (talk.client.header(b"content-type") or b"").decode().partition(";")[0] == "".join(kinds)
    assert talk.client.ending == "end"
    talk.assert_settled()


def test_every_form_and_style_stands_in_the_corpus() -> None:
    names = " ".join(file.stem for file in FILES)
    for dialect in (
        "erag-1.0",
        "erag-1.4",
        "erag-2.1",
        "compat-1.4",
        "compat-2.1",
        "openai",
        "generate",
        "ask",
        "messages",
        "responses",
    ):
        assert f"{dialect}-whole" in names or dialect == "ask", dialect
        assert f"{dialect}-stream" in names, dialect
