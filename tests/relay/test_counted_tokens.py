"""vLLM is asked for a stream's tokens, and a client that did not ask gets what it gets without that, byte for byte."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.wire.routes import Route
from tests.support.recorders import CHAT, COMPLETIONS, Conversation

FINGERPRINT = b',"system_fingerprint":"vllm-0.32.0-\\"a\\""'
FIELDS = b'{"id":"x","object":"chat.completion.chunk","created":1,"model":"demo",'
USAGE = b'"usage":{"prompt_tokens":5,"total_tokens":8,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def event(text: str, finish: str | None = None, index: int = 0, *, fingerprint: bytes = b"") -> bytes:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
    return b"data: " + FIELDS + b'"choices":[' + orjson.dumps(choice) + b"]" + fingerprint + b"}\n\n"


def streams(fingerprint: bytes = FINGERPRINT) -> dict[str, tuple[list[bytes], list[bytes]]]:
    """By name what vLLM writes when it is asked for tokens, and when it is not."""
    usage = b"data: " + FIELDS + b'"choices":[]' + fingerprint + b"," + USAGE
    said = [event(""), event('"finish_reason":"stop"'), event(' "choices":[],"usage":{')]
    two = [event("a", index=1), event("b", "length", 1)]
    ends = [event("", "stop"), event("", "stop", fingerprint=fingerprint)]
    ping = b": ping\n\n"
    error = b'data: {"error":{"message":"no","code":500}}\n\n'
    return {
        "one choice": ([*said, ends[0], usage, DONE], [*said, ends[1], DONE]),
        "two choices": (
            [*said, ends[0], *two, usage, DONE],
            [*said, ends[1], two[0], event("b", "length", 1, fingerprint=fingerprint), DONE],
        ),
        "no usage after all": ([*said, ends[0], DONE], [*said, ends[0], DONE]),
        "an error": ([*said, ends[0], error, DONE], [*said, ends[0], error, DONE]),
        "no finish": ([*said, usage, DONE], [*said, DONE]),
        "comments": ([ping, *said, ends[0], ping, usage, DONE], [ping, *said, ends[1], ping, DONE]),
    }


def ask(body: dict[str, Any], route: Route = CHAT, **settings: Any) -> Conversation:
    talk = Conversation(route=route, **{"counts_tokens": True, "counts_all": True, **settings})
    talk.ask(body)
    return talk


def told(talk: Conversation, pieces: list[bytes]) -> bytes:
    """What the client gets of these reads."""
    talk.head(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
    for piece in pieces:
        talk.exchange.upstream_body(piece)
    talk.exchange.upstream_end()
    talk.assert_settled()
    return talk.client.content


OPENAI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@pytest.mark.parametrize("body", [{}, {"n": 2}], ids=["one choice", "two choices"])
def test_a_server_that_tells_every_client_is_heard_by_every_client(body: dict[str, Any]) -> None:
    """As vLLM does with `--enable-force-include-usage`: in each chunk, and in one more."""
    so_far = b"," + USAGE
    each = [event(""), event("a"), event('"usage":{'), event("b", index=1), event("", "stop"), event("", "stop", 1)]
    told_all = [one.replace(b"}\n\n", so_far) for one in each]
    forced = [*told_all, b"data: " + FIELDS + b'"choices":[]' + FINGERPRINT + so_far, DONE]
    whole = b"".join(forced)
    for at in range(len(whole)):
        talk = ask({**OPENAI, **body})
        talk.connect()
        assert told(talk, [whole[:at], whole[at:]] if at else forced) == whole
        assert talk.exchange.tokens == (5, 3, False)


@pytest.mark.parametrize("fingerprint", [FINGERPRINT, b""])
@pytest.mark.parametrize("name", streams())
def test_the_client_gets_what_it_gets_without_the_asking(name: str, fingerprint: bytes) -> None:
    asked, unasked = streams(fingerprint)[name]
    whole = b"".join(asked)
    for at in range(len(whole)):
        talk = ask(OPENAI)
        talk.connect()
        assert told(talk, [whole[:at], whole[at:]] if at else asked) == b"".join(unasked)
        assert talk.client.headers[0] == (b"content-type", b"text/event-stream; charset=utf-8")
        assert talk.exchange.usage == ((5, 3) if any(b"usage" in one[:200] for one in asked[-2:]) else None)


@pytest.mark.parametrize(
    ("body", "settings"), [(OPENAI, {}), ({"messages": {"user": "Hi"}, "n": 2}, {"compat": "erag-2.1"})]
)
def test_of_several_choices_none_waits_once_the_servers_fingerprint_is_known(
    body: dict[str, Any], settings: dict[str, Any]
) -> None:
    asked, unasked = streams()["two choices"]
    first = ask(body, **settings)
    first.connect()
    first.head(200, [(b"content-type", b"text/event-stream")])
    for piece in asked:
        first.exchange.upstream_body(piece)
    first.exchange.upstream_end()
    first.clock.advance(1)  # a release's events are paced
    assert first.upstreams[0].fingerprint == FINGERPRINT.partition(b":")[2]

    talk = ask(body, **settings)
    talk.upstreams[0].fingerprint = first.upstreams[0].fingerprint
    talk.connect()
    talk.head(200, [(b"content-type", b"text/event-stream")])
    for number in range(1, len(asked) - 2):
        talk.exchange.upstream_body(asked[number - 1])
        talk.clock.advance(0.01)
        assert len(talk.client.content) >= len(b"".join(unasked[: number - 1]))
    talk.leave()


@pytest.mark.parametrize(
    ("sent", "options"),
    [
        ({}, {"include_usage": True}),
        ({"stream_options": None}, {"include_usage": True}),
        ({"stream_options": {"include_usage": False, "x": 1}}, {"x": 1, "include_usage": True}),
        ({"stream_options": {"continuous_usage_stats": True}}, {"include_usage": True}),
        ({"stream_options": {"include_usage": True}}, None),
        ({"stream_options": "x"}, None),
        ({"stream": False}, None),
    ],
)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS], ids=["chat", "completion"])
def test_only_who_did_not_ask_is_asked_for(sent: dict[str, Any], options: dict[str, Any] | None, route: Route) -> None:
    body = {**OPENAI, **sent}
    connection = ask(body, route).connect()
    if options is None:
        assert connection.request_body == orjson.dumps(body)
    else:
        assert orjson.loads(connection.request_body) == {**body, "stream_options": options}


@pytest.mark.parametrize("settings", [{"counts_all": False}, {"counts_all": False, "counts_tokens": False}])
def test_a_call_of_openais_is_relayed_as_it_came_where_it_is_not_to_be_counted(settings: dict[str, Any]) -> None:
    body = orjson.dumps(OPENAI)
    talk = ask({}, **settings)
    assert talk.path.reader.read("chat", body)[0] is body


@pytest.mark.parametrize("style", ["openai", "repr", "answer_part"])
def test_a_simplified_stream_is_counted_and_its_caller_told_nothing_of_it(style: str) -> None:
    asked, unasked = streams()["one choice"]
    talk = ask({"messages": "Hi.", "stream_style": style}, counts_all=False)
    assert orjson.loads(talk.connect().request_body)["stream_options"] == {"include_usage": True}
    content = told(talk, asked)
    assert talk.exchange.tokens == (5, 3, False)
    assert content == b"".join(unasked) if style == "openai" else b"prompt_tokens" not in content


def test_what_is_not_told_is_estimated() -> None:
    _, unasked = streams()["one choice"]
    talk = ask(OPENAI, counts_all=False)
    talk.connect()
    told(talk, unasked)
    assert talk.exchange.tokens == (len(orjson.dumps(OPENAI)) // 4, 3, True)

    left = ask(OPENAI, counts_all=False)
    left.connect()
    left.leave()
    assert left.exchange.tokens == (len(orjson.dumps(OPENAI)) // 4, 0, True)

    refused = ask({"messages": 5})
    assert refused.exchange.tokens is None
