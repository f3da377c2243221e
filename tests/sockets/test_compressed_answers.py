"""Answers that come compressed: relayed as they are, and a 502 where they would have to be rewritten."""

from __future__ import annotations

import gzip
from typing import Any

import pytest

from tests.support.fake_vllm import (
    EVENTS,
    STREAM_END,
    STREAM_HEAD,
    FakeVllm,
    Received,
    Step,
    chunk,
    completion,
    response,
)
from tests.support.gateway_process import running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
TURNS = [{"role": "user", "content": "Hi"}]
WHOLE = {"model": "demo", "messages": TURNS}
STREAM = {**WHOLE, "stream": True}
COMPRESSED = "content-encoding: gzip"
ANSWER = response("200 OK", gzip.compress(completion()), COMPRESSED)
EVENT_STREAM: list[Step] = [
    STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n"),
    chunk(gzip.compress(b"".join(EVENTS))),
    STREAM_END,
]

REWRITTEN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "simplified": (CHAT, {"messages": {"user": "Hi"}, "streaming": False}, {}),
    "simplified stream": (CHAT, {"messages": {"user": "Hi"}}, {}),
    "repr": (CHAT, {"messages": {"user": "Hi"}, "stream_style": "repr"}, {}),
    "generate": ("/generate", {"prompt": "Hi"}, {}),
    "ask": ("/api/v1/ask", {"question": "Hi"}, {}),
    "langchain": (CHAT, {"messages": {"user": "Hi"}, "streaming": False}, {"connector": "langchain"}),
    "a release": (CHAT, {"messages": {"user": "Hi"}, "streaming": False}, {"compat": "erag-1.4"}),
    "counted": (CHAT, STREAM, {"count_tokens": "on"}),
}


def asked_for(request: Received) -> list[str]:
    return [value for name, value in request.headers if name == "accept-encoding"]


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_has_to_be_rewritten_is_asked_for_as_it_is(fake: FakeVllm, name: str) -> None:
    path, body, settings = REWRITTEN[name]
    with running(fake.url, **settings) as gateway, gateway.client() as client:
        for headers in ({"accept-encoding": "gzip, br"}, {"accept-encoding": "*;q=0.5"}):
            client.post(path, json=body, headers=headers)
    assert [asked_for(request) for request in fake.received] == [["identity"]] * 2


def test_what_is_relayed_is_asked_for_as_the_client_did(fake: FakeVllm) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        for body in (WHOLE, STREAM):
            client.post(CHAT, json=body, headers={"accept-encoding": "gzip, br"})
    assert [asked_for(request) for request in fake.received] == [["gzip, br"]] * 2


@pytest.mark.parametrize("name", REWRITTEN)
def test_one_that_has_to_be_rewritten_and_is_compressed_is_a_502_and_no_fault_of_the_upstream(
    fake: FakeVllm, name: str
) -> None:
    path, body, settings = REWRITTEN[name]
    streams = name in ("simplified stream", "repr", "ask", "counted")
    with running(fake.url, **settings) as gateway, gateway.client() as client:
        for _ in range(4):
            fake.queue(EVENT_STREAM if streams else [ANSWER])
            got = client.post(path, json=body)
            assert got.status_code == 502
            assert "is compressed ('gzip')" in got.text
        assert {line["outcome"] for line in gateway.log(4)} == {"upstream_error"}
        told = client.get("/v1/health_check")
        assert (told.status_code, told.json()["upstreams"][0]["state"]) == (200, "serving")
        # One that was told by its head alone, which a connection knows again.
        fake.queue([ANSWER], [ANSWER])
        assert client.post(CHAT, json=WHOLE).json() == client.post(CHAT, json=WHOLE).json()


def test_one_that_is_relayed_goes_on_as_it_came(fake: FakeVllm) -> None:
    fake.queue([ANSWER], EVENT_STREAM, [ANSWER], [ANSWER])
    with running(fake.url) as gateway, gateway.client() as client:
        got = client.post(CHAT, json=WHOLE)
        assert (got.headers["content-encoding"], got.content) == ("gzip", completion())
        assert client.post(CHAT, json=STREAM).content == b"".join(EVENTS)
        # A head that is known again is read by what is asked, too.
        assert client.post(CHAT, json=WHOLE).content == completion()
        assert client.post(CHAT, json={"messages": "Hi", "streaming": False}).status_code == 502


def test_one_that_is_said_not_to_be_compressed_is_read(fake: FakeVllm) -> None:
    head = STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: Identity\r\n\r\n")
    fake.queue(
        [response("200 OK", completion(), "content-encoding: identity")], [head, *map(chunk, EVENTS), STREAM_END]
    )
    with running(fake.url) as gateway, gateway.client() as client:
        assert client.post(CHAT, json={"messages": "Hi", "streaming": False}).json()["text"] == "It's."
        assert client.post(CHAT, json={"messages": "Hi", "stream_style": "repr"}).text.endswith("data: [DONE]\n\n")


def test_an_error_in_a_releases_words_is_read_too(fake: FakeVllm) -> None:
    refusal = response("400 Bad Request", gzip.compress(b'{"error":{"message":"no"}}'), COMPRESSED)
    call = {"messages": {"user": "Hi"}, "streaming": False}
    for settings, status in (({"compat": "erag-1.4"}, 502), ({}, 400)):
        fake.queue([refusal])
        with running(fake.url, **settings) as gateway, gateway.client() as client:
            assert client.post(CHAT, json=call).status_code == status
