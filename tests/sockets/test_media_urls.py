"""Media by URL, from named hosts alone, and by a name, wherever a call may hold them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.media_urls import check_any, parts_of
from gateway.wire.errors import BadRequest
from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import running
from tests.support.recorders import body_limits

NAMED = frozenset({"images.example"})
ALLOWED = [
    "https://images.example/a.png",
    "http://IMAGES.example:8080/a?b=c#d",
    "https://images.example",
    "data:image/png;base64,AAAA",
    "DATA:,x",
]
OTHERS = [
    "https://evil.example/a.png",
    "https://sub.images.example/a",
    "https://images.example.evil/a",
    "http://169.254.169.254/latest/meta-data",
    "http://localhost:8008/sleep",
]
STRANGE = [
    "file:///etc/passwd",
    "ftp://images.example/a",
    "//images.example/a",
    "images.example/a",
    "",
    "https://images.example@evil.example/a",
    "https://evil.example\\@images.example/a",
    "https://images.example\\.evil.example/a",
    "https://images.example\t/a",
    "https://images.example/a b",
    " https://images.example/a",
    "https://[::1]/a",
    "https://images.example:/a",
    "https://ìmages.example/a",
]


def chats(url: str) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": url}}
    text = {"type": "text", "text": "What is http://evil.example?"}
    return [
        {"messages": [{"role": "user", "content": [text, image]}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": [{"image_url": url}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": url}]}]},
        {"messages": {"user": [text, image]}, "streaming": False},
    ]


def others(url: str) -> list[tuple[str, dict[str, Any]]]:
    source = {"type": "image", "source": {"type": "url", "url": url}}
    part = {"type": "image_url", "image_url": {"url": url}}
    return [
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [source]}]}]}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": [part]}]]}),
        ("/v1/embeddings", {"messages": [{"role": "user", "content": [part]}]}),
        ("/v1/score", {"data_1": {"content": [part]}, "data_2": "x"}),
        ("/pooling", {"input": [{"image_url": [url]}]}),
    ]


@pytest.mark.usefixtures("way")
def test_media_come_from_named_hosts_alone(fake: FakeVllm) -> None:
    with running(fake.url, media_domains="images.example") as gateway, gateway.client() as client:
        for url in OTHERS:
            calls = [("/v1/chat/completions", body) for body in chats(url)] + others(url)
            for path, body in calls:
                got = client.post(path, json=body)
                assert got.status_code == 400, (path, url)
                assert "GATEWAY_MEDIA_DOMAINS" in got.json()["error"]["message"]
        assert fake.received == []
        for path, body in [("/v1/chat/completions", body) for body in chats(ALLOWED[0])] + others(ALLOWED[0]):
            assert client.post(path, json=body).status_code == 200, path


def test_without_named_hosts_only_data_passes() -> None:
    for body in chats(ALLOWED[0]):
        with pytest.raises(BadRequest):
            check_any(parts_of(body), orjson.dumps(body), frozenset(), True)
    for body in chats("data:image/png;base64,AAAA"):
        check_any(parts_of(body), orjson.dumps(body), frozenset(), True)


@pytest.mark.parametrize("url", ALLOWED)
def test_a_named_host_may_be_written_as_urls_are(url: str) -> None:
    for body in chats(url):
        check_any(parts_of(body), orjson.dumps(body), NAMED, True)
    for _, body in others(url):
        check_any(body, orjson.dumps(body), NAMED, True)


@pytest.mark.parametrize("url", STRANGE)
def test_a_url_that_two_parsers_may_read_in_two_ways_is_refused(url: str) -> None:
    for body in chats(url):
        with pytest.raises(BadRequest, match="must be a data: URL, or a plain http or https one"):
            check_any(parts_of(body), orjson.dumps(body), NAMED, True)
    for _, body in others(url):
        with pytest.raises(BadRequest):
            check_any(body, orjson.dumps(body), NAMED, True)


def test_texts_and_tools_may_name_any_url() -> None:
    body = {
        "messages": [{"role": "user", "content": "See http://evil.example"}],
        "tools": [{"type": "function", "function": {"name": "get", "parameters": {"url": "http://evil.example"}}}],
    }
    check_any(parts_of(body), orjson.dumps(body), frozenset(), True)


@given(st.text(max_size=30))
def test_nothing_but_a_plain_url_of_a_named_host_or_data_passes(url: str) -> None:
    try:
        check_any({"x": {"url": url}}, b'"url"', NAMED, True)
    except BadRequest:
        return
    assert url[:5].lower() == "data:" or url.lower().startswith(("http://images.example", "https://images.example"))


LONG = {"type": "text", "text": "x" * 40_000}
NAMELESS = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
NAMES = ({"uuid": "sku-1"}, {"uuid": 1}, {"uuid": ""}, {"uuid": "x" * 2000})


def named_parts(name: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    part = NAMELESS | name
    bare = {"type": "image_url", "image_url": None} | name
    turn = {"role": "user", "content": [part]}
    late = {"role": "user", "content": [LONG, bare]}
    return [
        ("/v1/chat/completions", {"messages": [turn]}),
        ("/v1/chat/completions", {"messages": [late]}),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": [{"image_url": None} | name]}]}),
        ("/v1/chat/completions", {"messages": {"user": [part]}, "streaming": False}),
        ("/v1/chat/completions", {"messages": {"user": [LONG, part]}, "streaming": False}),
        ("/v1/chat/completions", {"messages": [turn], "max_new_tokens": 5, "streaming": False}),
        ("/v1/chat/completions/batch", {"messages": [[turn], [late]]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [bare]}]}),
        ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "a", "output": [part]}]}),
        ("/v1/embeddings", {"messages": [late]}),
        ("/v1/embeddings", {"input": [[turn]]}),
        ("/pooling", {"messages": [turn]}),
        ("/classify", {"messages": [turn]}),
        ("/tokenize", {"messages": [turn]}),
        ("/v1/score", {"data_1": {"content": [part]}, "data_2": "x"}),
        ("/v1/score", {"queries": "x", "items": [{"content": [bare]}]}),
        ("/rerank", {"query": {"content": [part]}, "documents": ["x"]}),
        ("/rerank", {"query": "x", "documents": [{"content": [part]}]}),
    ]


@pytest.mark.usefixtures("way")
def test_media_have_no_name_that_another_client_could_say(fake: FakeVllm) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        for name in NAMES:
            for path, body in named_parts(name):
                for content in (orjson.dumps(body), orjson.dumps(body).replace(b'"uuid"', b'"u\\u0075id"')):
                    got = client.post(path, content=content)
                    assert got.status_code == 400, (path, body)
                    error = got.json()["error"]
                    assert error["param"] == "uuid"
                    assert error["message"].startswith("uuid of a content part is not taken here (GATEWAY_REFUSED_FI")
        assert fake.received == []
        for path, body in named_parts({"uuid": None}):
            assert client.post(path, json=body).status_code == 200, path


@pytest.mark.usefixtures("way")
def test_media_may_have_names_where_a_setting_lets_them(fake: FakeVllm) -> None:
    with running(fake.url, refused_fields="kv_transfer_params") as gateway, gateway.client() as client:
        for path, body in named_parts(NAMES[0]):
            assert client.post(path, json=body).status_code == 200, path
        assert b'"uuid":"sku-1"' in fake.received[0].body


def test_what_is_no_part_may_have_a_field_of_that_name() -> None:
    schema = {"type": "object", "properties": {"uuid": {"type": "string"}, "content": {"type": "string"}}}
    called = {"type": "tool_use", "id": "a", "name": "put", "input": {"content": [{"uuid": "x"}], "uuid": "x"}}
    body = {
        "uuid": "x",
        "metadata": {"uuid": "x"},
        "messages": [{"role": "assistant", "content": [called], "uuid": "x"}],
        "tools": [{"name": "put", "input_schema": schema}],
        "x": [{"uuid": "x"}],
    }
    check_any(body, orjson.dumps(body), frozenset(), True)
    body_limits().check(body)
