"""Comments of a stream: neither a token, nor an event, nor a sign of the model; and those that we write ourselves."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.keys import Keys, from_lines
from gateway.wire.heads import Header, answer_head
from gateway.wire.routes import ROUTES, Route
from tests.relay.test_exchange import (
    JSON,
    OPENAI_STREAM,
    OPENAI_WHOLE,
    SIMPLIFIED_STREAM,
    SIMPLIFIED_WHOLE,
    SSE,
    UPSTREAMS_ERROR,
    answering,
    assert_ends_with_an_error_event,
    sent_off,
)
from tests.support.fake_vllm import DONE, EVENTS, USAGE, event
from tests.support.recorders import ASK, CHAT, GENERATE, LIMITS, MESSAGES, MODELS, RESPONSES, TICK, Conversation

PING = b": keep-alive\n\n"
CITING: dict[str, Any] = {**SIMPLIFIED_STREAM, "data": {"reranked_docs": [{"text": "x", "metadata": {"url": "u"}}]}}
COUNTED = b'data: {"id":"x","choices":[],"usage":' + orjson.dumps(USAGE) + b"}\n\n"
COMPLETION = b'data: {"choices":[{"index":0,"text":"Hi"}]}\n\n'
Style = tuple[dict[str, Any], dict[str, Any], list[bytes]]
# By name: a call, its settings, and what the model server tells.
STYLES: dict[str, Style] = {
    "OpenAI's": (OPENAI_STREAM, {}, EVENTS),
    "OpenAI's, counted": (OPENAI_STREAM, {"counts_all": True}, [*EVENTS[:-1], COUNTED, DONE]),
    "simplified": (SIMPLIFIED_STREAM, {}, EVENTS),
    "simplified, cited": (CITING, {}, EVENTS),
    "repr": ({**SIMPLIFIED_STREAM, "stream_style": "repr"}, {}, EVENTS),
    "answer_part": ({**SIMPLIFIED_STREAM, "stream_style": "answer_part"}, {}, EVENTS),
    "ask": ({"question": "Hi"}, {"route": ASK}, [COMPLETION, DONE]),
    "langchain": (SIMPLIFIED_STREAM, {"connector": "langchain", "counts_tokens": True}, [COMPLETION, DONE]),
}
WITHOUT_COMMENTS: dict[str, Style] = {
    "erag-1.4": ({"messages": {"user": "Hi"}}, {"compat": "erag-1.4", "stream_style": "repr"}, EVENTS),
    "erag-2.1": ({"messages": {"user": "Hi"}}, {"compat": "erag-2.1"}, EVENTS),
    "generate": ({"prompt": "Hi", "stream": True}, {"route": GENERATE}, [COMPLETION, DONE]),
}


def streaming(style: str, **more: Any) -> tuple[Conversation, list[bytes]]:
    """A call in this style whose upstream has sent its head, and what it will send."""
    body, settings, told = (STYLES | WITHOUT_COMMENTS)[style]
    return answering(body, **{"route": CHAT, **settings, **more}), told


def ended(talk: Conversation) -> Conversation:
    talk.exchange.upstream_end()
    talk.clock.advance(1)  # a release's events are paced
    talk.assert_settled()
    return talk


def relayed(style: str, told: list[bytes], *, as_chunks: bool = False) -> Conversation:
    """All of a stream, an event a read."""
    talk, _ = streaming(style)
    if as_chunks:
        talk.client.chunk = lambda chunk: talk.client.body(chunk.split(b"\r\n", 1)[1][:-2])
    for piece in told:
        if piece[:1] in b"de":  # as a connection hands chunks on
            talk.exchange.upstream_chunk(b"%x\r\n%b\r\n" % (len(piece), piece), len(piece))
        else:
            talk.exchange.upstream_body(piece)
    return ended(talk)


@pytest.mark.parametrize("style", STYLES)
def test_a_comment_goes_on_and_is_neither_the_first_token_nor_an_event(style: str) -> None:
    plain = relayed(style, STYLES[style][2])
    talk, told = streaming(style)
    for seconds in range(3):
        talk.exchange.upstream_body(PING)
        assert talk.client.content == PING * (seconds + 1)
        assert (talk.exchange.first_byte_at, talk.exchange.events) == (None, 0)
        talk.clock.advance(1)
    began = talk.clock.now
    for piece in told:
        talk.exchange.upstream_body(piece)
        talk.exchange.upstream_body(PING)
    ended(talk)
    assert talk.client.content.count(PING) == 3 + len(told)
    assert talk.client.content.replace(PING, b"") == plain.client.content
    assert talk.exchange.first_byte_at == began
    assert (talk.exchange.events, talk.exchange.usage) == (plain.exchange.events, plain.exchange.usage)
    assert talk.exchange.bytes_out == len(talk.client.content)
    assert talk.exchange.outcome == "done"


@pytest.mark.parametrize("style", WITHOUT_COMMENTS)
def test_a_release_and_what_is_no_stream_of_events_have_no_comments(style: str) -> None:
    plain = relayed(style, WITHOUT_COMMENTS[style][2])
    talk, told = streaming(style)
    talk.exchange.upstream_body(PING)
    assert (talk.client.status, talk.client.content) == (0, b"")
    for piece in told:
        talk.exchange.upstream_body(piece + PING)
        talk.exchange.upstream_body(PING + b":\n\n")
    assert ended(talk).client.content == plain.client.content
    assert talk.exchange.events == plain.exchange.events


@pytest.mark.parametrize("style", STYLES | WITHOUT_COMMENTS)
@pytest.mark.parametrize("comment", [PING, b":\n\n", b"\n\n", b": a\n: b\n\n", b":\r\n\r\n", b": half"])
def test_comments_let_the_first_token_be_late(style: str, comment: bytes) -> None:
    talk, _ = streaming(style)
    for _ in range(int(LIMITS.first_token_timeout)):
        assert not talk.exchange.outcome
        talk.exchange.upstream_body(comment)
        talk.clock.advance(1)
    assert talk.exchange.outcome == "timeout:first_token"
    assert b"no first token within 32 s" in talk.client.content
    talk.assert_settled()


@pytest.mark.parametrize("style", STYLES | WITHOUT_COMMENTS)
def test_comments_let_an_idle_gap_be_too_long(style: str) -> None:
    talk, told = streaming(style)
    talk.exchange.upstream_body(told[0])
    for _ in range(int(LIMITS.idle_timeout)):
        assert not talk.exchange.outcome
        talk.exchange.upstream_body(PING)
        talk.clock.advance(1)
    assert talk.exchange.outcome == "timeout:idle"
    talk.clock.advance(1)
    talk.assert_settled()


def test_a_stream_of_comments_alone_has_no_end() -> None:
    talk, _ = streaming("OpenAI's")
    talk.exchange.upstream_body(PING)
    talk.exchange.upstream_end()
    assert_ends_with_an_error_event(talk, PING)
    assert talk.upstreams[0].broken_in_a_row == 1


@given(
    st.lists(st.sampled_from([PING, b":\n\n", EVENTS[1], b": note\n" + EVENTS[1], b"\n"]), max_size=6),
    st.lists(st.integers(0, 900), max_size=6),
    st.sampled_from(sorted(STYLES.keys() - {"ask", "langchain"})),
)
def test_comments_count_for_nothing_however_a_stream_is_split(pieces: list[bytes], cuts: list[int], style: str) -> None:
    whole = b"".join([EVENTS[0], *pieces, b"\n" * (b"\n" in pieces), DONE])
    edges = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    talk, _ = streaming(style)
    for a, b in itertools.pairwise(edges):
        talk.exchange.upstream_body(whole[a:b])
    ended(talk)
    told = sum(EVENTS[1] in piece for piece in pieces)
    assert talk.exchange.outcome == "done"
    if style == "OpenAI's":
        assert talk.client.content == whole
    if b"\n" not in pieces:
        assert talk.exchange.events == 2 + told
        if "simplified" not in style and "counted" not in style:
            assert talk.client.content.count(b": keep-alive\n\n") == pieces.count(PING)


def test_an_event_that_passes_in_pieces_is_none_of_comments() -> None:
    """What a large event ends with may look like one."""
    large = event({"content": "x" * 200_000})
    talk, _ = streaming("OpenAI's")
    for at in range(0, len(large), 50_000):
        talk.exchange.upstream_body(large[at : at + 50_000])
    talk.exchange.upstream_body(DONE)
    assert ended(talk).client.content == large + DONE
    assert (talk.exchange.events, talk.exchange.first_byte_at) == (2, talk.exchange.started_at)


def test_events_after_a_comment_go_the_short_way() -> None:
    talk, _ = streaming("OpenAI's")
    chunks: list[bytes] = []
    talk.client.chunk = chunks.append
    talk.exchange.upstream_body(PING)
    framed = b"%x\r\n%b\r\n" % (len(EVENTS[1]), EVENTS[1])
    talk.exchange.upstream_chunk(framed, len(EVENTS[1]))
    assert (talk.client.pieces, chunks) == ([PING, EVENTS[1]], [])
    talk.exchange.upstream_chunk(framed, len(EVENTS[1]))
    assert chunks == [framed]


def test_a_comment_at_which_the_client_leaves_is_the_last_thing() -> None:
    talk, _ = streaming("repr")
    talk.client.during_body = talk.leave
    talk.exchange.upstream_body(PING + EVENTS[1])
    assert talk.client.content == PING
    talk.assert_settled()


def test_comments_of_an_error_that_is_streamed_go_on_too() -> None:
    talk = answering(OPENAI_STREAM, SSE, 500)
    talk.exchange.upstream_body(PING)
    talk.exchange.upstream_body(b'data: {"error":{"message":"no"}}\n\n')
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.exchange.outcome) == (500, "upstream_error")
    assert talk.client.content.startswith(PING)
    assert orjson.loads(talk.client.content.split(b"data: ")[1])["error"]["message"] == "no"
    assert answer_head(500, SSE)[0].streams


# Heartbeats: our own

BEAT = 3.0
BEATING = replace(LIMITS, heartbeat_interval=BEAT)


def sent(style: str, **more: Any) -> tuple[Conversation, list[bytes]]:
    """A call in this style that is with the upstream, of which nothing has come."""
    body, settings, told = (STYLES | WITHOUT_COMMENTS)[style]
    return sent_off(body, **{"route": CHAT, "limits": BEATING, **settings, **more}), told


@pytest.mark.parametrize("style", STYLES)
def test_while_nothing_comes_a_stream_begins_with_comments_and_goes_on_as_it_would(style: str) -> None:
    plain = relayed(style, STYLES[style][2])
    talk, told = sent(style)
    talk.clock.advance(BEAT - TICK)
    assert talk.client.status == 0
    for beats in range(1, 4):
        talk.clock.advance(2 * TICK if beats == 1 else BEAT)
        assert (talk.client.status, talk.client.content) == (200, PING * beats)
    talk.head(200, SSE)
    talk.clock.advance(BEAT)
    for piece in told:
        talk.exchange.upstream_body(piece)
    ended(talk)
    assert talk.client.content == PING * 4 + plain.client.content
    assert talk.client.header(b"content-type") == b"text/event-stream; charset=utf-8"
    assert (talk.exchange.status, talk.exchange.outcome, talk.exchange.events) == (200, "done", plain.exchange.events)
    assert talk.connections[0].given_back == "released"


@pytest.mark.parametrize("style", STYLES)
def test_a_stream_in_which_nothing_more_comes_has_comments_until_the_limit(style: str) -> None:
    talk, told = streaming(style, limits=replace(BEATING, heartbeat_interval=1))
    talk.exchange.upstream_body(told[0] + told[1][:9])
    talk.clock.advance(LIMITS.idle_timeout + 1)
    assert talk.exchange.outcome == "timeout:idle"
    before, error = talk.client.content.rsplit(PING, 1)
    assert before.count(PING) == LIMITS.idle_timeout - 2
    assert b"sent nothing more within 5 s" in error
    talk.assert_settled()


def test_comments_come_only_while_nothing_else_does() -> None:
    talk, _ = streaming("OpenAI's", limits=BEATING)
    for _ in range(20):
        talk.exchange.upstream_body(EVENTS[1])
        talk.clock.advance(BEAT - 1)
        talk.exchange.upstream_body(PING)
        talk.clock.advance(BEAT - 1)
    assert talk.client.content == (EVENTS[1] + PING) * 20


def test_one_that_waits_for_room_has_comments_and_its_turn() -> None:
    talk = Conversation(limits=BEATING, max_in_flight=1)
    talk.crowd(1)
    talk.ask(OPENAI_STREAM)
    talk.clock.advance(2 * BEAT + TICK)
    assert (talk.client.status, talk.client.content) == (200, PING * 2)
    talk.crowd(0)
    talk.path.queue.wake_all()
    talk.connect()
    talk.head(200, SSE)
    for piece in EVENTS:
        talk.exchange.upstream_body(piece)
    assert ended(talk).client.content == PING * 2 + b"".join(EVENTS)


def test_one_that_waits_for_too_long_is_told_so_in_its_stream() -> None:
    talk = Conversation(limits=BEATING, max_in_flight=1)
    talk.crowd(1)
    talk.ask(OPENAI_STREAM)
    talk.clock.advance(LIMITS.queue_timeout + TICK)
    assert_ends_with_an_error_event(talk, PING * 2, "too_many_requests")
    assert (talk.exchange.status, talk.exchange.outcome) == (200, "refused")


@pytest.mark.parametrize("body", [SIMPLIFIED_WHOLE, OPENAI_WHOLE])
def test_what_is_no_stream_has_no_comments(body: object) -> None:
    talk = sent_off(body, limits=BEATING)
    talk.clock.advance(20)
    assert talk.client.status == 0
    talk.head(400, JSON)
    talk.exchange.upstream_body(b'{"error":{"message":"no"}}')
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content) == (400, b'{"error":{"message":"no"}}')


@pytest.mark.parametrize("style", WITHOUT_COMMENTS)
def test_a_release_and_what_is_no_stream_of_events_have_no_heartbeats(style: str) -> None:
    talk, told = sent(style)
    talk.clock.advance(4 * BEAT)
    assert talk.client.status == 0
    talk.head(200, SSE)
    talk.clock.advance(4 * BEAT)
    assert talk.client.status == 0
    for piece in told:
        talk.exchange.upstream_body(piece)
        talk.clock.advance(BEAT + 1)
    assert ended(talk).client.content == relayed(style, WITHOUT_COMMENTS[style][2]).client.content


def test_an_embedding_that_says_stream_has_no_comments() -> None:
    embeddings = next(route for route in ROUTES if route.name == "embeddings")
    talk = sent_off({"model": "demo", "input": "Hi", "stream": True}, route=embeddings, limits=BEATING)
    talk.clock.advance(4 * BEAT)
    assert talk.client.status == 0


REFUSALS = {
    400: b'{"error":{"message":"too long","type":"BadRequestError","param":"input","code":400}}',
    500: b'{"error":{"message":"too long","type":"InternalServerError","param":"input","code":500}}',
}


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES])
def test_a_refusal_behind_a_heartbeat_is_the_streams_own_error_and_end(
    status: int, at_once: bool, route: Route
) -> None:
    talk = sent_off(OPENAI_STREAM, route=route, limits=BEATING)
    talk.clock.advance(BEAT + TICK)
    if at_once:
        talk.exchange.upstream_answer(answer_head(status, JSON)[0], REFUSALS[status])
    else:
        talk.head(status, JSON)
        talk.clock.advance(BEAT)
        talk.exchange.upstream_body(REFUSALS[status][:9])
        talk.exchange.upstream_body(REFUSALS[status][9:])
        talk.exchange.upstream_end()
    talk.assert_settled()
    assert (talk.client.status, talk.client.ending) == (200, "end")
    assert talk.connections[0].given_back == "released"
    told = talk.client.content.replace(PING, b"")
    error = json_of(told.partition(b"data: ")[2])
    error = error.get("error", error)
    assert (error["message"], error["request_id"]) == ("too long", talk.exchange.request_id)
    assert told.startswith(b'data: {"error"' if route is CHAT else b"event: error\n")
    assert told.endswith(DONE) is (route is CHAT)
    assert (talk.exchange.status, talk.exchange.outcome) == (200, "upstream_error" if status == 500 else "refused")
    assert talk.upstreams[0].broken_in_a_row == (status == 500)
    assert talk.exchange.tokens is None


def json_of(event: bytes) -> Any:
    return orjson.loads(event.partition(b"\n\n")[0])


@pytest.mark.parametrize(
    ("status", "headers", "content", "said"),
    [
        (404, JSON, b'{"detail":"Not Found"}', "does not take /v1/chat/completions"),
        (400, JSON, b'{"detail":"no"}', "The model server answers 400"),
        (200, JSON, b'{"choices":[]}', "The model server answers 200, and not with a stream"),
        (502, SSE, UPSTREAMS_ERROR, "The model server answers 502"),
        (502, [(b"content-type", b"text/html")], b"<html>", "The model server answers 502"),
        (400, JSON, b'{"error":"no"}', "The model server answers 400"),
    ],
)
def test_whatever_else_comes_behind_a_heartbeat_is_an_error_event(
    status: int, headers: list[Header], content: bytes, said: str
) -> None:
    for style in ("openai", "repr", "answer_part"):
        talk = sent_off({**SIMPLIFIED_STREAM, "stream_style": style}, limits=BEATING)
        talk.clock.advance(BEAT + TICK)
        talk.head(status, headers)
        talk.exchange.upstream_body(content)
        talk.exchange.upstream_end()
        talk.assert_settled()
        assert said in talk.client.content.decode()
        assert talk.client.content.endswith(b'data: {"type":"done"}\n\n' if style == "answer_part" else DONE)


def test_another_upstream_is_asked_behind_a_heartbeat_as_before_it() -> None:
    talk = sent_off(upstreams=3, limits=BEATING)
    talk.clock.advance(BEAT + TICK)
    talk.head(503, JSON)
    assert len(talk.transport.asked) == 2
    talk.connect()
    talk.clock.advance(BEAT)
    talk.head(200, SSE)
    for piece in EVENTS:
        talk.exchange.upstream_body(piece)
    assert ended(talk).client.content == PING * 2 + b"".join(EVENTS)
    assert talk.exchange.outcome == "done"


def test_a_stale_connection_behind_a_heartbeat_is_replaced() -> None:
    talk = Conversation(limits=BEATING, max_in_flight=1)
    talk.crowd(1)
    talk.ask(OPENAI_STREAM)
    talk.clock.advance(BEAT + TICK)
    talk.crowd(0)
    talk.path.queue.wake_all()
    talk.connect(reused=True)
    talk.lose(answered=False)
    assert [fresh for _, fresh in talk.transport.asked] == [False, True]
    talk.connect()
    talk.lose(answered=False)
    assert_ends_with_an_error_event(talk, PING)


@pytest.mark.parametrize("fault", ["unreachable", "lost", "first_token", "total", "drained", "crashed"])
def test_what_goes_wrong_behind_a_heartbeat_is_told_in_the_stream(fault: str) -> None:
    limits = replace(BEATING, total_timeout=9) if fault == "total" else BEATING
    talk = Conversation(limits=limits)
    talk.ask(OPENAI_STREAM)
    if fault != "unreachable":
        talk.connect()
    talk.clock.advance(BEAT + TICK)
    if fault == "unreachable":
        talk.upstreams[0].record_success()
        talk.exchange.upstream_unreachable("no route")
    elif fault == "lost":
        talk.lose(answered=False)
    elif fault == "drained":
        talk.path.drain.ends_at = talk.clock.now
    elif fault == "crashed":
        talk.exchange.crashed(ValueError())
    talk.clock.advance(40)
    codes = {"unreachable": "upstream_unreachable", "lost": "upstream_broken", "drained": "draining"}
    code = codes.get(fault, "internal_error" if fault == "crashed" else f"{fault}_timeout")
    beats = talk.client.content.count(PING)
    assert beats >= 1
    assert_ends_with_an_error_event(talk, PING * beats, code)
    assert talk.exchange.status == 200


def test_who_reads_nothing_or_leaves_has_no_more_comments() -> None:
    talk, _ = sent("OpenAI's")
    talk.clock.advance(BEAT + TICK)
    talk.exchange.client_paused()
    talk.clock.advance(2 * BEAT)
    assert talk.client.content == PING
    assert talk.buffers.held == len(talk.connections[0].request_body)
    talk.exchange.client_resumed()
    talk.clock.advance(BEAT + TICK)
    assert talk.client.content == PING * 2
    talk.leave()
    talk.clock.advance(BEAT)
    talk.assert_settled()
    assert (talk.exchange.status, talk.exchange.outcome) == (200, "client_left")


def test_amid_an_event_that_passes_in_pieces_no_comment_comes() -> None:
    talk, _ = streaming("OpenAI's", limits=replace(BEATING, heartbeat_interval=1))
    large = event({"content": "x" * 200_000})
    talk.exchange.upstream_body(large[:150_000])
    talk.clock.advance(4)
    talk.exchange.upstream_body(large[150_000:])
    assert talk.client.content == large


def test_no_token_is_charged_for_a_call_that_is_refused_behind_a_heartbeat() -> None:
    file = f"mine {hashlib.sha256(b'secret').hexdigest()} tokens=1000"
    keys = Keys(from_lines(file))
    headers = ((b"authorization", b"Bearer secret"),)
    talk = sent_off({**OPENAI_STREAM, "max_tokens": 100}, headers=headers, keys=keys, limits=BEATING)
    talk.clock.advance(BEAT + TICK)
    talk.exchange.upstream_answer(answer_head(400, JSON)[0], REFUSALS[400])
    key = talk.exchange.key
    assert key is not None
    assert key.tokens is not None
    assert key.tokens.left(talk.clock.now)[0] == 1000 // 20  # as many as can be saved up


def test_a_stream_that_nobody_could_foresee_has_its_time_from_its_head() -> None:
    talk = sent_off(b"", limits=replace(LIMITS, first_token_timeout=2, idle_timeout=2), route=MODELS)
    talk.clock.advance(5)
    talk.head(200, SSE)
    talk.clock.advance(1.9)
    talk.exchange.check_timeouts()
    talk.exchange.upstream_body(b"data: x\n\n")
    assert (talk.exchange.outcome, talk.client.content) == ("", b"data: x\n\n")
    talk.clock.advance(2)
    talk.exchange.check_timeouts()
    assert talk.exchange.outcome == "timeout:idle"
