"""Stored responses and the prefix cache are a key's own; on both ways in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.support.fake_vllm import FakeVllm, response
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

RESPONSES = "/v1/responses"
CALL = {"model": "demo", "input": "Hi", "store": True}
MINE = {"authorization": "Bearer sk-4f7d0c9a2b6e81d35a"}
THEIRS = {"x-api-key": "sk-other-1234567890abc"}
STORED = b'{"id":"it is stored"}'
CHATS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/v1/chat/completions", {"messages": {"user": "Hi"}, "streaming": False}),
    ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "Hi"}]]}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}),
    ("/v1/embeddings", {"input": "Hi"}),
    ("/rerank", {"query": "Hi", "documents": ["a"]}),
    ("/score", {"text_1": "Hi", "text_2": "Ho"}),
    ("/classify", {"input": "Hi"}),
    ("/pooling", {"input": "Hi"}),
    ("/generate", {"prompt": "Hi"}),
    ("/api/v1/ask", {"question": "Hi"}),
]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    secrets = [*MINE.values(), *THEIRS.values()]
    digests = [hashlib.sha256(secret.removeprefix("Bearer ").encode()).hexdigest() for secret in secrets]
    file.write_text("".join(f"key-{number} {digest}\n" for number, digest in enumerate(digests)))
    return file


@pytest.fixture
def gateway(fake: FakeVllm, keys: Path) -> Iterator[Gateway]:
    with running(fake.url, api_keys_file=keys) as started:
        yield started


def stored_by(client: httpx.Client, fake: FakeVllm, headers: dict[str, str], **more: object) -> str:
    """The id under which vLLM stores a response of this key's."""
    assert client.post(RESPONSES, json=CALL | more, headers=headers).status_code == 200
    name = orjson.loads(fake.received[-1].body)["request_id"]
    assert isinstance(name, str)
    return name


def not_found(name: str) -> bytes:
    """As vLLM 0.32 says it."""
    return (
        b'{"error":{"message":"Response with id \'%b\' not found.","type":"invalid_request_error",'
        b'"param":"response_id","code":404}}' % name.encode()
    )


def test_vllm_stores_a_response_under_an_id_of_the_gateways(client: httpx.Client, fake: FakeVllm) -> None:
    name = stored_by(client, fake, MINE)
    sent = fake.received[-1]
    assert re.fullmatch("resp_[0-9a-f]{64}", name)
    assert name[5:37] == sent.header("x-request-id")
    content = orjson.dumps(CALL)
    assert sent.body == content[:-1] + b',"request_id":"%b"}' % name.encode()
    assert stored_by(client, fake, MINE) != name


def test_a_clients_own_id_of_a_response_is_replaced(client: httpx.Client, fake: FakeVllm) -> None:
    theirs = stored_by(client, fake, THEIRS)
    assert stored_by(client, fake, MINE, request_id=theirs) != theirs
    assert stored_by(client, fake, MINE, request_id=theirs, input="x" * 50_000) != theirs


def test_a_stored_response_is_its_keys_own(client: httpx.Client, fake: FakeVllm) -> None:
    name = stored_by(client, fake, MINE)
    fake.received.clear()
    for method, path in (("GET", name), ("GET", f"{name}?stream=true"), ("POST", f"{name}/cancel")):
        fake.queue([response("200 OK", STORED)])
        got = client.request(method, f"{RESPONSES}/{path}", headers=MINE)
        assert (got.status_code, got.content) == (200, STORED)
        assert fake.received.pop().target == f"{RESPONSES}/{path}"
        fake.clear()
        got = client.request(method, f"{RESPONSES}/{path}", headers=THEIRS)
        assert (got.status_code, got.content) == (404, not_found(name))
        assert got.headers["content-type"] == "application/json"
    assert fake.received == []


@pytest.mark.parametrize("size", [5, 50_000])
def test_a_response_goes_on_with_its_keys_own_alone(client: httpx.Client, fake: FakeVllm, size: int) -> None:
    mine, text = stored_by(client, fake, MINE), "x" * size
    assert stored_by(client, fake, MINE, previous_response_id=mine, input=text) != mine
    fake.received.clear()
    for previous in (mine, "resp_af7e241bc05f866d", "", "x" * 2000):
        got = client.post(RESPONSES, json={"input": text, "previous_response_id": previous}, headers=THEIRS)
        assert (got.status_code, got.content) == (404, not_found(previous))
    named_twice = b'{"previous_response_id":"","input":"%b","previous_response_id":"%b"}' % (
        text.encode(),
        mine.encode(),
    )
    assert client.post(RESPONSES, content=named_twice, headers=THEIRS).status_code == 404
    assert fake.received == []


def test_another_keys_response_and_none_are_the_same_to_a_client(client: httpx.Client, fake: FakeVllm) -> None:
    """What vLLM itself says of an id that is the key's own and is gone differs in nothing."""
    mine = stored_by(client, fake, MINE)
    fake.queue([response("404 Not Found", not_found(mine))])
    gone = client.get(f"{RESPONSES}/{mine}", headers=MINE)
    refused = client.get(f"{RESPONSES}/{mine}", headers=THEIRS)
    assert gone.content == refused.content
    ids = {"x-request-id", "date"}
    assert [item for item in gone.headers.items() if item[0] not in ids] == [
        item for item in refused.headers.items() if item[0] not in ids
    ]


def test_gateways_with_the_same_keys_agree_whose_a_response_is(
    client: httpx.Client, fake: FakeVllm, keys: Path
) -> None:
    mine = stored_by(client, fake, MINE)
    with running(fake.url, api_keys_file=keys) as second, second.client() as other:
        fake.queue([response("200 OK", STORED)])
        assert other.get(f"{RESPONSES}/{mine}", headers=MINE).content == STORED
        assert other.get(f"{RESPONSES}/{mine}", headers=THEIRS).status_code == 404


def test_without_keys_a_call_for_a_response_goes_on_as_it_came(fake: FakeVllm) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        client.post(RESPONSES, json={**CALL, "request_id": "resp_1", "previous_response_id": "resp_0"})
        client.get(f"{RESPONSES}/resp_1")
    assert [received.target for received in fake.received] == [RESPONSES, f"{RESPONSES}/resp_1"]
    assert orjson.loads(fake.received[0].body) == {**CALL, "request_id": "resp_1", "previous_response_id": "resp_0"}


def test_keys_share_no_prefix_where_each_has_its_salt(fake: FakeVllm, keys: Path) -> None:
    with running(fake.url, api_keys_file=keys, cache_salt="key") as gateway, gateway.client() as client:
        salts: dict[str, set[str]] = {"mine": set(), "theirs": set(), "own": set()}
        for path, body in CHATS:
            for whose, headers, more in (
                ("mine", MINE, {}),
                ("theirs", THEIRS, {}),
                ("own", MINE, {"cache_salt": "own"}),
            ):
                client.post(path, json={"model": "demo", **body, **more}, headers=headers)
                salts[whose].add(orjson.loads(fake.received[-1].body)["cache_salt"])
        sent = len(fake.received)
        for path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
            client.post(path, json={"model": "demo", "prompt": "Hi"}, headers=MINE)
    assert [len(found) for found in salts.values()] == [1, 1, 1]
    assert len(set.union(*salts.values())) == 3
    assert [b"cache_salt" in received.body for received in fake.received[sent:]] == [False] * 3


def test_no_salt_goes_upstream_unasked(client: httpx.Client, fake: FakeVllm) -> None:
    for path, body in CHATS:
        client.post(path, json={"model": "demo", **body}, headers=MINE)
    assert not any(b"cache_salt" in received.body for received in fake.received)
