"""Media by URL: from named hosts alone, wherever a call may hold them."""

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
            check_any(parts_of(body), orjson.dumps(body), frozenset())
    for body in chats("data:image/png;base64,AAAA"):
        check_any(parts_of(body), orjson.dumps(body), frozenset())


@pytest.mark.parametrize("url", ALLOWED)
def test_a_named_host_may_be_written_as_urls_are(url: str) -> None:
    for body in chats(url):
        check_any(parts_of(body), orjson.dumps(body), NAMED)
    for _, body in others(url):
        check_any(body, orjson.dumps(body), NAMED)


@pytest.mark.parametrize("url", STRANGE)
def test_a_url_that_two_parsers_may_read_in_two_ways_is_refused(url: str) -> None:
    for body in chats(url):
        with pytest.raises(BadRequest, match="must be a data: URL, or a plain http or https one"):
            check_any(parts_of(body), orjson.dumps(body), NAMED)
    for _, body in others(url):
        with pytest.raises(BadRequest):
            check_any(body, orjson.dumps(body), NAMED)


def test_texts_and_tools_may_name_any_url() -> None:
    body = {
        "messages": [{"role": "user", "content": "See http://evil.example"}],
        "tools": [{"type": "function", "function": {"name": "get", "parameters": {"url": "http://evil.example"}}}],
    }
    check_any(parts_of(body), orjson.dumps(body), frozenset())


@given(st.text(max_size=30))
def test_nothing_but_a_plain_url_of_a_named_host_or_data_passes(url: str) -> None:
    try:
        check_any({"x": {"url": url}}, b'"url"', NAMED)
    except BadRequest:
        return
    assert url[:5].lower() == "data:" or url.lower().startswith(("http://images.example", "https://images.example"))
