"""A line of a batch's input: what is sent for it, or what is wrong with it."""

from __future__ import annotations

import base64
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batch.request import BadLine, to_request
from gateway.wire.routes import ROUTES

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
SOUND = base64.b64encode(b"RIFF\0\xff").decode()


def line(url: str | None = CHAT, body: Any = None, **fields: Any) -> bytes:
    told = {"custom_id": "a", "method": "POST", "url": url, "body": {"messages": MESSAGES} if body is None else body}
    return orjson.dumps({**told, **fields})


def wrong(content: bytes) -> str:
    with pytest.raises(BadLine) as error:
        to_request(content, None)
    return str(error.value)


def test_a_body_is_sent_as_it_is_but_asked_for_whole() -> None:
    request = to_request(line(body={"model": "m", "messages": MESSAGES, "seed": 2**53, "x": {"y": None}}), None)
    assert request[:3] == ("a", "POST", CHAT)
    told = {"model": "m", "messages": MESSAGES, "seed": 2**53, "x": {"y": None}, "stream": False}
    assert orjson.loads(request.content) == told
    assert request.kind == "application/json"

    old = {"messages": {"user": "Hi"}, "streaming": False}
    assert orjson.loads(to_request(line(body=old), None).content) == old
    other = {"model": "m", "input": "Hi"}
    assert orjson.loads(to_request(line("/v1/embeddings", other), None).content) == other


def test_a_model_that_is_named_is_every_lines() -> None:
    for body in ({"model": "m", "messages": MESSAGES}, {"messages": MESSAGES}):
        assert orjson.loads(to_request(line(body=body), "other").content)["model"] == "other"


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_is_taken(route: Any) -> None:
    url = route.path.replace("{response_id}", "resp_1")
    body: Any = {"file_url": f"data:audio/wav;base64,{SOUND}"} if route.body == "upload" else {}
    request = to_request(line(url, body, method=route.method), None)
    assert (request.method, request.path) == (route.method, url)
    assert (request.kind is None) == (route.body == "none")


def test_a_file_is_sent_as_a_form() -> None:
    fields = {"model": "m", "temperature": 0.5, "timestamp_granularities": ["word", "segment"], "prompt": None}
    body = {"file_url": f"data:audio/wav;base64,{SOUND}", **fields}
    request = to_request(line("/v1/audio/transcriptions", body), None)
    assert request.kind is not None
    assert request.kind.startswith("multipart/form-data; boundary=")
    assert b'name="file"; filename="audio.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF\0\xff\r\n' in request.content
    assert b'name="temperature"\r\n\r\n0.5\r\n' in request.content
    assert request.content.count(b'name="timestamp_granularities[]"') == 2
    assert b"prompt" not in request.content


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"Hello", "is no JSON, from its character 1 on: unexpected character"),
        (b'{"custom_id": NaN}', "is no JSON, from its character 15 on: unexpected character"),
        (b'{"custom_id": "\xff"}', "is not UTF-8: save the file as UTF-8"),
        (b'{"custom_id": "\\ud800"}', "is no JSON, from its character 16 on: "),
        (b"[" * 2000, "is no JSON, from its character "),
        (b"[1]", "is an array: a line is an object, with custom_id, method, url and body"),
        (b"null", "is null: a line is an object"),
        (line(custom_id=None), "needs a custom_id, a text that no other line has, but that is missing"),
        (line(custom_id=7), "needs a custom_id, a text that no other line has, but that is 7"),
        (line(custom_id=""), 'but that is ""'),
        (line(method="GET"), 'needs the method POST, which /v1/chat/completions takes, but that is "GET"'),
        (line(method=None), "but that is missing"),
        (line(url=None), "needs a url, as /v1/chat/completions, but that is missing"),
        (line("/v1/chat/completion"), "which is no path of a gateway's: did you mean /v1/chat/completions?"),
        (line("https://api.openai.com/v1/chat/completions"), "did you mean /v1/chat/completions?"),
        (line("/v1/chat/completions?a=b"), "which is no path of a gateway's"),
        (line("/metrics"), 'has the url "/metrics", which is no path of a gateway\'s, as /v1/chat/completions is'),
        (line("/v1/responses/{response_id}"), "which is no path of a gateway's"),
        (line("/v1/responses/../load"), "which is no path of a gateway's"),
        (line(body=[]), "needs a body, an object as /v1/chat/completions takes it, but that is an array"),
        (line(body="x"), 'but that is "x"'),
        (line("/v1/models", {"a": 1}, method="GET"), "has a body, which GET /v1/models does not take"),
        (line(body={"stream": True}), "asks for a stream, but a batch has whole answers: leave stream out"),
        (line(body={"streaming": "yes"}), "leave streaming out"),
        (line("/v1/audio/translations", {"file": "a"}), "needs a file_url, which begins with data:audio/wav;base64,"),
        (line("/v1/audio/translations", {"file_url": "http://x/a.wav"}), "needs a file_url"),
        (line("/v1/audio/translations", {"file_url": "data:a/b;base64,?"}), "has a file_url that is not in base64"),
        (
            line("/v1/audio/translations", {"file_url": "data:a/b;base64,", "x": {}}),
            'has a field "x", which a form cannot have',
        ),
    ],
)
def test_what_is_wrong_with_a_line_is_a_sentence(content: bytes, says: str) -> None:
    assert says in wrong(content)


JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
LINES = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text() | JSON,
        "method": st.sampled_from(["GET", "POST"]) | JSON,
        "url": st.sampled_from([route.path for route in ROUTES]) | JSON,
        "body": st.dictionaries(st.sampled_from(["stream", "file_url", "x"]), JSON) | JSON,
    },
)


@given(LINES | JSON)
def test_any_json_is_sent_or_refused(told: Any) -> None:
    try:
        content = orjson.dumps(told)
    except (TypeError, ValueError):  # whole numbers that no JSON of ours has
        return
    try:
        request = to_request(content, "m")
    except BadLine:
        return
    assert request.custom_id == told["custom_id"]
    assert request.path.startswith("/")


@given(st.binary(max_size=50))
def test_any_bytes_are_sent_or_refused(content: bytes) -> None:
    with pytest.raises(BadLine):
        to_request(content, None)
