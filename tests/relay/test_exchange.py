"""Scripted conversations with an exchange: events in, actions recorded; no sockets, no waiting."""

from __future__ import annotations

import errno
import itertools
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.owners import Owner
from gateway.dialects.streams import Style
from gateway.relay import exchange as exchange_module
from gateway.relay.buffered_call import BufferedCall
from gateway.relay.exchange import _OF_A_STREAM, HELD_EVENT
from gateway.upstream.credentials import FixedKey
from gateway.wire.heads import AnswerHead, Header, RequestHead, answer_head
from gateway.wire.sse import Decoder
from tests.support.fake_vllm import DONE, EVENTS, USAGE, completion, event
from tests.support.recorders import CHAT, COMPLETIONS, LIMITS, MODELS, ClientRecorder, Conversation, body_limits

UPSTREAMS_OWN = [(b"date", b"Fri, 20 Nov 2026 23:03:18 GMT"), (b"server", b"uvicorn"), (b"x-request-id", b"theirs")]
SSE = [*UPSTREAMS_OWN, (b"content-type", b"text/event-stream; charset=utf-8"), (b"transfer-encoding", b"chunked")]
JSON = [*UPSTREAMS_OWN, (b"content-type", b"application/json")]

TURNS = [{"role": "user", "content": "What is it?"}]
OPENAI_WHOLE = {"model": "demo", "messages": TURNS}
OPENAI_STREAM = {**OPENAI_WHOLE, "stream": True}
SIMPLIFIED_WHOLE = {"messages": {"system": "Be brief.", "user": "What is it?"}, "streaming": False}
SIMPLIFIED_STREAM = {"messages": {"user": "What is it?"}}

CONTENT = b"".join(EVENTS)
STYLES: tuple[Style, ...] = ("openai", "repr", "answer_part")
UPSTREAMS_ERROR = (
    b'data: {"error":{"message":"out of memory","type":"InternalServerError","param":null,"code":500}}\n\n'
)


def sent_off(body: object = OPENAI_STREAM, *, reused: bool = False, **settings: Any) -> Conversation:
    """A conversation whose request is with the upstream."""
    talk = Conversation(**settings)
    talk.ask(body)
    talk.connect(reused=reused)
    return talk


def answering(
    body: object = OPENAI_STREAM, head: list[Header] = SSE, status: int = 200, **settings: Any
) -> Conversation:
    """A conversation whose upstream has sent its head."""
    talk = sent_off(body, **settings)
    talk.head(status, head)
    return talk


@pytest.mark.parametrize("size", [1, 2, 1023, 1024])
def test_what_comes_in_small_pieces_takes_no_more_memory_than_it_holds(size: int) -> None:
    content = orjson.dumps({"model": "demo", "messages": [{"role": "user", "content": "x" * 50_000}]})
    talk = Conversation()
    talk.begin()
    assert held_by(talk.exchange.request_body, content, size) < 1.3 * len(content)
    talk.exchange.request_end()
    assert talk.connect().request_body == content


@pytest.mark.parametrize("size", [1, 2, 1023, 1024])
def test_an_answer_in_small_pieces_takes_no_more_memory_than_it_holds(size: int) -> None:
    content = completion("x" * 100_000)
    talk = answering(SIMPLIFIED_WHOLE, [*JSON, (b"transfer-encoding", b"chunked")])
    assert held_by(talk.exchange.upstream_body, content, size) < 1.3 * len(content)
    talk.exchange.upstream_end()
    assert orjson.loads(talk.client.content)["text"] == "x" * 100_000


def held_by(takes: Callable[[bytes], None], content: bytes, size: int) -> int:
    """The memory that the content takes once it has come in pieces of this size."""
    tracemalloc.start()
    try:
        for at in range(0, len(content), size):
            takes(content[at : at + size])
        taken = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    # What measures coverage, and threads that other tests have left, take some, too.
    ours = [tracemalloc.Filter(True, name) for name in (__file__, "*/gateway/relay/*", "*/gateway/wire/*")]
    return sum(one.size for one in taken.filter_traces(ours).traces)


def last_events(content: bytes) -> list[bytes]:
    """The data of the events in `content`, which must end on a boundary."""
    assert content.endswith(b"\n\n")
    return Decoder(limit=1024 * 1024).feed(content)


def assert_ends_with_an_error_event(talk: Conversation, after: bytes, code: str = "upstream_broken") -> None:
    """The stream ends with `after`, then our error event on a boundary, then [DONE]."""
    assert talk.client.ending == "end"
    assert talk.client.content.startswith(after)
    error, done = last_events(talk.client.content[len(after) :])
    assert orjson.loads(error)["error"]["code"] == code
    assert orjson.loads(error)["error"]["request_id"] == talk.exchange.request_id
    assert done == b"[DONE]"
    talk.assert_settled()


def assert_answered(talk: Conversation, status: int, code: str) -> None:
    """A whole answer of our own."""
    assert (talk.client.status, talk.client.error["code"], talk.client.ending) == (status, code, "end")
    assert talk.client.header(b"content-type") == b"application/json"
    assert talk.client.header(b"content-length") == b"%d" % len(talk.client.content)
    assert talk.client.header(b"x-request-id") == talk.exchange.request_id.encode()
    assert talk.exchange.status == status
    talk.assert_settled()


# What passes through


def test_an_openai_call_is_relayed_untouched_both_ways() -> None:
    request = b'{"model":"demo",  "messages":[{"role":"user","content":"\\u00e9"}],"unknown":1.50}'
    talk = answering(request, [*JSON, (b"content-length", b"3"), (b"x-vllm", b"a"), (b"x-vllm", b"b")])
    talk.exchange.upstream_body(b"{ }")
    talk.exchange.upstream_end()
    assert talk.connections[0].request_body == request
    assert (talk.client.status, talk.client.content, talk.client.ending) == (200, b"{ }", "end")
    assert talk.client.headers == [
        (b"content-type", b"application/json"),
        (b"x-vllm", b"a"),
        (b"x-vllm", b"b"),
        (b"content-length", b"3"),
        (b"x-request-id", talk.exchange.request_id.encode()),
    ]
    assert talk.connections[0].given_back == "released"
    assert (talk.exchange.outcome, talk.exchange.form, talk.exchange.model) == ("done", "openai", "demo")
    talk.assert_settled()


def test_an_openai_stream_is_relayed_untouched() -> None:
    talk = answering()
    for piece in EVENTS:
        talk.exchange.upstream_body(piece)
    talk.exchange.upstream_end()
    assert talk.client.pieces == EVENTS
    assert talk.client.header(b"content-type") == b"text/event-stream; charset=utf-8"
    assert talk.client.header(b"transfer-encoding") is None
    assert (talk.exchange.outcome, talk.exchange.streaming, talk.exchange.events) == ("done", True, len(EVENTS))
    assert talk.exchange.bytes_out == len(CONTENT)
    talk.assert_settled()


@given(
    pieces=st.lists(st.sampled_from([*EVENTS, EVENTS[0] + EVENTS[1], EVENTS[0][:9], EVENTS[0][9:], b": ping\n\n"])),
    as_chunks=st.booleans(),
    body=st.sampled_from([OPENAI_STREAM, SIMPLIFIED_STREAM, {**SIMPLIFIED_STREAM, "stream_style": "repr"}]),
    ends=st.sampled_from([b"", DONE, b'data: {"error":{}}\n\n' + DONE, b'data: {"usage":\n\n']),
)
def test_a_stream_of_chunks_is_the_one_that_comes_in_pieces(
    pieces: list[bytes], as_chunks: bool, body: object, ends: bytes
) -> None:
    plain, framed = Conversation(), Conversation()
    for talk in (plain, framed):
        talk.ask(body)
        talk.connect()
        talk.exchange.upstream_head(*answer_head(200, SSE))
    if as_chunks:
        framed.client.chunk = lambda chunk: framed.client.body(chunk.split(b"\r\n", 1)[1][:-2])
    for piece in [*pieces, ends]:
        if piece:
            plain.exchange.upstream_body(piece)
            if piece.endswith(b"\n\n") and piece[:1] in b"de":  # as a connection hands chunks on
                framed.exchange.upstream_chunk(b"%x\r\n%b\r\n" % (len(piece), piece), len(piece))
            else:
                framed.exchange.upstream_body(piece)
    for talk in (plain, framed):
        talk.exchange.upstream_end()
        talk.assert_settled()
    assert (framed.client.status, framed.client.ending) == (plain.client.status, plain.client.ending)
    assert without_ids(framed.client.pieces) == without_ids(plain.client.pieces)
    for name in ("outcome", "status", "bytes_out", "usage", "events", "first_byte_at"):
        assert getattr(framed.exchange, name) == getattr(plain.exchange, name)
    assert framed.upstreams[0].broken_in_a_row == plain.upstreams[0].broken_in_a_row


def without_ids(pieces: list[bytes]) -> list[bytes]:
    return [re.sub(rb"[0-9a-f]{32}", b"ID", piece) for piece in pieces]


def test_a_chunk_for_a_client_that_has_left_reaches_nobody() -> None:
    talk = answering()
    talk.client.chunk = talk.client.body
    talk.exchange.upstream_body(EVENTS[0])
    talk.leave()
    talk.exchange.upstream_chunk(b"%x\r\n%b\r\n" % (len(EVENTS[1]), EVENTS[1]), len(EVENTS[1]))
    assert talk.client.pieces == [EVENTS[0]]
    talk.assert_settled()


@given(cuts=st.lists(st.integers(0, len(CONTENT))), crlf=st.booleans())
def test_a_stream_arrives_whole_and_in_whole_events_however_it_was_split(cuts: list[int], crlf: bool) -> None:
    content = CONTENT.replace(b"\n", b"\r\n") if crlf else CONTENT
    edges = sorted({0, *cuts, len(content)})
    talk = answering()
    for start, stop in itertools.pairwise(edges):
        talk.exchange.upstream_body(content[start:stop])
    talk.exchange.upstream_end()
    assert talk.client.content == content
    assert all(piece.endswith((b"\n\n", b"\r\n\r\n")) for piece in talk.client.pieces)
    assert (talk.client.ending, talk.exchange.outcome) == ("end", "done")


@given(st.lists(st.binary(min_size=1), max_size=8))
def test_a_whole_answer_arrives_as_the_bytes_that_it_is(pieces: list[bytes]) -> None:
    talk = answering(OPENAI_WHOLE, JSON)
    for piece in pieces:
        talk.exchange.upstream_body(piece)
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.pieces, talk.client.ending) == (200, pieces, "end")


def test_an_answer_without_a_body_is_a_head_and_an_end() -> None:
    talk = answering(OPENAI_WHOLE, UPSTREAMS_OWN, status=204)
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.pieces, talk.client.ending) == (204, [], "end")
    talk.assert_settled()


@pytest.mark.parametrize("content", [b"", b"{ }", completion(), EVENTS[0] + DONE, b"data: half"])
@pytest.mark.parametrize("head", [(200, JSON), (200, SSE), (400, JSON), (500, JSON)])
@pytest.mark.parametrize("body", [OPENAI_WHOLE, OPENAI_STREAM, SIMPLIFIED_WHOLE, SIMPLIFIED_STREAM])
def test_an_answer_that_comes_at_once_is_the_one_that_comes_in_pieces(
    body: object, head: tuple[int, list[Header]], content: bytes
) -> None:
    headers = ((b"x-request-id", b"mine"),)
    pieces, whole = Conversation(headers=headers), Conversation(headers=headers)
    for talk in (pieces, whole):
        talk.ask(body)
        talk.connect()
        talk.clock.advance(1)
    pieces.exchange.upstream_head(*answer_head(head[0], [*head[1], (b"content-length", b"%d" % len(content))]))
    if content:
        pieces.exchange.upstream_body(content)
    pieces.exchange.upstream_end()
    whole.exchange.upstream_answer(answer_head(*head)[0], content)
    for talk in (pieces, whole):
        talk.assert_settled()
    for name in ("status", "headers", "content", "ending"):
        assert getattr(whole.client, name) == getattr(pieces.client, name)
    for name in ("outcome", "status", "bytes_out", "usage", "events", "first_byte_at", "upstream_ended_at"):
        assert getattr(whole.exchange, name) == getattr(pieces.exchange, name)
    assert whole.upstreams[0].broken_in_a_row == pieces.upstreams[0].broken_in_a_row


def test_a_whole_answer_that_comes_too_late_reaches_nobody() -> None:
    talk = brought_to("waiting")
    talk.leave()
    talk.exchange.upstream_answer(answer_head(200, JSON)[0], b"{}")
    assert talk.client.status == 0
    talk.assert_settled()


def test_the_head_goes_out_with_the_first_byte_of_the_body() -> None:
    talk = answering()
    assert talk.client.status == 0
    talk.exchange.upstream_body(EVENTS[0][:10])
    assert talk.client.status == 0
    talk.exchange.upstream_body(EVENTS[0][10:])
    assert (talk.client.status, talk.client.content) == (200, EVENTS[0])


def test_completions_are_relayed_and_their_form_is_openai() -> None:
    request = b'{"model": "demo", "prompt": "Once", "stream": true}'
    talk = answering(request, route=COMPLETIONS)
    talk.exchange.upstream_body(DONE)
    talk.exchange.upstream_end()
    assert talk.connections[0].request_line == b"POST /v1/completions HTTP/1.1"
    assert talk.connections[0].request_body == request
    assert (talk.exchange.form, talk.exchange.streaming, talk.exchange.outcome) == ("openai", True, "done")


def test_the_model_list_is_asked_for_with_get_and_no_body() -> None:
    talk = answering(b"", JSON, route=MODELS)
    talk.exchange.upstream_body(b'{"data":[]}')
    talk.exchange.upstream_end()
    connection = talk.connections[0]
    assert connection.request_line == b"GET /v1/models HTTP/1.1"
    assert b"content-length" not in dict(connection.request_headers)
    assert connection.request_body == b""
    assert (talk.client.content, talk.exchange.outcome) == (b'{"data":[]}', "done")


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_an_upstreams_refusal_keeps_its_status_body_and_retry_after(status: int) -> None:
    body = b'{"error":{"message":"theirs"}}'
    talk = answering(SIMPLIFIED_WHOLE, [*JSON, (b"retry-after", b"7")], status)
    talk.exchange.upstream_body(body)
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content, talk.client.ending) == (status, body, "end")
    assert talk.client.header(b"retry-after") == b"7"
    assert talk.exchange.outcome == ("upstream_error" if status >= 500 else "done")
    assert talk.upstreams[0].broken_in_a_row == (1 if status >= 500 else 0)
    assert len(talk.transport.asked) == 1
    talk.assert_settled()


def test_a_compressed_stream_is_relayed_as_the_bytes_that_it_is() -> None:
    opaque = [b"\x1f\x8b\x08", b"no blank line", b"and no end of events"]
    talk = answering(OPENAI_STREAM, [*SSE, (b"content-encoding", b"gzip")])
    for piece in opaque:
        talk.exchange.upstream_body(piece)
    talk.exchange.upstream_end()
    assert (talk.client.pieces, talk.client.ending, talk.exchange.outcome) == (opaque, "end", "done")
    assert talk.client.header(b"content-encoding") == b"gzip"


def test_a_compressed_stream_that_breaks_off_is_cut() -> None:
    talk = answering(OPENAI_STREAM, [*SSE, (b"content-encoding", b"gzip")])
    talk.exchange.upstream_body(b"\x1f\x8b\x08\n\n")
    talk.lose(answered=True)
    assert (talk.client.content, talk.client.ending) == (b"\x1f\x8b\x08\n\n", "abort")
    talk.assert_settled()


# The simplified form


def test_a_simplified_call_goes_up_as_a_chat_call_and_comes_back_with_its_text() -> None:
    talk = answering(SIMPLIFIED_WHOLE, [*JSON, (b"content-length", b"9999")])
    answer = completion("It's.")
    talk.exchange.upstream_body(answer[:50])
    talk.exchange.upstream_body(answer[50:])
    assert talk.client.status == 0
    talk.exchange.upstream_end()
    chat = orjson.loads(talk.connections[0].request_body)
    assert chat["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    assert (chat["model"], chat["stream"]) == ("demo", False)
    reply = orjson.loads(talk.client.content)
    assert (reply["text"], reply["choices"]) == ("It's.", orjson.loads(answer)["choices"])
    assert talk.client.header(b"content-length") == b"%d" % len(talk.client.content)
    assert (talk.exchange.form, talk.exchange.outcome, talk.client.ending) == ("simplified", "done", "end")
    assert talk.exchange.usage == (31, 4)
    talk.assert_settled()


def test_a_simplified_stream_in_the_openai_style_is_vllms_own() -> None:
    talk = answering(SIMPLIFIED_STREAM)
    talk.exchange.upstream_body(CONTENT)
    talk.exchange.upstream_end()
    assert orjson.loads(talk.connections[0].request_body)["stream"] is True
    assert (talk.client.content, talk.client.ending) == (CONTENT, "end")
    assert talk.exchange.events == len(EVENTS)
    assert (talk.exchange.form, talk.exchange.streaming, talk.exchange.outcome) == ("simplified", True, "done")
    talk.assert_settled()


@given(st.lists(st.integers(0, len(CONTENT))))
def test_a_simplified_stream_in_the_repr_style_is_the_same_however_it_was_split(cuts: list[int]) -> None:
    talk = answering({**SIMPLIFIED_STREAM, "stream_style": "repr"}, [*SSE, (b"x-theirs", b"1")])
    edges = sorted({0, *cuts, len(CONTENT)})
    for start, stop in itertools.pairwise(edges):
        talk.exchange.upstream_body(CONTENT[start:stop])
    talk.exchange.upstream_end()
    texts = ["", "It's", ' a "q"\n', " end"]
    assert talk.client.content == b"".join(b"data: %b\n\n" % repr(text).encode() for text in texts) + DONE
    assert talk.client.header(b"x-theirs") is None
    assert (talk.client.ending, talk.exchange.outcome) == ("end", "done")


def test_a_gateway_that_streams_nothing_asks_for_a_whole_answer() -> None:
    talk = answering(SIMPLIFIED_STREAM, JSON, disable_streaming=True)
    talk.exchange.upstream_body(completion())
    talk.exchange.upstream_end()
    assert orjson.loads(talk.connections[0].request_body)["stream"] is False
    assert orjson.loads(talk.client.content)["text"] == "It's."
    assert talk.exchange.streaming is False


def test_a_whole_answer_to_a_simplified_stream_is_a_whole_reply() -> None:
    talk = answering(SIMPLIFIED_STREAM, JSON)
    talk.exchange.upstream_body(completion())
    talk.exchange.upstream_end()
    assert orjson.loads(talk.client.content)["text"] == "It's."


@pytest.mark.parametrize("answer", [b"", b"[]", b"<html>", b'{"choices":[]}', b'{"choices":[{"message":null}]}'])
def test_an_answer_that_is_no_chat_completion_is_a_502(answer: bytes) -> None:
    talk = answering(SIMPLIFIED_WHOLE, JSON)
    if answer:
        talk.exchange.upstream_body(answer)
    talk.exchange.upstream_end()
    assert_answered(talk, 502, "upstream_broken")
    assert talk.connections[0].given_back == "released"
    assert talk.upstreams[0].broken_in_a_row == 1


@pytest.mark.parametrize("seen", [b"", EVENTS[0]])
def test_a_stream_in_the_repr_style_that_holds_no_chunks_is_an_error(seen: bytes) -> None:
    talk = answering({**SIMPLIFIED_STREAM, "stream_style": "repr"})
    if seen:
        talk.exchange.upstream_body(seen)
    talk.exchange.upstream_body(b"data: no JSON\n\n")
    if seen:
        assert_ends_with_an_error_event(talk, b"data: ''\n\n")
    else:
        assert_answered(talk, 502, "upstream_broken")
    assert talk.connections[0].given_back == "discarded"


def test_an_answer_too_large_to_be_rewritten_is_a_502(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "COLLECTED", 1000)
    talk = answering(SIMPLIFIED_WHOLE, JSON)
    talk.exchange.upstream_body(b" " * 1000)
    assert talk.client.status == 0
    talk.exchange.upstream_body(b" ")
    assert_answered(talk, 502, "upstream_broken")
    assert talk.connections[0].given_back == "discarded"


# The request as the upstream sees it


def test_the_request_head_says_what_the_upstream_may_know() -> None:
    talk = sent_off(
        OPENAI_WHOLE,
        query="?a=1&b=%20",
        credentials=FixedKey("ours"),
        headers=(
            (b"host", b"gateway.example"),
            (b"x-request-id", b"mine-1"),
            (b"authorization", b"Bearer theirs"),
            (b"cookie", b"session=1"),
            (b"connection", b"keep-alive, x-hop"),
            (b"x-hop", b"1"),
            (b"keep-alive", b"timeout=5"),
            (b"te", b"trailers"),
            (b"transfer-encoding", b"chunked"),
            (b"upgrade", b"h2c"),
            (b"proxy-authorization", b"Basic x"),
            (b"expect", b"100-continue"),
            (b"content-length", b"7"),
            (b"content-type", b"application/json"),
            (b"accept-encoding", b"gzip"),
            (b"traceparent", b"00-1"),
            (b"x-twice", b"1"),
            (b"x-twice", b"2"),
        ),
    )
    connection = talk.connections[0]
    assert talk.exchange.request_id == "mine-1" != talk.exchange.upstream_id
    assert connection.request_line == b"POST /v1/chat/completions?a=1&b=%20 HTTP/1.1"
    assert sorted(connection.request_headers) == sorted(
        [
            (b"host", b"vllm-0:8008"),
            (b"x-request-id", talk.exchange.upstream_id.encode()),
            (b"authorization", b"Bearer ours"),
            (b"content-length", b"%d" % len(connection.request_body)),
            (b"content-type", b"application/json"),
            (b"accept-encoding", b"gzip"),
            (b"traceparent", b"00-1"),
            (b"x-twice", b"1"),
            (b"x-twice", b"2"),
        ]
    )


def test_no_authorization_goes_up_where_the_upstreams_have_no_key() -> None:
    talk = sent_off(OPENAI_WHOLE, headers=((b"authorization", b"Bearer theirs"),))
    assert b"authorization" not in dict(talk.connections[0].request_headers)


def test_a_rewritten_request_is_json_and_asks_for_an_answer_that_can_be_read() -> None:
    headers = ((b"content-type", b"text/plain"), (b"accept-encoding", b"gzip"), (b"x-kept", b"1"))
    talk = sent_off(SIMPLIFIED_STREAM, headers=headers)
    sent = talk.connections[0].request_headers
    assert [value for name, value in sent if name == b"content-type"] == [b"application/json"]
    assert [value for name, value in sent if name == b"accept-encoding"] == [b"identity"]
    assert (b"x-kept", b"1") in sent
    assert (b"content-length", b"%d" % len(talk.connections[0].request_body)) in sent


@pytest.mark.parametrize(
    ("sent", "goes_up"),
    [
        (None, b"application/json"),
        (b"application/x-www-form-urlencoded", b"application/json"),
        (b"application/json; charset=utf-8", b"application/json; charset=utf-8"),
    ],
)
def test_an_openai_call_goes_up_as_json_whatever_it_says_that_it_is(sent: bytes | None, goes_up: bytes) -> None:
    talk = sent_off(OPENAI_WHOLE, headers=((b"content-type", sent),) if sent else ())
    assert [value for name, value in talk.connections[0].request_headers if name == b"content-type"] == [goes_up]


@pytest.mark.parametrize("sent", [b"", b"two words", b"a" * 129, b"a\xff", b'"'])
def test_a_request_id_that_could_do_harm_is_replaced(sent: bytes) -> None:
    talk = sent_off(headers=((b"x-request-id", sent),))
    ours = dict(talk.connections[0].request_headers)[b"x-request-id"]
    assert ours != sent
    assert len(ours) == 32


def test_a_body_in_pieces_is_joined_and_sent_once() -> None:
    talk = Conversation()
    talk.begin()
    content = orjson.dumps(OPENAI_WHOLE)
    for at in range(len(content)):
        talk.exchange.request_body(content[at : at + 1])
    assert talk.transport.asked == []
    talk.exchange.request_end()
    assert talk.connect().request_body == content


# What is refused before an upstream hears of it


@pytest.mark.parametrize("length", [b"100001", b"99999999999"])
def test_a_body_announced_too_large_is_refused_before_it_comes(length: bytes) -> None:
    talk = Conversation(headers=((b"content-length", length),))
    talk.begin()
    assert_answered(talk, 413, "request_too_large")
    talk.exchange.request_body(b"{}")
    talk.exchange.request_end()
    assert talk.transport.asked == []


def test_a_body_that_grows_too_large_is_refused_at_the_byte_too_many() -> None:
    talk = Conversation(limits=replace(LIMITS, max_body_bytes=10))
    talk.begin()
    talk.exchange.request_body(b"x" * 10)
    assert talk.client.status == 0
    talk.exchange.request_body(b"x")
    assert_answered(talk, 413, "request_too_large")
    talk.exchange.request_body(b"x")
    talk.exchange.request_end()
    assert talk.transport.asked == []


def test_a_body_of_exactly_the_limit_is_taken() -> None:
    content = orjson.dumps(OPENAI_WHOLE)
    headers = ((b"content-length", b"%d" % len(content)),)
    talk = sent_off(content, headers=headers, limits=replace(LIMITS, max_body_bytes=len(content)))
    assert talk.connections[0].request_body == content


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"GZIP", b"identity, gzip"])
def test_a_compressed_body_is_refused(encoding: bytes) -> None:
    talk = Conversation(headers=((b"content-encoding", encoding),))
    talk.begin()
    assert_answered(talk, 415, "unsupported_content_encoding")


def test_a_body_said_not_to_be_compressed_is_taken() -> None:
    assert sent_off(headers=((b"content-encoding", b"Identity"),)).connections[0].sent


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"\xff", {}, {"messages": 1}, {"messages": None}, {"messages": {}}]
)
def test_a_body_that_is_no_chat_call_is_a_400(body: object) -> None:
    talk = Conversation()
    talk.ask(body)
    assert_answered(talk, 400, "bad_request")
    assert talk.transport.asked == []
    assert talk.upstreams[0].broken_in_a_row == 0


def test_a_model_that_is_in_no_list_is_for_the_upstream_to_judge() -> None:
    for call in (SIMPLIFIED_WHOLE, OPENAI_WHOLE):
        talk = Conversation(models=("demo", "other"))
        talk.ask({**call, "model": "adapter"})
        assert orjson.loads(talk.connect().request_body)["model"] == "adapter"


def test_a_simplified_call_while_no_model_is_known_is_a_503() -> None:
    talk = Conversation(models=())
    talk.ask(SIMPLIFIED_WHOLE)
    assert_answered(talk, 503, "no_upstream_ready")
    assert talk.client.header(b"retry-after") == b"2"
    assert talk.transport.asked == []


@pytest.mark.parametrize(
    ("sent", "configured", "asked"),
    [(None, None, "demo"), (None, "other", "other"), ("other", None, "other"), ("demo", "other", "demo")],
)
def test_the_model_is_the_one_sent_or_configured_or_served(sent: str | None, configured: str, asked: str) -> None:
    body = {**SIMPLIFIED_WHOLE, "model": sent}
    talk = sent_off(body, models=("demo", "other"), model=configured)
    assert orjson.loads(talk.connections[0].request_body)["model"] == asked
    assert talk.exchange.model == asked


# orjson reads 1024 levels and writes 254.
DEEP = b"[" * 500 + b"]" * 500


def test_a_simplified_call_nested_too_deeply_to_be_rewritten_is_a_400() -> None:
    talk = Conversation()
    talk.ask(b'{"messages": "What is it?", "extra": ' + DEEP + b"}")
    assert_answered(talk, 400, "bad_request")


def test_an_answer_is_rewritten_however_deep_it_is() -> None:
    talk = answering(SIMPLIFIED_WHOLE, JSON)
    talk.exchange.upstream_body(completion()[:-1] + b',"extra":' + DEEP + b"}")
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.ending) == (200, "end")
    assert talk.client.content.startswith(b'{"text":"')
    assert b',"extra":' + DEEP + b"," in talk.client.content


# No connection


@pytest.mark.parametrize(
    ("models", "status", "code"), [((), 503, "no_upstream_ready"), (("demo",), 502, "upstream_unreachable")]
)
def test_a_refused_connect_says_loading_until_the_upstream_has_served(
    models: tuple[str, ...], status: int, code: str
) -> None:
    talk = Conversation(models=models)
    talk.ask(OPENAI_STREAM)
    talk.exchange.upstream_unreachable("connection refused")
    assert_answered(talk, status, code)
    assert talk.client.header(b"retry-after") == (b"2" if status == 503 else None)
    assert talk.exchange.outcome == "upstream_error"
    assert talk.upstreams[0].broken_in_a_row == 1
    assert len(talk.transport.asked) == 1


def test_a_connect_that_takes_too_long_is_a_504() -> None:
    talk = Conversation()
    talk.ask(OPENAI_STREAM)
    talk.exchange.upstream_unreachable("it took no connection", timed_out=5)
    assert_answered(talk, 504, "connect_timeout")
    assert "5 s" in talk.client.error["message"]
    assert talk.exchange.outcome == "timeout:connect"


@pytest.mark.parametrize("timed_out", [None, 5.0])
def test_the_other_upstream_is_asked_once_where_one_cannot_be_reached(timed_out: float | None) -> None:
    talk = Conversation(upstreams=2)
    talk.ask(OPENAI_WHOLE)
    first = talk.transport.asked[0][0]
    assert first.in_flight == 1
    talk.exchange.upstream_unreachable("connection refused", timed_out=timed_out)
    second = talk.transport.asked[1][0]
    assert first is not second
    assert (first.in_flight, second.in_flight) == (0, 1)
    assert talk.exchange.upstream is second
    talk.connect()
    assert dict(talk.connections[0].request_headers)[b"host"] == second.authority.encode()
    talk.head(200, JSON)
    talk.exchange.upstream_body(b"{}")
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.exchange.outcome) == (200, "done")
    assert (first.broken_in_a_row, second.broken_in_a_row) == (1, 0)
    talk.assert_settled()


def test_two_upstreams_that_cannot_be_reached_are_the_end_of_it() -> None:
    talk = Conversation(upstreams=3)
    talk.ask(OPENAI_WHOLE)
    talk.exchange.upstream_unreachable("connection refused")
    talk.exchange.upstream_unreachable("connection refused")
    assert_answered(talk, 502, "upstream_unreachable")
    assert len(talk.transport.asked) == 2


def test_an_upstream_that_does_not_serve_the_model_is_no_second_choice() -> None:
    talk = Conversation(upstreams=2)
    talk.upstreams[1].models = ("other",)
    talk.ask(OPENAI_WHOLE)
    talk.exchange.upstream_unreachable("connection refused")
    assert_answered(talk, 502, "upstream_unreachable")


# A reused connection that was closing


def test_a_stale_connection_is_replaced_and_the_request_sent_once_more() -> None:
    talk = sent_off(OPENAI_WHOLE, reused=True)
    talk.clock.advance(0.0625)
    talk.lose(answered=False)
    assert talk.transport.asked == [(talk.upstreams[0], False), (talk.upstreams[0], True)]
    assert talk.client.status == 0
    talk.connect()
    assert talk.connections[1].sent == talk.connections[0].sent
    talk.head(200, JSON)
    talk.exchange.upstream_body(b"{}")
    talk.exchange.upstream_end()
    assert (talk.client.content, talk.exchange.outcome) == (b"{}", "done")
    assert talk.upstreams[0].broken_in_a_row == 0
    talk.assert_settled()


@pytest.mark.parametrize(("after", "again"), [(0.0, True), (0.09375, True), (0.109375, False), (1.0, False)])
def test_only_a_loss_within_100_ms_is_a_stale_connection(after: float, again: bool) -> None:
    talk = sent_off(OPENAI_WHOLE, reused=True)
    talk.clock.advance(after)
    talk.lose(answered=False)
    assert len(talk.transport.asked) == (2 if again else 1)
    assert talk.client.status == (0 if again else 502)


@pytest.mark.parametrize(("reused", "answered"), [(True, True), (False, False), (False, True)])
def test_nothing_is_sent_twice_after_a_byte_or_on_a_fresh_connection(reused: bool, answered: bool) -> None:
    talk = sent_off(OPENAI_WHOLE, reused=reused)
    talk.lose(answered=answered)
    assert_answered(talk, 502, "upstream_broken")
    assert len(talk.transport.asked) == 1


def test_a_request_is_not_sent_a_third_time() -> None:
    talk = sent_off(OPENAI_WHOLE, reused=True)
    talk.lose(answered=False)
    talk.connect(reused=True)
    talk.lose(answered=False)
    assert_answered(talk, 502, "upstream_broken")
    assert len(talk.transport.asked) == 2


def test_a_fresh_connection_that_cannot_be_had_is_the_end_of_it() -> None:
    talk = sent_off(OPENAI_WHOLE, reused=True, upstreams=2)
    talk.lose(answered=False)
    talk.exchange.upstream_unreachable("connection refused")
    assert_answered(talk, 502, "upstream_unreachable")
    assert len(talk.transport.asked) == 2


# Losses


def test_a_loss_after_the_head_and_before_the_body_is_a_502() -> None:
    talk = answering()
    talk.lose(answered=True, why="it reset the connection")
    assert_answered(talk, 502, "upstream_broken")
    assert "it reset the connection" in talk.client.error["message"]
    assert talk.exchange.outcome == "upstream_error"
    assert talk.upstreams[0].broken_in_a_row == 1


def test_a_loss_before_the_end_of_the_first_event_is_a_502() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[0][:-1])
    talk.lose(answered=True)
    assert_answered(talk, 502, "upstream_broken")


def test_a_whole_answer_that_breaks_off_is_cut_and_never_ended() -> None:
    talk = answering(OPENAI_WHOLE, [*JSON, (b"content-length", b"10")])
    talk.exchange.upstream_body(b"12345")
    talk.lose(answered=True)
    assert (talk.client.content, talk.client.ending) == (b"12345", "abort")
    assert talk.exchange.outcome == "upstream_error"
    talk.assert_settled()


def test_a_simplified_answer_that_breaks_off_is_a_502() -> None:
    talk = answering(SIMPLIFIED_WHOLE, JSON)
    talk.exchange.upstream_body(completion()[:-1])
    talk.lose(answered=True)
    assert_answered(talk, 502, "upstream_broken")


@given(at=st.integers(len(EVENTS[0]), len(CONTENT) - len(DONE)), crlf=st.booleans())
def test_a_stream_that_breaks_off_anywhere_ends_with_an_error_event_on_a_boundary(at: int, crlf: bool) -> None:
    newline = b"\r\n" if crlf else b"\n"
    seen = CONTENT[:at].replace(b"\n", newline)
    whole = seen[: seen.rfind(newline * 2) + len(newline * 2)]
    talk = answering()
    talk.exchange.upstream_body(seen)
    talk.lose(answered=True)
    assert_ends_with_an_error_event(talk, whole)


@pytest.mark.parametrize("style", STYLES)
def test_a_simplified_stream_that_breaks_off_ends_with_an_error_event(style: Style) -> None:
    talk = answering(SIMPLIFIED_STREAM, stream_style=style)
    talk.exchange.upstream_body(EVENTS[1] + EVENTS[2][:20])
    talk.lose(answered=True)
    if style == "answer_part":
        part, error, done = (orjson.loads(event[6:]) for event in talk.client.content.split(b"\n\n")[:-1])
        assert (part, done) == ({"type": "answer_part", "data": "It's"}, {"type": "done"})
        assert (error["type"], error["error"]["code"]) == ("error", "upstream_broken")
        talk.assert_settled()
    else:
        assert_ends_with_an_error_event(talk, EVENTS[1] if style == "openai" else b'data: "It\'s"\n\n')


def test_half_an_event_too_large_to_be_held_back_makes_a_loss_a_cut() -> None:
    talk = answering()
    half = b"data: " + b"x" * HELD_EVENT
    talk.exchange.upstream_body(EVENTS[0] + half)
    talk.lose(answered=True)
    assert (talk.client.content, talk.client.ending) == (EVENTS[0] + half, "abort")
    assert talk.exchange.outcome == "upstream_error"
    talk.assert_settled()


def test_half_an_event_of_just_the_size_that_is_held_back_is_left_out() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[0] + b"x" * HELD_EVENT)
    assert talk.client.content == EVENTS[0]
    talk.lose(answered=True)
    assert_ends_with_an_error_event(talk, EVENTS[0])


@pytest.mark.parametrize("rest", [b"\n\n", b"\n\ndata: half"])
def test_a_large_event_that_ended_leaves_the_stream_on_a_boundary_again(rest: bytes) -> None:
    talk = answering()
    large = b"data: " + b"x" * HELD_EVENT
    talk.exchange.upstream_body(large)
    talk.exchange.upstream_body(b"y")
    talk.exchange.upstream_body(rest)
    talk.lose(answered=True)
    assert_ends_with_an_error_event(talk, large + b"y\n\n")


def test_a_large_event_of_which_only_the_blank_line_is_split_off_is_still_cut() -> None:
    talk = answering()
    large = b"data: " + b"x" * HELD_EVENT
    talk.exchange.upstream_body(large)
    talk.exchange.upstream_body(b"\n")
    talk.lose(answered=True)
    assert (talk.client.content, talk.client.ending) == (large, "abort")


# Ends of a stream


@pytest.mark.parametrize("seen", [EVENTS[1], b"".join(EVENTS[:-1])])
def test_a_stream_that_ends_without_done_ends_with_an_error_event(seen: bytes) -> None:
    talk = answering()
    talk.exchange.upstream_body(seen)
    talk.exchange.upstream_end()
    assert_ends_with_an_error_event(talk, seen)
    assert talk.exchange.outcome == "upstream_error"


def test_a_stream_that_ends_before_anything_came_is_a_502() -> None:
    talk = answering()
    talk.exchange.upstream_end()
    assert_answered(talk, 502, "upstream_broken")


def test_a_text_that_speaks_of_done_is_not_the_end_of_a_stream() -> None:
    talk = answering()
    seen = event({"content": "SSE streams end with data: [DONE]"})
    talk.exchange.upstream_body(seen)
    talk.exchange.upstream_end()
    assert_ends_with_an_error_event(talk, seen)


def test_a_stream_that_ends_in_half_an_event_ends_with_an_error_event() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[1] + EVENTS[2][:20])
    talk.exchange.upstream_end()
    assert_ends_with_an_error_event(talk, EVENTS[1])


def test_a_stream_whose_done_lacks_the_blank_line_is_complete() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[1] + b"data: [DONE]\n")
    talk.exchange.upstream_end()
    assert (talk.client.content, talk.client.ending) == (EVENTS[1] + b"data: [DONE]\n", "end")
    assert talk.exchange.outcome == "done"


def test_an_error_event_does_not_break_the_length_that_was_announced() -> None:
    talk = answering(head=[*SSE[:-1], (b"content-length", b"%d" % len(CONTENT))])
    talk.exchange.upstream_body(EVENTS[0])
    talk.lose(answered=True)
    if talk.client.header(b"content-length") is None:
        assert_ends_with_an_error_event(talk, EVENTS[0])
    else:
        assert talk.client.ending == "abort"


@pytest.mark.parametrize("split", [False, True])
def test_an_upstreams_own_error_event_is_relayed_and_seen(split: bool) -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[1])
    if split:
        talk.exchange.upstream_body(UPSTREAMS_ERROR)
        talk.exchange.upstream_body(DONE)
    else:
        talk.exchange.upstream_body(UPSTREAMS_ERROR + DONE)
    talk.exchange.upstream_end()
    assert (talk.client.content, talk.client.ending) == (EVENTS[1] + UPSTREAMS_ERROR + DONE, "end")
    assert talk.exchange.outcome == "upstream_error"
    assert talk.upstreams[0].broken_in_a_row == 1


def test_an_upstreams_own_error_event_passes_through_the_repr_style() -> None:
    talk = answering({**SIMPLIFIED_STREAM, "stream_style": "repr"})
    talk.exchange.upstream_body(UPSTREAMS_ERROR + DONE)
    talk.exchange.upstream_end()
    assert (talk.client.content, talk.exchange.outcome) == (UPSTREAMS_ERROR + DONE, "upstream_error")


def test_a_refusal_that_is_a_stream_needs_no_done() -> None:
    talk = answering(status=400)
    talk.exchange.upstream_body(UPSTREAMS_ERROR)
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content, talk.client.ending) == (400, UPSTREAMS_ERROR, "end")


def test_a_refusal_that_is_a_stream_is_relayed_to_its_last_byte() -> None:
    talk = answering(status=400)
    talk.exchange.upstream_body(UPSTREAMS_ERROR[:-1])
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content, talk.client.ending) == (400, UPSTREAMS_ERROR[:-1], "end")


def test_a_last_event_that_is_no_chunk_and_lacks_its_blank_line_is_one_error() -> None:
    talk = answering({**SIMPLIFIED_STREAM, "stream_style": "repr"})
    talk.exchange.upstream_body(b"data: no JSON\ndata: [DONE]\n")
    talk.exchange.upstream_end()
    assert_answered(talk, 502, "upstream_broken")


def test_a_stream_in_the_repr_style_whose_done_lacks_the_blank_line_is_complete() -> None:
    talk = answering({**SIMPLIFIED_STREAM, "stream_style": "repr"})
    talk.exchange.upstream_body(EVENTS[1] + b"data: [DONE]\n")
    talk.exchange.upstream_end()
    assert (talk.client.content, talk.client.ending) == (b'data: "It\'s"\n\n' + DONE, "end")
    assert talk.exchange.outcome == "done"


def test_a_text_that_speaks_of_an_error_is_none() -> None:
    talk = answering()
    talk.exchange.upstream_body(event({"content": 'data: {"error": 1}'}) + DONE)
    talk.exchange.upstream_end()
    assert talk.exchange.outcome == "done"


def test_usage_is_found_at_the_end_of_a_stream() -> None:
    talk = answering()
    for piece in EVENTS:
        talk.exchange.upstream_body(piece)
    talk.exchange.upstream_end()
    assert talk.exchange.usage == (USAGE["prompt_tokens"], USAGE["completion_tokens"])


@given(st.integers(1, len(completion()) - 1))
def test_usage_is_found_in_a_whole_answer_wherever_it_was_split(at: int) -> None:
    talk = answering(OPENAI_WHOLE, JSON)
    talk.exchange.upstream_body(completion()[:at])
    talk.exchange.upstream_body(completion()[at:])
    talk.exchange.upstream_end()
    assert talk.exchange.usage == (USAGE["prompt_tokens"], USAGE["completion_tokens"])


def test_no_usage_is_no_usage() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[1] + DONE)
    talk.exchange.upstream_end()
    assert talk.exchange.usage is None


# Time. Ticks and limits are binary fractions, so that sums are exact.

TICK = 0.125


def seconds_until_the_end(talk: Conversation) -> float:
    """Let time pass tick by tick, until the exchange has ended."""
    start = talk.clock.now
    while not talk.client.ending:
        assert talk.clock.now - start < 2 * LIMITS.total_timeout, "no limit ended it"
        talk.clock.advance(TICK)
    talk.assert_settled()
    return talk.clock.now - start


@pytest.mark.parametrize("body", [OPENAI_STREAM, SIMPLIFIED_STREAM, {**SIMPLIFIED_STREAM, "stream_style": "repr"}])
@pytest.mark.parametrize("state", ["connecting", "waiting", "answering"])
def test_a_first_token_that_does_not_come_is_a_504(body: object, state: str) -> None:
    talk = Conversation()
    talk.ask(body)
    if state != "connecting":
        talk.connect()
    if state == "answering":
        talk.head(200, SSE)
    assert seconds_until_the_end(talk) == LIMITS.first_token_timeout
    assert_answered(talk, 504, "first_token_timeout")
    assert talk.exchange.outcome == "timeout:first_token"
    assert [connection.given_back for connection in talk.connections] == ["discarded"] * len(talk.connections)


def test_the_first_token_is_waited_for_from_the_end_of_the_request() -> None:
    talk = Conversation()
    talk.begin()
    content = orjson.dumps(OPENAI_STREAM)
    for piece in (content[:10], content[10:20], content[20:]):
        talk.clock.advance(LIMITS.body_timeout / 4)
        talk.exchange.request_body(piece)
    talk.exchange.request_end()
    assert seconds_until_the_end(talk) == LIMITS.first_token_timeout
    assert talk.exchange.outcome == "timeout:first_token"


@pytest.mark.parametrize("gap", [0.0, 1.0, LIMITS.idle_timeout - TICK])
def test_a_stream_that_stops_ends_with_an_error_event_after_the_idle_limit(gap: float) -> None:
    talk = answering()
    talk.clock.advance(LIMITS.idle_timeout + TICK)
    talk.exchange.upstream_body(EVENTS[0])
    talk.clock.advance(gap)
    talk.exchange.upstream_body(EVENTS[1])
    assert seconds_until_the_end(talk) == LIMITS.idle_timeout
    assert_ends_with_an_error_event(talk, EVENTS[0] + EVENTS[1], "idle_timeout")
    assert talk.exchange.outcome == "timeout:idle"
    assert talk.connections[0].given_back == "discarded"


def test_the_idle_limit_before_the_first_whole_event_is_a_504() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[0][:10])
    assert seconds_until_the_end(talk) == LIMITS.idle_timeout
    assert_answered(talk, 504, "idle_timeout")


def test_a_stream_that_never_stops_for_long_runs_until_the_total_limit() -> None:
    talk = answering()
    while not talk.client.ending:
        talk.exchange.upstream_body(EVENTS[1])
        talk.clock.advance(LIMITS.idle_timeout - TICK)
    assert talk.exchange.outcome == "timeout:total"
    assert talk.exchange.ended_at == talk.exchange.started_at + LIMITS.total_timeout
    assert last_events(talk.client.content)[-1] == b"[DONE]"
    talk.assert_settled()


def test_while_the_client_is_paused_the_idle_limit_waits() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[0])
    talk.exchange.client_paused()
    talk.clock.advance(10 * LIMITS.idle_timeout + 1)
    assert not talk.client.ending
    talk.exchange.client_resumed()
    assert seconds_until_the_end(talk) == LIMITS.idle_timeout
    assert talk.exchange.outcome == "timeout:idle"


def test_while_the_client_is_paused_the_total_limit_runs() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[0])
    talk.exchange.client_paused()
    assert seconds_until_the_end(talk) == LIMITS.total_timeout
    assert talk.exchange.outcome == "timeout:total"


@pytest.mark.parametrize("body", [OPENAI_WHOLE, SIMPLIFIED_WHOLE])
@pytest.mark.parametrize("pieces", [0, 1])
def test_a_whole_answer_has_the_total_limit_alone(body: object, pieces: int) -> None:
    talk = answering(body, JSON)
    for _ in range(pieces):
        talk.exchange.upstream_body(b"{")
    assert seconds_until_the_end(talk) == LIMITS.total_timeout
    assert talk.exchange.outcome == "timeout:total"
    if pieces and body is OPENAI_WHOLE:
        assert (talk.client.content, talk.client.ending) == (b"{", "abort")
    else:
        assert_answered(talk, 504, "total_timeout")


@pytest.mark.parametrize("pieces", [0, 1, 5])
def test_a_body_that_stops_coming_is_a_408(pieces: int) -> None:
    talk = Conversation()
    talk.begin()
    for _ in range(pieces):
        talk.clock.advance(LIMITS.body_timeout - TICK)
        talk.exchange.request_body(b" " * 12_000)
    assert seconds_until_the_end(talk) == LIMITS.body_timeout
    assert_answered(talk, 408, "body_timeout")
    assert talk.client.header(b"connection") == b"close"
    assert talk.transport.asked == []


@pytest.mark.parametrize(("bytes_a_second", "seconds"), [(1, 11), (512, 22), (1000, 103), (2000, 103)])
def test_a_body_that_drips_is_ended_by_its_rate_or_by_the_total_limit(bytes_a_second: int, seconds: float) -> None:
    talk = Conversation(limits=replace(LIMITS, max_body_bytes=1_000_000))
    talk.begin()
    while not talk.client.ending:
        assert talk.clock.now - talk.exchange.started_at <= LIMITS.total_timeout
        talk.exchange.request_body(b" " * bytes_a_second)
        talk.clock.advance(1)
    assert talk.exchange.ended_at is not None
    assert talk.exchange.ended_at - talk.exchange.started_at == pytest.approx(seconds, abs=1)
    assert_answered(talk, 408, "body_timeout")


def a_reader_that_pauses_its_stream() -> Conversation:
    talk = answering(OPENAI_STREAM)
    talk.exchange.upstream_body(EVENTS[0])
    talk.exchange.client_paused()
    return talk


def a_reader_that_has_not_read_its_last_answer() -> Conversation:
    talk = Conversation()
    talk.exchange.client_paused()
    talk.ask(OPENAI_STREAM)
    talk.connect()
    return talk


def a_stream_that_is_long() -> Conversation:
    talk = answering(OPENAI_STREAM)
    while talk.clock.now - talk.exchange.started_at < LIMITS.total_timeout - 1:
        talk.exchange.upstream_body(EVENTS[1])
        talk.clock.advance(1)
    return talk


def an_upload_that_takes_most_of_the_time() -> Conversation:
    talk = Conversation(limits=replace(LIMITS, body_timeout=LIMITS.total_timeout))
    talk.begin()
    talk.clock.advance(LIMITS.total_timeout - 1)
    talk.exchange.request_body(orjson.dumps(OPENAI_WHOLE))
    talk.exchange.request_end()
    talk.connect()
    return talk


@pytest.mark.parametrize(
    "made",
    [
        a_reader_that_pauses_its_stream,
        a_reader_that_has_not_read_its_last_answer,
        a_stream_that_is_long,
        an_upload_that_takes_most_of_the_time,
    ],
)
def test_a_limit_that_passes_by_the_clients_doing_is_not_held_against_the_upstream(
    made: Callable[[], Conversation],
) -> None:
    talk = made()
    talk.clock.advance(LIMITS.total_timeout)
    assert talk.exchange.outcome == "timeout:total"
    assert talk.upstreams[0].broken_in_a_row == 0


def test_an_upstream_that_never_answers_is_held_to_it() -> None:
    talk = sent_off(OPENAI_WHOLE)
    talk.clock.advance(LIMITS.total_timeout)
    assert talk.exchange.outcome == "timeout:total"
    assert talk.upstreams[0].broken_in_a_row == 1


def test_the_wait_for_room_is_no_wait_for_the_first_token() -> None:
    talk = busy(OPENAI_STREAM, limits=replace(LIMITS, queue_timeout=LIMITS.first_token_timeout + 9))
    talk.clock.advance(LIMITS.first_token_timeout + 8)
    talk.crowd(0)
    talk.path.queue.wake()
    talk.connect()
    talk.clock.advance(LIMITS.first_token_timeout - 1)
    assert talk.path.in_flight
    talk.clock.advance(1 + TICK)
    assert talk.exchange.outcome == "timeout:first_token"


# Where there is no room


def busy(body: object = OPENAI_WHOLE, **settings: Any) -> Conversation:
    """A conversation that waits for the calls of others to end."""
    talk = Conversation(max_in_flight_per_upstream=1, **settings)
    talk.crowd(1)
    talk.ask(body)
    assert not talk.transport.asked
    assert len(talk.path.queue) == 1
    return talk


def test_a_call_waits_for_room_and_then_goes_on() -> None:
    talk = busy(upstreams=2)
    talk.clock.advance(LIMITS.queue_timeout - TICK)
    talk.crowd(0)
    talk.path.queue.wake()
    assert len(talk.transport.asked) == 1
    assert not talk.path.queue
    talk.connect()
    talk.head(200, JSON)
    talk.exchange.upstream_body(b"{}")
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content) == (200, b"{}")
    talk.assert_settled()


def test_a_call_that_waits_too_long_is_a_429() -> None:
    talk = busy()
    assert seconds_until_the_end(talk) == LIMITS.queue_timeout
    assert_answered(talk, 429, "too_many_requests")
    assert talk.client.header(b"retry-after") == b"1"
    assert talk.exchange.outcome == "refused"


def test_a_call_too_many_to_wait_is_a_429_at_once() -> None:
    talk = Conversation(max_in_flight_per_upstream=1, max_queue=0)
    talk.crowd(1)
    talk.ask(OPENAI_WHOLE)
    assert_answered(talk, 429, "too_many_requests")
    assert talk.client.header(b"retry-after") == b"1"


def test_what_is_held_is_counted_until_the_answer_begins() -> None:
    talk = Conversation()
    talk.exchange.begin(0)
    body = orjson.dumps(OPENAI_STREAM)
    talk.exchange.request_body(body[:10])
    talk.exchange.awaits_more()
    assert talk.buffers.held == talk.client.owner.held == 10
    talk.exchange.request_body(body[10:])
    talk.exchange.request_end()
    assert talk.buffers.held == len(body)
    talk.connect()
    talk.head(200, [(b"content-type", b"text/event-stream")])
    assert talk.buffers.held == 0
    talk.leave()
    talk.assert_settled()


def test_a_large_body_is_read_when_its_turn_comes_and_counted_until_then() -> None:
    talk = Conversation(limits=replace(LIMITS, max_body_bytes=1_000_000))
    body = orjson.dumps(OPENAI_WHOLE | {"user": "x" * 300_000})
    talk.exchange.begin(len(body))
    talk.exchange.request_body(body)
    talk.exchange.request_end()
    assert talk.transport.asked == []
    assert talk.buffers.held == len(body)
    talk.clock.advance(1)
    assert talk.connect().request_body == body
    talk.leave()
    talk.assert_settled()


@pytest.mark.parametrize(
    ("value", "status"),
    [(b'"' + b"x" * 300_000 + b'"', 0), (b"[" + b"1," * 150_000 + b"1]", 413), (b"x" * 300_000, 400)],
)
def test_a_large_body_is_refused_as_a_small_one_is(value: bytes, status: int) -> None:
    limits = replace(LIMITS, max_body_bytes=1_000_000)
    talk = Conversation(limits=limits, body_limits=body_limits(max_json_values=20_000))
    talk.exchange.begin(0)
    talk.exchange.request_body(b'{"model":"demo","messages":[],"user":%b}' % value)
    talk.exchange.request_end()
    talk.clock.advance(1)
    assert talk.client.status == status
    talk.leave()
    talk.assert_settled()


def test_a_client_that_leaves_before_its_large_body_is_read_leaves_nothing() -> None:
    talk = Conversation(limits=replace(LIMITS, max_body_bytes=1_000_000))
    talk.exchange.begin(0)
    talk.exchange.request_body(orjson.dumps(OPENAI_WHOLE | {"user": "x" * 300_000}))
    talk.exchange.request_end()
    talk.leave()
    talk.clock.advance(1)
    assert talk.transport.asked == []
    talk.assert_settled()


def test_a_stream_that_nobody_reads_holds_its_last_events_and_is_counted() -> None:
    talk = Conversation()
    talk.ask(OPENAI_STREAM)
    talk.connect()
    talk.head(200, [(b"content-type", b"text/event-stream")])
    large = b"data: " + b"x" * 40_000 + b"\n\n"
    talk.client.during_body = talk.exchange.client_paused
    talk.exchange.upstream_body(large * 3)
    assert talk.buffers.held == len(large * 3) + len(large * 2) + _OF_A_STREAM
    talk.exchange.client_resumed()
    assert talk.buffers.held == 0
    talk.client.during_body = None
    talk.exchange.upstream_body(DONE)
    talk.exchange.upstream_end()
    assert talk.exchange.outcome == "done"
    talk.assert_settled()


def test_a_stream_that_nobody_reads_ends_where_there_is_no_room_for_what_it_holds() -> None:
    talk = Conversation(max_buffered_bytes=50_000)
    talk.ask(OPENAI_STREAM)
    connection = talk.connect()
    talk.head(200, [(b"content-type", b"text/event-stream")])
    talk.client.during_body = talk.exchange.client_paused
    talk.exchange.upstream_body(b"data: " + b"x" * 40_000 + b"\n\n")
    assert (talk.exchange.outcome, talk.client.ending, connection.given_back) == ("shortage", "abort", "discarded")
    assert talk.upstreams[0].broken_in_a_row == 0
    talk.assert_settled()
    # It would be cut again, and again: for a second whose it was is refused.
    for seconds, status in ((0.9, 503), (0.2, 0)):
        talk.clock.advance(seconds)
        again = ClientRecorder()
        again.owner = talk.client.owner
        call = BufferedCall(talk.path, again, CHAT, CHAT.path, talk.request_head)
        call.begin(100)
        assert again.status == status


def test_a_large_body_is_sent_as_it_is_after_its_head() -> None:
    talk = Conversation()
    talk.ask(OPENAI_WHOLE | {"user": "x" * 70_000})
    held = talk.buffers.held
    connection = talk.connect()
    head, body = connection.sent_at_once
    assert head.endswith(b"\r\n\r\n")
    assert len(body) == held > 70_000
    talk.leave()

    talk = Conversation()
    talk.ask(OPENAI_WHOLE | {"user": "x" * 70_000})
    connection = talk.connect(during_send=talk.leave)
    assert connection.given_back == "discarded"
    talk.assert_settled()


@pytest.mark.parametrize("known", [True, False])
def test_what_would_be_held_past_the_bound_is_a_503(known: bool) -> None:
    talk = Conversation(max_buffered_bytes=80_000)
    talk.exchange.begin(90_000 if known else 0)
    if not known:
        talk.exchange.request_body(b"x" * 90_000)
        talk.exchange.awaits_more()
    assert_answered(talk, 503, "gateway_shortage")
    assert talk.client.header(b"retry-after") == b"1"
    assert talk.client.error["message"] == (
        "The gateway holds as much of requests and answers as it may (80000 bytes, GATEWAY_MAX_BUFFERED_BYTES): "
        "try again soon."
    )
    assert talk.upstreams[0].broken_in_a_row == 0


def test_a_call_that_came_whole_has_the_same_bound() -> None:
    talk = Conversation(max_buffered_bytes=100)
    talk.ask(OPENAI_WHOLE | {"user": "x" * 100})
    assert_answered(talk, 503, "gateway_shortage")


def test_an_answer_that_is_collected_has_the_same_bound_and_is_no_fault_of_the_upstreams() -> None:
    talk = Conversation(max_buffered_bytes=2000)
    talk.ask({"messages": {"user": "Hi"}, "streaming": False})
    connection = talk.connect()
    talk.head(200, [(b"content-type", b"application/json"), (b"content-length", b"5000")])
    talk.exchange.upstream_body(b"x" * 1000)
    assert talk.buffers.held == 1000
    talk.exchange.upstream_body(b"x" * 1000)
    assert_answered(talk, 503, "gateway_shortage")
    assert (connection.given_back, talk.upstreams[0].broken_in_a_row) == ("discarded", 0)


def test_too_many_that_have_not_come_are_ended_and_who_came_whole_is_not() -> None:
    talk = Conversation(max_arriving=0)
    talk.ask(OPENAI_WHOLE)
    assert talk.transport.asked
    talk.leave()

    talk = Conversation(max_arriving=0)
    talk.exchange.begin(10)
    assert not talk.client.status
    talk.exchange.awaits_more()
    assert_answered(talk, 503, "gateway_shortage")
    assert "this came the slowest" in talk.client.error["message"]


def test_a_client_that_leaves_the_queue_leaves_no_trace() -> None:
    talk = busy()
    talk.leave()
    assert not talk.path.queue
    assert talk.exchange.status == 499
    talk.crowd(0)
    talk.path.queue.wake()
    assert not talk.transport.asked
    talk.assert_settled()


def test_the_first_that_came_is_the_first_that_goes() -> None:
    talk = Conversation(max_in_flight=1)
    talk.ask(OPENAI_WHOLE)
    talk.connect()
    waiting = []
    for _ in range(3):
        one = BufferedCall(talk.path, ClientRecorder(), CHAT, CHAT.path, RequestHead([]))
        one.request(orjson.dumps(OPENAI_WHOLE))
        waiting.append(one)
    assert [one.status for one in waiting] == [0, 0, 429]
    talk.leave()
    assert [one.upstream for one in waiting[:2]] == [talk.upstreams[0], None]
    waiting[0].client_gone()
    assert waiting[1].upstream is talk.upstreams[0]
    waiting[1].client_gone()
    assert talk.upstreams[0].in_flight == 0
    assert not talk.path.in_flight


def test_a_place_that_a_second_try_gives_up_goes_to_the_next() -> None:
    talk = Conversation(upstreams=2, max_in_flight_per_upstream=1, max_in_flight=3)
    talk.ask(OPENAI_WHOLE)
    first = talk.exchange.upstream
    other = next(one for one in talk.upstreams if one is not first)
    other.in_flight += 1
    one = BufferedCall(talk.path, ClientRecorder(), CHAT, CHAT.path, RequestHead([]))
    one.request(orjson.dumps(OPENAI_WHOLE))
    assert one.upstream is None
    other.in_flight -= 1
    talk.exchange.upstream_unreachable("connection refused")
    assert (talk.exchange.upstream, one.upstream) == (other, first)


def test_one_that_is_refused_costs_those_that_wait_nothing() -> None:
    talk = Conversation(max_in_flight_per_upstream=1, max_queue=1)
    talk.crowd(1)
    looks: list[None] = []
    # As a call that waits, which is asked where there may be room.
    waiting: Any = type("Waiting", (), {"try_admit": lambda _: looks.append(None)})()
    assert talk.path.queue.add(waiting, talk.path.pool.group(None), Owner())
    one = BufferedCall(talk.path, ClientRecorder(), CHAT, CHAT.path, RequestHead([]))
    one.request(orjson.dumps(OPENAI_WHOLE))
    assert (one.status, looks) == (429, [])


def test_room_for_several_is_for_as_many() -> None:
    talk = busy(upstreams=2, max_queue=3)
    others = [BufferedCall(talk.path, ClientRecorder(), CHAT, CHAT.path, RequestHead([])) for _ in range(2)]
    for one in others:
        one.request(orjson.dumps(OPENAI_WHOLE))
    talk.crowd(0)
    talk.path.queue.wake()
    assert others[0].upstream is None  # one place is for one call
    talk.path.queue.wake_all()
    assert {talk.exchange.upstream, others[0].upstream} == set(talk.upstreams)
    assert list(talk.path.queue) == [others[1]]


def test_those_that_wait_take_no_places_at_the_drains_end() -> None:
    talk = Conversation(max_in_flight=1, max_queue=5)
    talk.ask(OPENAI_WHOLE)
    talk.connect()
    others = [BufferedCall(talk.path, ClientRecorder(), CHAT, CHAT.path, RequestHead([])) for _ in range(5)]
    for one in others:
        one.request(orjson.dumps(OPENAI_WHOLE))
    talk.path.drain.ends_at = talk.clock.now
    for call in talk.path.overdue():
        call.check_timeouts()
    assert {one.outcome for one in (talk.exchange, *others)} == {"drained"}
    assert len(talk.transport.asked) == 1
    assert not talk.path.in_flight


def test_one_that_another_upstream_could_serve_does_not_wait_behind_one_that_it_cannot() -> None:
    talk = Conversation(upstreams=2, max_in_flight_per_upstream=1)
    talk.upstreams[1].models = ("other",)
    talk.crowd(1)
    talk.ask(OPENAI_WHOLE)
    one = BufferedCall(talk.path, ClientRecorder(), CHAT, CHAT.path, RequestHead([]))
    one.request(orjson.dumps({**OPENAI_WHOLE, "model": "other"}))
    talk.upstreams[1].in_flight -= 1
    talk.path.queue.wake()
    assert (talk.exchange.upstream, one.upstream) == (None, talk.upstreams[1])


# An upstream that refuses


def refused_by_the_first(body: object = OPENAI_WHOLE, retry_after: bytes = b"7", **settings: Any) -> Conversation:
    """A conversation whose first upstream has answered 503."""
    talk = sent_off(body, **{"upstreams": 2, **settings})
    talk.head(503, [*JSON, (b"retry-after", retry_after)])
    return talk


@pytest.mark.parametrize("body", [OPENAI_WHOLE, SIMPLIFIED_WHOLE, OPENAI_STREAM])
def test_what_one_upstream_refuses_another_answers(body: object) -> None:
    talk = refused_by_the_first(body)
    first, second = (upstream for upstream, _ in talk.transport.asked)
    assert first is not second
    assert talk.connections[0].given_back == "discarded"
    assert talk.client.status == 0
    talk.connect()
    assert talk.connections[1].request_body == talk.connections[0].request_body
    talk.exchange.upstream_answer(*whole_answer(body))
    assert (talk.client.status, talk.exchange.outcome) == (200, "done")
    assert (first.broken_in_a_row, second.broken_in_a_row, first.failovers) == (1, 0, 1)
    talk.assert_settled()


def whole_answer(body: object) -> tuple[AnswerHead, bytes]:
    """What an upstream sends in one read."""
    head, _ = answer_head(200, SSE if body is OPENAI_STREAM else JSON)
    return head, CONTENT if body is OPENAI_STREAM else completion()


def test_a_refusal_in_one_read_is_taken_over_too() -> None:
    talk = sent_off(OPENAI_WHOLE, upstreams=2)
    talk.exchange.upstream_answer(answer_head(503, JSON)[0], b"busy")
    assert len(talk.transport.asked) == 2
    assert talk.client.status == 0


def test_the_refusal_of_the_last_is_relayed_with_its_retry_after() -> None:
    talk = refused_by_the_first(upstreams=3)
    talk.connect()
    talk.head(503, [*JSON, (b"retry-after", b"9")])
    talk.exchange.upstream_body(b"busy")
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content) == (503, b"busy")
    assert talk.client.header(b"retry-after") == b"9"
    assert len(talk.transport.asked) == 2
    talk.assert_settled()


def test_a_refusal_is_remembered_where_the_other_cannot_be_reached() -> None:
    talk = refused_by_the_first()
    talk.exchange.upstream_unreachable("connection refused")
    assert_answered(talk, 503, "no_upstream_ready")
    assert talk.client.header(b"retry-after") == b"7"


@pytest.mark.parametrize("state", ["down", "loading", "full", "failing"])
def test_a_refusal_is_relayed_where_no_other_is_ready(state: str) -> None:
    talk = Conversation(upstreams=2, max_in_flight_per_upstream=1)
    other = talk.upstreams[1]
    talk.upstreams[1].chosen_at = 1  # so that the first is asked first
    talk.ask(OPENAI_WHOLE)
    if state in ("down", "loading"):
        other.state = "down" if state == "down" else "loading"
    elif state == "failing":
        other.broken_in_a_row, other.broken_at = 3, talk.clock.now
    else:
        other.in_flight = 1
    talk.connect()
    talk.head(503, [*JSON, (b"retry-after", b"7")])
    talk.exchange.upstream_body(b"busy")
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content) == (503, b"busy")
    assert talk.client.header(b"retry-after") == b"7"
    assert len(talk.transport.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 502])
def test_nothing_but_a_503_is_tried_on_another(status: int) -> None:
    talk = sent_off(OPENAI_WHOLE, upstreams=2)
    talk.head(status, JSON)
    talk.exchange.upstream_body(b"{}")
    talk.exchange.upstream_end()
    assert talk.client.status == status
    assert len(talk.transport.asked) == 1


# The end of the gateway


def test_what_still_runs_at_the_end_of_the_drain_gets_an_error() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[0])
    talk.path.drain.ends_at = talk.clock.now + 3
    assert seconds_until_the_end(talk) == 3
    assert_ends_with_an_error_event(talk, EVENTS[0], "draining")
    assert talk.connections[0].given_back == "discarded"


@pytest.mark.parametrize("state", ["receiving", "queued", "connecting", "waiting"])
def test_what_has_not_begun_at_the_end_of_the_drain_gets_a_503(state: str) -> None:
    talk = Conversation(max_in_flight_per_upstream=1)
    talk.crowd(int(state == "queued"))
    talk.begin() if state == "receiving" else talk.ask(OPENAI_WHOLE)
    if state == "waiting":
        talk.connect()
    talk.path.drain.ends_at = talk.clock.now
    assert seconds_until_the_end(talk) <= TICK
    assert_answered(talk, 503, "draining")
    assert talk.client.header(b"retry-after") == b"1"


@pytest.mark.parametrize("limit", ["first_token", "idle", "total"])
def test_a_limit_that_passed_counts_against_the_upstream(limit: str) -> None:
    talk = answering(OPENAI_WHOLE if limit == "total" else OPENAI_STREAM)
    if limit == "idle":
        talk.exchange.upstream_body(EVENTS[0])
    seconds_until_the_end(talk)
    assert talk.exchange.outcome == f"timeout:{limit}"
    assert talk.upstreams[0].broken_in_a_row == 1


def test_the_moments_of_an_answer_are_kept_for_the_log() -> None:
    talk = Conversation()
    talk.begin()
    talk.clock.advance(1)
    talk.exchange.request_body(orjson.dumps(OPENAI_STREAM))
    talk.exchange.request_end()
    talk.clock.advance(1)
    talk.connect()
    talk.clock.advance(1)
    talk.head(200, SSE)
    talk.clock.advance(1)
    talk.exchange.upstream_body(EVENTS[0])
    talk.clock.advance(1)
    talk.exchange.upstream_body(DONE)
    talk.exchange.upstream_end()
    moments = talk.exchange
    assert [moments.received_at, moments.sent_at, moments.first_byte_at, moments.upstream_ended_at] == [
        moments.started_at + seconds for seconds in (1, 2, 4, 5)
    ]
    assert moments.ended_at == moments.upstream_ended_at


# The client leaves


STATES = ["receiving", "connecting", "waiting", "retrying", "head", "held", "streaming", "paused"]


def brought_to(state: str) -> Conversation:
    """A streaming conversation that has come so far."""
    talk = Conversation()
    if state == "receiving":
        talk.begin()
        talk.exchange.request_body(b"{")
        return talk
    talk.ask(OPENAI_STREAM)
    if state == "connecting":
        return talk
    talk.connect(reused=state == "retrying")
    if state == "retrying":
        talk.lose(answered=False)
    if state in STATES[4:]:
        talk.head(200, SSE)
    if state in STATES[5:]:
        talk.exchange.upstream_body(EVENTS[0][:-1])
    if state in STATES[6:]:
        talk.exchange.upstream_body(EVENTS[0][-1:])
    if state == "paused":
        talk.exchange.client_paused()
    return talk


@pytest.mark.parametrize("state", STATES)
def test_a_client_that_leaves_takes_the_upstreams_work_with_it(state: str) -> None:
    talk = brought_to(state)
    started = talk.client.status
    talk.leave()
    lent = [connection.given_back for connection in talk.connections if not connection.is_lost]
    assert lent == ["discarded"] * len(lent)
    assert (talk.exchange.outcome, talk.exchange.status) == ("client_left", 200 if started else 499)
    assert all(upstream.broken_in_a_row == 0 for upstream in talk.upstreams)
    talk.assert_settled()


@pytest.mark.parametrize("state", STATES)
def test_what_happens_after_the_client_has_left_reaches_nobody(state: str) -> None:
    talk = brought_to(state)
    talk.leave()
    talk.exchange.request_body(b"}")
    talk.exchange.request_end()
    talk.head(200, SSE)
    talk.exchange.upstream_body(DONE)
    talk.exchange.client_paused()
    talk.exchange.client_resumed()
    talk.exchange.check_timeouts()
    talk.exchange.upstream_lost("late", answered=True)
    talk.exchange.upstream_end()
    talk.leave()
    talk.clock.advance(LIMITS.total_timeout)
    assert talk.exchange.outcome == "client_left"
    talk.assert_settled()


@pytest.mark.parametrize("ending", ["leaves", "times out"])
def test_a_connection_that_comes_too_late_is_released_unused(ending: str) -> None:
    talk = brought_to("connecting")
    if ending == "leaves":
        talk.leave()
    else:
        seconds_until_the_end(talk)
    late = talk.connect()
    assert (late.given_back, late.sent) == ("released", b"")
    talk.assert_settled()


def test_a_dial_that_fails_after_the_end_changes_nothing() -> None:
    talk = Conversation(upstreams=2)
    talk.ask(OPENAI_STREAM)
    talk.leave()
    talk.exchange.upstream_unreachable("connection refused")
    assert talk.exchange.outcome == "client_left"
    assert len(talk.transport.asked) == 1
    talk.assert_settled()


def test_a_client_that_leaves_inside_a_write_is_left_alone() -> None:
    talk = answering()
    talk.client.during_body = talk.leave
    talk.exchange.upstream_body(EVENTS[0])
    talk.exchange.upstream_body(EVENTS[1])
    assert talk.client.pieces == [EVENTS[0]]
    assert (talk.exchange.outcome, talk.connections[0].given_back) == ("client_left", "discarded")
    talk.assert_settled()


def test_a_client_that_leaves_inside_the_write_of_a_rewritten_answer_is_counted_once() -> None:
    talk = answering(SIMPLIFIED_WHOLE, JSON)
    talk.client.during_body = talk.leave
    talk.exchange.upstream_body(completion())
    talk.exchange.upstream_end()
    talk.assert_settled()


# A slow client


def test_a_slow_client_pauses_the_upstream_until_it_has_caught_up() -> None:
    talk = answering()
    talk.exchange.upstream_body(EVENTS[0])
    talk.exchange.client_paused()
    assert talk.connections[0].paused
    talk.exchange.client_resumed()
    assert not talk.connections[0].paused


def test_a_client_that_pauses_inside_a_write_pauses_the_upstream() -> None:
    talk = answering()
    talk.client.during_body = talk.exchange.client_paused
    talk.exchange.upstream_body(EVENTS[0])
    assert talk.connections[0].paused


def test_a_client_that_was_paused_before_the_connection_came_pauses_it_too() -> None:
    talk = Conversation()
    talk.begin()
    talk.exchange.client_paused()
    talk.exchange.request_body(orjson.dumps(OPENAI_STREAM))
    talk.exchange.request_end()
    assert talk.connect().paused


def test_a_pause_after_the_end_of_the_answer_touches_no_connection() -> None:
    talk = answering()
    talk.exchange.upstream_body(CONTENT)
    talk.exchange.upstream_end()
    talk.exchange.client_paused()
    talk.exchange.client_resumed()
    assert talk.connections[0].given_back == "released"


def test_an_exchange_asks_for_an_idle_connection_before_a_fresh_one() -> None:
    talk = Conversation()
    talk.ask(OPENAI_STREAM)
    assert talk.transport.asked == [(talk.upstreams[0], False)]


def test_an_answer_before_a_connection_is_ignored() -> None:
    talk = brought_to("connecting")
    talk.head(200, SSE)
    talk.exchange.upstream_body(DONE)
    talk.exchange.upstream_end()
    talk.exchange.upstream_lost("late", answered=False)
    assert talk.client.status == 0
    talk.connect()
    assert talk.connections[0].sent


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RuntimeError("a bug"), 500, "internal_error"),
        (MemoryError(), 503, "gateway_shortage"),
        (OSError(errno.EMFILE, "Too many open files"), 503, "gateway_shortage"),
    ],
)
def test_what_fails_by_no_fault_of_the_upstream_is_told_and_not_held_against_it(
    error: Exception, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    for connected in (False, True):
        talk = Conversation()
        talk.ask(OPENAI_WHOLE)
        if connected:
            talk.connect()
        talk.exchange.crashed(error)
        assert_answered(talk, status, code)
        assert talk.upstreams[0].broken_in_a_row == 0
        assert talk.exchange.request_id in caplog.text
        caplog.clear()


def test_what_fails_while_it_is_answered_is_cut() -> None:
    talk = Conversation()
    talk.ask(OPENAI_STREAM)
    talk.connect()
    talk.head(200, [(b"content-type", b"text/event-stream")])
    talk.exchange.upstream_body(b"data: [DONE]\n\n")

    def fails() -> None:
        raise MemoryError

    talk.client.during_body = fails
    with pytest.raises(MemoryError):
        talk.exchange.upstream_body(b"data: {}\n\n")
    talk.exchange.crashed(MemoryError())
    assert talk.client.ending in ("end", "abort")
    talk.assert_settled()
