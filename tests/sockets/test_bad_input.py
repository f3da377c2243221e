"""Bad input, on real sockets: each gets the right 4xx, an envelope that names the field, and nothing goes upstream."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest

from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
USER = '"messages":{"user":"Hi"}'


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": {"system": "s", "user": "Hi"}, **fields}).encode()


def deep(text: str) -> bytes:
    return (text * 100_000).encode()


BAD = {
    "not JSON": (b"hello", 400, None, "not valid JSON"),
    "empty": (b"", 400, None, "it is empty"),
    "cut short": (b'{"messages":{"user":"Hi"},"max_new_tokens": 1', 400, "max_new_tokens", "not valid JSON"),
    "an array": (b"[]", 400, None, "must be a JSON object, but it is an array"),
    "a string": (b'"hi"', 400, None, "must be a JSON object, but it is a string"),
    "null": (b"null", 400, None, "must be a JSON object, but it is null"),
    "no messages": (b"{}", 400, "messages", "messages must be"),
    "null messages": (b'{"messages":null}', 400, "messages", "messages must be"),
    "messages a number": (b'{"messages":5}', 400, "messages", "but it is a number"),
    "messages true": (b'{"messages":true}', 400, "messages", "but it is a boolean"),
    "messages empty": (b'{"messages":{}}', 400, "messages.user", "must be a string that is not empty"),
    "messages an empty string": (b'{"messages":" "}', 400, "messages", "it is empty"),
    "an empty query": (b'{"query":""}', 400, "query", "it is empty"),
    "a query that is no string": (b'{"query":["x"]}', 400, "query", "it is an array"),
    "no user": (b'{"messages":{"system":"s"}}', 400, "messages.user", "it is missing"),
    "empty user": (b'{"messages":{"user":""}}', 400, "messages.user", "it is empty"),
    "blank user": (b'{"messages":{"user":" \\n"}}', 400, "messages.user", "it is empty"),
    "user a number": (b'{"messages":{"user":5}}', 400, "messages.user", "it is a number"),
    "system a list": (b'{"messages":{"user":"Hi","system":[]}}', 400, "messages.system", "it is an array"),
    "a list without a user": (b'{"messages":[],"max_new_tokens":5}', 400, "messages", "role 'user'"),
    "a list of strings": (b'{"messages":["Hi"],"streaming":true}', 400, "messages[0]", "it is a string"),
    "max_new_tokens 0": (body(max_new_tokens=0), 400, "max_new_tokens", "from 1 to 2147483647, but it is 0"),
    "max_new_tokens negative": (body(max_new_tokens=-5), 400, "max_new_tokens", "but it is -5"),
    "max_new_tokens a string": (body(max_new_tokens="32"), 400, "max_new_tokens", 'but it is "32"'),
    "max_new_tokens a fraction": (body(max_new_tokens=1.5), 400, "max_new_tokens", "but it is 1.5"),
    "max_new_tokens true": (body(max_new_tokens=True), 400, "max_new_tokens", "but it is true"),
    "max_new_tokens 10^12": (body(max_new_tokens=10**12), 400, "max_new_tokens", "but it is 1000000000000"),
    "max_new_tokens 10^30": (body(max_new_tokens=10**30), 400, "max_new_tokens", "from 1 to 2147483647"),
    "two limits that differ": (body(max_new_tokens=1, max_tokens=2), 400, "max_new_tokens", "differ (1 and 2)"),
    "temperature -1": (body(temperature=-1), 400, "temperature", "of at least 0, but it is -1"),
    "temperature a string": (body(temperature="hot"), 400, "temperature", 'but it is "hot"'),
    "temperature NaN": (body(temperature=float("nan")), 400, "temperature", "finite number, but it is NaN"),
    "temperature infinite": (body(temperature=float("inf")), 400, "temperature", "but it is Infinity"),
    "temperature 1e999": (f'{{{USER},"temperature":1e999}}'.encode(), 400, "temperature", "temperature"),
    "top_p 2": (body(top_p=2), 400, "top_p", "above 0 and at most 1, but it is 2"),
    "top_p 0": (body(top_p=0), 400, "top_p", "but it is 0"),
    "streaming yes": (body(streaming="yes"), 400, "streaming", 'true or false, but it is "yes"'),
    "stream 1": (body(stream=1), 400, "stream", "true or false, but it is 1"),
    "stream and streaming differ": (body(stream=True, streaming=False), 400, "streaming", "mean the same but differ"),
    "an unknown style": (
        body(stream_style="xml"),
        400,
        "stream_style",
        "'openai' or 'repr' or 'answer_part', but it is \"xml\"",
    ),
    "model a number": (body(model=5), 400, "model", "it is a number"),
    "data a list": (body(data=[]), 400, "data", "it is an array"),
    "invalid UTF-8": (b'{"messages":{"user":"\xff"}}', 400, None, "must be UTF-8, but byte 21 is not"),
    "a lone surrogate": (b'{"messages":{"user":"\\ud800"}}', 400, "user", "surrogate"),
    "deep arrays": (deep("["), 400, None, "depth"),
    "deep objects": (deep('{"a":'), 400, None, "depth"),
}


@pytest.fixture(scope="module")
def served() -> Any:
    with FakeVllm() as fake, running(fake.url) as gateway:
        yield fake, gateway


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(served: tuple[FakeVllm, Gateway], name: str) -> None:
    content, status, param, says = BAD[name]
    fake, gateway = served

    with gateway.client() as client:
        got = client.post(CHAT, content=content, headers={"x-request-id": "r-1"})

    assert got.status_code == status
    assert got.headers["content-type"] == "application/json"
    error = got.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["param"] == param
    assert says in error["message"]
    assert error["request_id"] == "r-1"
    assert fake.received == []
    assert gateway.log(1)[0]["status"] == status


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("content", [body(streaming=False), b'{"messages":[]}'], ids=["simplified", "openai"])
def test_any_content_type_is_read_and_sent_as_json(
    client: httpx.Client, fake: FakeVllm, content: bytes, kind: str | None
) -> None:
    got = client.post(CHAT, content=content, headers={"content-type": kind} if kind else {})

    assert got.status_code == 200
    assert [value for name, value in fake.received[0].headers if name == "content-type"] == ["application/json"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("size", [1, 40_000, 300_000])
def test_a_body_with_a_byte_order_mark_is_read_and_goes_up_in_utf_8(
    client: httpx.Client, fake: FakeVllm, encoding: str, size: int
) -> None:
    text = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "é" * size}]}, ensure_ascii=False)
    simplified = json.dumps({"messages": {"user": "é" * size}, "streaming": False}, ensure_ascii=False)

    for sent in (text, simplified):
        assert client.post(CHAT, content=sent.encode(encoding)).status_code == 200

    assert fake.received[0].body.decode("utf-8-sig") == text
    assert json.loads(fake.received[1].body)["messages"] == json.loads(text)["messages"]


def test_what_a_body_must_not_have_is_seen_in_any_encoding(client: httpx.Client, fake: FakeVllm) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://10.0.0.1/a.png"}}
    for call in ({"n": 1000}, {"messages": [{"role": "user", "content": [image]}]}):
        sent = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hi"}], **call})
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"):
            assert client.post(CHAT, content=sent.encode(encoding)).status_code == 400
    assert fake.received == []


@pytest.mark.parametrize("encodings", [["gzip"], ["gzip", "gzip"], ["identity", "gzip"]])
def test_a_compressed_body_is_refused(client: httpx.Client, encodings: list[str]) -> None:
    headers = [("content-encoding", encoding) for encoding in encodings]

    got = client.post(CHAT, content=gzip.compress(body()), headers=headers)

    assert got.status_code == 415
    assert (
        f"Content-Encoding must be absent or identity, but it is '{','.join(encodings)}'"
        in got.json()["error"]["message"]
    )


def megabytes(count: int) -> Any:
    return (b" " * 1_000_000 for _ in range(count))


@pytest.mark.parametrize("content", [lambda: b" " * 40_000_000, lambda: megabytes(40)], ids=["length", "chunked"])
def test_a_body_of_40_mb_is_refused(client: httpx.Client, content: Any) -> None:
    got = client.post(CHAT, content=content())

    assert got.status_code == 413
    assert "at most 16777216 bytes (GATEWAY_MAX_BODY_BYTES)" in got.json()["error"]["message"]


def test_a_body_of_the_largest_size_passes(client: httpx.Client, fake: FakeVllm) -> None:
    content = body(streaming=False, messages={"user": "x" * (16 * 1024 * 1024 - 100)})

    assert client.post(CHAT, content=content).status_code == 200


def test_a_body_that_stops_half_way_is_a_408(fake: FakeVllm) -> None:
    with running(fake.url, body_timeout=0.2) as gateway, gateway.connect() as connection:
        connection.sendall(b'POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"mess' % CHAT.encode())
        got = b""
        while piece := connection.recv(65536):
            got += piece

    assert got.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in got
    assert fake.received == []


def test_a_body_whose_client_leaves_half_way_goes_nowhere(gateway: Gateway, fake: FakeVllm) -> None:
    with gateway.connect() as connection:
        connection.sendall(b'POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"mess' % CHAT.encode())

    assert gateway.log(1)[0]["outcome"] == "client_left"
    assert fake.received == []


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", CHAT, 405, "GET is not allowed on '/v1/chat/completions'; allowed: POST"),
        ("DELETE", "/v1/models", 405, "DELETE is not allowed"),
        ("POST", "/metrics", 405, "POST is not allowed"),
        ("GET", "/nope", 404, "There is no path '/nope' here."),
        ("POST", "/v1/chat/completions/", 404, "'/v1/chat/completions/' here: did you mean /v1/chat/completions?"),
        ("POST", "//v1/chat/completions", 404, "did you mean /v1/chat/completions?"),
        (
            "POST",
            "/chat/completions",
            404,
            "There is no path '/chat/completions' here: did you mean /v1/chat/completions?",
        ),
        ("POST", "/v1/v1/chat/completions", 404, "did you mean /v1/chat/completions?"),
        ("POST", "/v1/chat/%63ompletions", 404, "'/v1/chat/%63ompletions' here: did you mean /v1/chat/completions?"),
        ("GET", "/models", 404, "did you mean /v1/models?"),
        ("GET", "/v1/v1/models?a=b", 404, "'/v1/v1/models' here: did you mean /v1/models?"),
        ("POST", "/v1/v1/messages", 404, "did you mean /v1/messages?"),
        ("GET", "/v1/responses/r/", 404, "There is no path '/v1/responses/r/' here."),
        ("POST", "/pause", 404, "There is no path '/pause' here."),
        ("POST", "/v1/load_lora_adapter", 404, "There is no path"),
        ("POST", "/collective_rpc", 404, "There is no path"),
    ],
)
def test_other_paths_and_methods_are_refused(
    served: tuple[FakeVllm, Gateway], method: str, path: str, status: int, says: str
) -> None:
    fake, gateway = served

    with gateway.client() as client:
        got = client.request(method, f"{gateway.url}{path}")

    error = got.json()["error"]
    assert got.status_code == status
    assert says in error["message"]
    assert got.headers["x-request-id"] == error["request_id"] == gateway.log(1)[0]["request_id"]
    assert fake.received == []
