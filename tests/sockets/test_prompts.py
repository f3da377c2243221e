"""Older servers' calls that bring a bare prompt: as completions, and back, on both ways in."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.prompts import GenerateStream, from_ask, from_generate
from gateway.wire.errors import BadRequest, UpstreamBroken
from gateway.wire.sse import DONE, encode
from tests.support.fake_vllm import CLOSE, STREAM_END, STREAM_HEAD, FakeVllm, Hold, Step, response
from tests.support.fake_vllm import chunk as framed

PROMPT = "San Francisco is a"
# As in the documentation of vLLM's first releases, which says of no content type.
DOCUMENTED = b'{"prompt": "San Francisco is a", "use_beam_search": true, "n": 4, "temperature": 0}'


def completion(*texts: str) -> bytes:
    choices = [{"index": index, "text": text, "finish_reason": "length"} for index, text in enumerate(texts)]
    return orjson.dumps({"id": "cmpl-1", "object": "text_completion", "choices": choices[::-1], "usage": {}})


def chunk(text: str, index: int = 0) -> bytes:
    return encode(orjson.dumps({"id": "cmpl-1", "choices": [{"index": index, "text": text, "finish_reason": None}]}))


def objects(stream: bytes) -> list[Any]:
    assert stream.endswith(b"\0")
    return [json.loads(one) for one in stream.split(b"\0")[:-1]]


@pytest.mark.usefixtures("way")
def test_the_documented_call_gets_the_documented_reply(client: httpx.Client, fake: FakeVllm) -> None:
    fake.queue([response("200 OK", completion(" city", " place", " town", " bay"))])

    got = client.post("/generate", content=DOCUMENTED)

    sent = fake.received[0]
    assert (sent.target, sent.header("content-type")) == ("/v1/completions", "application/json")
    assert json.loads(sent.body) == {**json.loads(DOCUMENTED), "model": "demo", "stream": False}
    assert got.json() == {"text": [PROMPT + text for text in (" city", " place", " town", " bay")]}
    assert got.headers["content-type"] == "application/json"


@pytest.mark.parametrize("tokens", [100_000, 100_000.0])
def test_a_stream_of_generate_that_would_repeat_too_much_is_refused(
    client: httpx.Client, fake: FakeVllm, tokens: float
) -> None:
    call = {"prompt": "a" * 20_000, "stream": True, "max_tokens": tokens}

    got = client.post("/generate", json=call)

    assert (got.status_code, got.json()["error"]["param"]) == (400, "stream")
    assert "n times the prompt times max_tokens must be at most" in got.json()["error"]["message"]
    fake.queue([response("200 OK", completion("."))])
    assert client.post("/generate", json={**call, "stream": False}).status_code == 200


@pytest.mark.usefixtures("way")
def test_a_stream_of_generate_repeats_all_of_the_text_each_time(client: httpx.Client, fake: FakeVllm) -> None:
    events = [chunk(" city"), chunk(" town", 1), chunk(" of"), encode(b'{"choices":[],"usage":{}}'), encode(DONE)]
    fake.queue([STREAM_HEAD, *map(framed, events), STREAM_END])

    got = client.post("/generate", json={"prompt": PROMPT, "stream": True, "n": 2})

    *_, last = objects(got.content)  # what comes at once is one object
    assert last == {"text": [f"{PROMPT} city of", f"{PROMPT} town"]}
    assert got.headers["x-request-id"]


@pytest.mark.usefixtures("way")
def test_a_question_is_answered_in_parts(client: httpx.Client, fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, *map(framed, [chunk("It's"), chunk(""), chunk(" it."), encode(DONE)]), STREAM_END])

    got = client.post("/api/v1/ask", json={"question": "What is it?", "temperature": 0.5})

    assert json.loads(fake.received[0].body) == {
        "model": "demo",
        "prompt": "What is it?",
        "max_tokens": 1024,  # the fake model takes no more
        "temperature": 0.5,
        "stream": True,
    }
    assert fake.received[0].target == "/v1/completions"
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert got.text == (
        'data: {"type":"answer_part","data":"It\'s"}\n\ndata: {"type":"answer_part","data":" it."}\n\n'
        'data: {"type":"done"}\n\n'
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("context", "most"), [(math.inf, 2048), (4096, 2048), (2047, 2047), (16, 16)])
def test_as_many_tokens_are_asked_for_as_vllm_app_did_or_the_model_takes(context: float, most: int) -> None:
    assert json.loads(from_ask({"question": "Why?"}, lambda model: context).to_call("demo"))["max_tokens"] == most
    assert (
        json.loads(from_ask({"question": "Why?", "max_tokens": 5000}, lambda model: context).to_call("demo"))[
            "max_tokens"
        ]
        == 5000
    )


@pytest.mark.parametrize("path", ["/generate", "/api/v1/ask"])
def test_a_stream_that_breaks_says_so_in_its_own_form(client: httpx.Client, fake: FakeVllm, path: str) -> None:
    hold = Hold()
    steps: list[Step] = [STREAM_HEAD, framed(chunk("It's")), hold, CLOSE]
    fake.queue(steps)
    call = {"prompt": "Hi", "stream": True} if path == "/generate" else {"question": "Hi"}

    with client.stream("POST", path, json=call) as got:
        pieces = got.iter_raw()
        content = next(pieces)
        hold.release()
        content += b"".join(pieces)

    if path == "/generate":
        text, told = objects(content)
        assert text == {"text": ["HiIt's"]}
    else:
        part, told, end = (json.loads(event[6:]) for event in content.decode().split("\n\n")[:-1])
        assert (part["data"], told["type"], end) == ("It's", "error", {"type": "done"})
        assert told["data"] == told["error"]["message"]
    assert told["error"]["message"].startswith("The model server broke off")
    assert told["error"]["request_id"] == got.headers["x-request-id"]


@pytest.mark.usefixtures("way")
def test_what_vllm_refuses_comes_back_as_it_wrote_it(client: httpx.Client, fake: FakeVllm) -> None:
    refusal = b'{"error":{"message":"Streaming is not currently supported with beam search","code":400}}'
    for path, call in (("/generate", {"prompt": "Hi", "stream": True}), ("/api/v1/ask", {"question": "Hi"})):
        fake.queue([response("400 Bad Request", refusal)])
        got = client.post(path, json=call)
        assert (got.status_code, got.content) == (400, refusal)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "prompt", "it is missing"),
        ({"prompt": ""}, "prompt", "it is empty"),
        ({"prompt": ["a"]}, "prompt", "it is an array"),
        ({"prompt": "a", "stream": "yes"}, "stream", "it is a string"),
        ({"prompt": "a", "n": "16"}, "n", "it is a string"),
        ({"prompt": "a" * 5000, "n": 16384}, "n", "at most 4194304 characters"),
        ({"prompt": "a", "model": 7}, "model", "it is a number"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(BadRequest) as raised:
        from_generate(body, disable_streaming=False)
    assert raised.value.param == param
    assert said in raised.value.message
    if "prompt" in body and param == "prompt":
        with pytest.raises(BadRequest) as raised:
            from_ask({"question": body["prompt"]}, lambda model: math.inf)
        assert raised.value.param == "question"


@given(
    st.lists(st.tuples(st.text(max_size=4), st.integers(0, 2)), max_size=5),
    st.lists(st.integers(0, 400), max_size=4),
)
def test_however_it_was_split_the_last_object_holds_all_of_the_text(
    pieces: list[tuple[str, int]], cuts: list[int]
) -> None:
    upstream = b"".join(chunk(text, index) for text, index in pieces) + encode(DONE)
    edges = sorted({0, len(upstream), *(cut for cut in cuts if cut < len(upstream))})
    stream = GenerateStream("P")
    out = b"".join(stream.feed(upstream[a:b]) for a, b in itertools.pairwise(edges))
    if pieces:
        texts = {index: "P" + "".join(text for text, at in pieces if at == index) for _, index in pieces}
        assert objects(out)[-1] == {"text": [texts[index] for index in sorted(texts)]}
        assert len(objects(out)) <= min(len(pieces), len(edges) - 1)
    else:
        assert out == b""


@pytest.mark.parametrize(
    "data", [b"x", b"{}", b"[]", b'{"choices":[{}]}', b'{"choices":[{"index":0,"text":null}]}', b"5"]
)
def test_what_is_no_completion_is_the_upstreams_fault(data: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        GenerateStream("P").feed(encode(data))
    with pytest.raises(UpstreamBroken):
        from_generate({"prompt": "P"}, disable_streaming=False).to_reply(data)


def test_what_would_make_the_reply_wrong_does_not_go_on() -> None:
    call = from_generate(
        {"prompt": "Hi", "echo": True, "stream_options": {"include_usage": True}}, disable_streaming=False
    ).call
    assert call == {"prompt": "Hi", "stream": False}
    guarded = from_generate({"prompt": "Hi", "stream": True}, disable_streaming=True)
    assert (guarded.streaming, guarded.call["stream"]) == (False, False)


def test_a_read_of_many_chunks_is_one_object_however_long_the_prompt() -> None:
    stream = GenerateStream("P" * 10_000)
    out = stream.feed(b"".join(chunk("x", index) for _ in range(100) for index in range(16)))
    assert len(objects(out)) == 1
    assert len(out) < 200_000
