"""What a gateway that stands in for a release answers; its replies and streams to the byte are in the corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.dialects.erag import to_upstream_error
from tests.support.fake_vllm import EVENTS, UNTOLD, FakeVllm, response, stream
from tests.support.gateway_process import running
from tests.support.ports import free_port

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
CALL = {"messages": {"user": "hi"}}


@pytest.fixture
def client(fake: FakeVllm) -> Iterator[httpx.Client]:
    with running(fake.url, compat="erag-1.4", max_body_bytes=2048) as gateway, gateway.client() as client:
        yield client


def test_streams_and_replies_are_that_releases(client: httpx.Client) -> None:
    assert client.post(CHAT, json=CALL).text.startswith("data: ''\n\ndata: \"It's\"\n\n")
    reply = client.post(CHAT, json={**CALL, "streaming": False}).json()
    assert list(reply) == ["id", "text", "prompt", "streaming", "output_guardrail_params", "data"]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"content": b" " * 4096}, 413, "The request's body must be at most 2048 bytes (GATEWAY_MAX_BODY_BYTES)."),
    ({"content": b"{}", "headers": {"content-encoding": "gzip"}}, 415, "Content-Encoding must be absent"),
    (
        {"json": {"messages": {"user": "hi"}, "data": {"reranked_docs": "x"}}},
        400,
        "data.reranked_docs must be",
    ),
    ({"json": {"messages": {"user": "hi"}, "n": 999}}, 400, "n must be at most 128 (GATEWAY_MAX_N), but it is 999."),
]


@pytest.mark.parametrize(("sent", "status", "said"), REFUSED)
def test_refusals_are_details(client: httpx.Client, sent: dict[str, Any], status: int, said: str) -> None:
    got = client.post(CHAT, **sent)
    assert (got.status_code, got.headers["content-type"], list(got.json())) == (status, "application/json", ["detail"])
    assert got.json()["detail"].startswith(said)
    assert got.headers["x-request-id"]


def test_what_the_model_server_refuses_is_a_detail_too(client: httpx.Client, fake: FakeVllm) -> None:
    error = b'{"error":{"message":"busy","type":"x","param":null,"code":429}}'
    for streaming in (True, False):
        fake.queue([response("429 Too Many Requests", error, "retry-after: 7")])
        got = client.post(CHAT, json={**CALL, "streaming": streaming})
        assert (got.status_code, got.json(), got.headers["retry-after"]) == (429, {"detail": "busy"}, "7")
        assert got.headers.get_list("content-type") == ["application/json"]


def test_openais_calls_keep_openais_errors_and_answers(client: httpx.Client, fake: FakeVllm) -> None:
    openai = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
    assert "choices" in client.post(CHAT, json=openai).json()
    fake.queue([response("400 Bad Request", b'{"error":{"message":"no"}}')])
    assert client.post(CHAT, json=openai).content == b'{"error":{"message":"no"}}'
    assert client.post("/v1/completions", content=b"{").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/nowhere").json()["error"]["code"] == "path_not_found"


def test_a_model_server_that_is_down_is_a_detail() -> None:
    with running(f"http://127.0.0.1:{free_port()}", compat="erag-2.1") as gateway, gateway.client() as client:
        got = client.post(CHAT, json={**CALL, "model": "demo"})
        assert (got.status_code, list(got.json())) == (503, ["detail"])


def test_the_newer_release_has_openais_chunks_and_what_is_cited_behind_them(fake: FakeVllm) -> None:
    fake.queue(stream(EVENTS), stream(EVENTS))
    with running(fake.url, compat="erag-2.1") as gateway, gateway.client() as client:
        assert client.post(CHAT, json=CALL).content == b"".join(UNTOLD)
        got = client.post(CHAT, json={**CALL, "data": {"k": 1}})
        assert got.content == b"".join(UNTOLD) + b'json: {"reranked_docs":[]}\n\n'


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'{"error":{"message":"no"}}', "no"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"error":{"code":1}}', '{"error":{"code":1}}'),
        (b'{"detail":"Not Found"}', '{"detail":"Not Found"}'),
        (b"[]", "[]"),
        (b"Internal Server Error", "Internal Server Error"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
        (b"", ""),
    ],
)
def test_whatever_an_error_looks_like_it_is_told(answer: bytes, said: str) -> None:
    assert json.loads(to_upstream_error(answer)) == {"detail": said}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"data": {"reranked_docs": {}}}, 200),
        ({"data": {"reranked_docs": ""}}, 200),
        ({"max_new_tokens": 2**40}, 200),
        ({"max_new_tokens": 2**70}, 422),
        ({"messages": [{"role": "user", "content": 5}]}, 422),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, 200),
    ],
)
def test_odd_values_are_taken_as_they_were(fake: FakeVllm, sent: dict[str, Any], status: int) -> None:
    with running(fake.url, compat="erag-2.1") as gateway, gateway.client() as client:
        call = {"messages": [{"role": "user", "content": "hi"}], "stream": False, **sent}
        assert client.post(CHAT, json=call).status_code == status
