"""The simplified replies: whole, with what they cite, and as streams in styles that are not vLLM's."""

from __future__ import annotations

import ast
import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.dialects.simplified import Simplified, from_body
from gateway.dialects.streams import Style, TextStream
from gateway.wire.errors import BadRequest, UpstreamBroken
from gateway.wire.sse import DONE, Decoder, encode

ANSWER = {"id": "c-1", "choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}], "usage": {"n": 1}}
PIECES = st.lists(st.text() | st.text("'\"\\\n\r\t\x00\x1b\x85\u2028\ufeff\U0001f600\u0301{}", max_size=6), max_size=4)


def read(body: dict[str, Any]) -> Simplified:
    return from_body(body, "openai", "system", disable_streaming=False)


def test_a_whole_reply_is_the_completion_with_its_text_and_what_was_asked() -> None:
    request = read({"messages": "Hi.", "streaming": False, "data": {"a": 1}, "output_guardrail_params": {"b": 2}})
    assert json.loads(request.to_reply(orjson.dumps(ANSWER))) == {
        **ANSWER,
        "text": "Hello.",
        "prompt": "Hi.",
        "streaming": False,
        "stream": False,
        "output_guardrail_params": {"b": 2},
        "data": {"a": 1},
    }


def test_what_the_model_server_wrote_stays_as_it_was_written() -> None:
    written = b'"choices": [{"message":{"content":"\\u0041"}}],"x":1.50,"deep":' + b"[" * 300 + b"]" * 300
    reply = read({"messages": "Hi."}).to_reply(b" {" + written + b"}\r\n")
    assert written in reply
    assert json.loads(reply)["text"] == "A"


def test_of_two_fields_of_one_name_the_reply_has_one() -> None:
    answer = {**ANSWER, "text": "its own", "prompt": "its own"}
    reply = read({"messages": "Hi."}).to_reply(orjson.dumps(answer))
    assert reply.count(b'"text":"') == reply.count(b'"prompt":') == 1
    assert json.loads(reply)["prompt"] == "Hi."


@pytest.mark.parametrize("content", [None, ""])
def test_an_answer_without_text_has_an_empty_one(content: str | None) -> None:
    answer = {"choices": [{"message": {"content": content, "tool_calls": [1]}}]}
    reply = json.loads(read({"messages": "Hi."}).to_reply(orjson.dumps(answer)))
    assert reply["text"] == ""
    assert reply["choices"] == answer["choices"]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b'"x"',
        b"{}",
        b'{"choices":[]}',
        b'{"choices":[{}]}',
        b'{"choices":null}',
        b'{"choices":[{"message":"x"}]}',
        b'{"choices":[{"message":{"content":5}}]}',
        b'{"choices":[{"message":{"content":"x"}}],"text":' + b"[" * 300 + b"]" * 300 + b"}",
    ],
)
def test_an_answer_that_is_no_chat_completion_is_the_upstreams_fault(answer: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        read({"messages": "Hi."}).to_reply(answer)


def texts(style: Style = "repr", **sent: Any) -> TextStream:
    stream = from_body({"messages": "Hi.", **sent}, style, "system", disable_streaming=False).to_stream()
    assert isinstance(stream, TextStream)
    return stream


def chunk(content: str | None, **choice: Any) -> bytes:
    return encode(json.dumps({"choices": [{"index": 0, "delta": {"content": content}, **choice}]}).encode())


def events(stream: bytes) -> list[bytes]:
    return Decoder(limit=1_000_000).feed(stream)


@given(PIECES)
@example(["It's", ' a "q"\n', "'\"", "\U0001f600", "\r\n\r\ndata: x\n\n", ""])
def test_callers_read_back_the_text_whatever_it_holds(pieces: list[str]) -> None:
    stream = texts().feed(b"".join(map(chunk, pieces)) + encode(DONE))
    *pairs, end = events(stream)
    assert [ast.literal_eval(text.decode()) for text in pairs] == pieces
    assert end == b"[DONE]"


@given(st.lists(st.text(max_size=4), max_size=3))
def test_every_split_point_of_the_upstreams_stream_gives_the_same_stream(pieces: list[str]) -> None:
    upstream = b"".join(map(chunk, pieces)) + encode(DONE)
    whole = texts().feed(upstream)
    for at in range(len(upstream) + 1):
        stream = texts()
        assert stream.feed(upstream[:at]) + stream.feed(upstream[at:]) == whole


@pytest.mark.parametrize(
    ("sent", "written"),
    [
        (chunk("", role="assistant"), b"data: ''\n\n"),
        (chunk("It's"), b'data: "It\'s"\n\n'),
        (chunk("\n"), b"data: '\\n'\n\n"),
        (chunk("end", finish_reason="stop"), b"data: 'end'\n\n"),
        (chunk("cut", finish_reason="length"), b"data: 'cut'\n\n"),
        (chunk(None), b""),
        (encode(b'{"choices":[{"index":0,"delta":{"reasoning":"x"}}]}'), b""),
        (encode(b'{"choices":[],"usage":{"prompt_tokens":1}}'), b""),
        (encode(b'{"choices":[{"index":1,"delta":{"content":"x"}}]}'), b""),
        (encode(b'{"error":{"message":"x"}}'), b'data: {"error":{"message":"x"}}\n\n'),
        (b": ping\n\n", b""),
        (encode(DONE), b"data: [DONE]\n\n"),
    ],
)
def test_only_text_errors_and_the_end_are_in_the_stream(sent: bytes, written: bytes) -> None:
    assert texts().feed(sent) == written


def test_an_error_sent_on_several_data_lines_stays_one_event() -> None:
    stream = texts().feed(b'data: {"error":\ndata: {"message":"x"}}\n\n')
    assert [json.loads(event) for event in events(stream)] == [{"error": {"message": "x"}}]


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        b"{}",
        b"[]",
        b"5",
        b'{"choices":5}',
        b'{"choices":[{}]}',
        b'{"choices":[{"index":0}]}',
        b'{"choices":[{"index":0,"delta":null}]}',
        b'{"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}',
        b"[" * 2000,
    ],
)
def test_what_is_no_chat_chunk_is_the_upstreams_fault(data: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        texts().feed(encode(data))


def test_an_event_without_end_is_the_upstreams_fault() -> None:
    with pytest.raises(UpstreamBroken):
        texts().feed(b"x" * 2 * 1024 * 1024)


def test_a_repr_stream_ends_with_what_is_cited_where_data_was_sent() -> None:
    document = {"text": "x", "metadata": {"url": "http://a/b", "citation_id": 3}}
    stream = texts(data={"reranked_docs": [document]}).feed(chunk("Hi") + encode(DONE))
    before, _, line = stream.partition(b"data: [DONE]\n\n")
    assert before == b"data: 'Hi'\n\n"
    assert line.startswith(b"json: ")
    assert line.endswith(b"\n\n")
    (citation,) = json.loads(line.removeprefix(b"json: "))["reranked_docs"]
    assert (citation["type"], citation["url"], citation["citation_id"]) == ("link", "http://a/b", 3)
    assert texts(data={}).feed(encode(DONE)) == b"data: [DONE]\n\njson: {}\n\n"


@given(PIECES)
def test_answer_parts_hold_the_text_and_end_with_done(pieces: list[str]) -> None:
    stream = texts("answer_part").feed(b"".join(map(chunk, pieces)) + encode(DONE))
    *parts, end = map(json.loads, events(stream))
    assert parts == [{"type": "answer_part", "data": piece} for piece in pieces if piece]
    assert end == {"type": "done"}
    assert stream.endswith(b"\n\n")


def test_an_error_that_is_a_word_alone_is_told_all_the_same() -> None:
    (event,) = events(texts("answer_part").feed(encode(b'{"error":"boom"}')))
    assert json.loads(event) == {"type": "error", "data": "boom", "error": "boom"}


@pytest.mark.parametrize("style", ["repr", "answer_part"])
def test_an_error_of_ours_ends_a_stream_in_its_own_style(style: Style) -> None:
    *_, error, end = events(texts(style).failed(UpstreamBroken("It broke off.").envelope("id-1")))
    told = json.loads(error)
    assert (told["error"]["message"], told["error"]["request_id"]) == ("It broke off.", "id-1")
    if style == "repr":
        assert (set(told), end) == ({"error"}, DONE)
    else:
        assert (told["type"], told["data"], json.loads(end)) == ("error", "It broke off.", {"type": "done"})


@pytest.mark.parametrize(
    ("metadata", "citation"),
    [
        (
            {"url": "http://a/b"},
            {"type": "link", "url": "http://a/b", "vector_distance": 1.0, "reranker_score": 0.0, "citation_id": 0},
        ),
        (
            {
                "bucket_name": "b",
                "object_name": "o.pdf",
                "vector_distance": 0.2,
                "reranker_score": 0.9,
                "citation_id": 7,
            },
            {
                "type": "file",
                "bucket_name": "b",
                "object_name": "o.pdf",
                "vector_distance": 0.2,
                "reranker_score": 0.9,
                "citation_id": 7,
            },
        ),
        ({"url": "http://a/b", "bucket_name": "b", "object_name": "o"}, {"type": "link", "url": "http://a/b"}),
    ],
)
def test_a_document_is_cited_by_where_it_is_from(metadata: dict[str, Any], citation: dict[str, Any]) -> None:
    body = {
        "messages": "Hi.",
        "streaming": False,
        "data": {"reranked_docs": [{"text": "x", "metadata": metadata}], "k": 1},
    }
    request = from_body(body, "openai", "system", disable_streaming=False)
    data = json.loads(request.to_reply(orjson.dumps(ANSWER)))["data"]
    (cited,) = data["reranked_docs"]
    assert data["k"] == 1
    assert {**cited, **citation} == cited
    assert "text" not in cited


@pytest.mark.parametrize(
    ("documents", "param"),
    [
        ({"x": 1}, "data.reranked_docs"),
        ("x", "data.reranked_docs"),
        (["x"], "data.reranked_docs[0]"),
        ([{"metadata": {"url": "u"}}, {"text": "x"}], "data.reranked_docs[1].metadata"),
        ([{"metadata": {}}], "data.reranked_docs[0].metadata"),
        ([{"metadata": {"bucket_name": "b"}}], "data.reranked_docs[0].metadata"),
        ([{"metadata": {"url": 5}}], "data.reranked_docs[0].metadata.url"),
        ([{"metadata": {"source": {}}}], "data.reranked_docs[0].metadata.source"),
        ([{"metadata": {"url": "u", "reranker_score": None}}], "data.reranked_docs[0].metadata.reranker_score"),
        ([{"metadata": {"url": "u", "reranker_score": "x"}}], "data.reranked_docs[0].metadata.reranker_score"),
        ([{"metadata": {"url": "u", "vector_distance": "inf"}}], "data.reranked_docs[0].metadata.vector_distance"),
        ([{"metadata": {"url": "u", "citation_id": 1.5}}], "data.reranked_docs[0].metadata.citation_id"),
    ],
)
def test_a_document_from_nowhere_is_refused(documents: Any, param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        from_body(
            {"messages": "Hi.", "data": {"reranked_docs": documents}}, "openai", "system", disable_streaming=False
        )
    assert raised.value.param == param
    assert param in raised.value.message
