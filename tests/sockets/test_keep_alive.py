"""Comments in streams, on both ways in: vLLM's (`--sse-keep-alive-interval`), and the gateway's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.fake_vllm import (
    DONE,
    EVENTS,
    STREAM_END,
    STREAM_HEAD,
    FakeVllm,
    Hold,
    Step,
    chunk,
    completion,
    response,
    stream,
)
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
OPENAI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
SIMPLIFIED = {"messages": {"user": "Hi"}}
PING = b": keep-alive\n\n"
# For twenty seconds, of which no test waits for more than the first.
HANGS: list[Step] = [chunk(PING), 0.05] * 400


@pytest.mark.parametrize(
    ("limit", "told"), [("first_token", []), ("idle", [EVENTS[0]])], ids=["before the first token", "amid tokens"]
)
def test_an_engine_that_hangs_is_told_of_though_comments_come(fake: FakeVllm, limit: str, told: list[bytes]) -> None:
    fake.queue([STREAM_HEAD, *map(chunk, told), *HANGS])
    with running(fake.url, **{f"{limit}_timeout": 0.4}) as gateway, gateway.client() as client:
        got = client.post(CHAT, json=OPENAI)
        (line,) = gateway.log(1)
        counted = client.get("/metrics").text
    assert fake.received[0].closed.wait(5)
    before, _, error = got.content.partition(b'data: {"error"')
    assert before.replace(PING, b"") == b"".join(told)
    assert PING in before
    assert f'"code":"{limit}_timeout"'.encode() in error
    assert error.endswith(DONE)
    assert (line["status"], line["outcome"]) == (200, f"timeout:{limit}")
    assert (line["first_token_s"] is None) is (not told)
    assert ('gateway_first_token_seconds_count{model="demo"} 1.0' in counted) is bool(told)


@pytest.mark.parametrize("style", ["openai", "repr", "answer_part"])
def test_comments_of_vllm_go_on_as_they_come(client: httpx.Client, fake: FakeVllm, style: str) -> None:
    fake.queue([STREAM_HEAD, *map(chunk, EVENTS), STREAM_END])
    fake.queue([STREAM_HEAD, *[chunk(PING) + chunk(piece) + chunk(PING) for piece in EVENTS], STREAM_END])
    plain, commented = (client.post(CHAT, json={**SIMPLIFIED, "stream_style": style}).content for _ in range(2))
    assert commented.replace(PING, b"") == plain
    assert commented.count(PING) == 2 * len(EVENTS)


def test_what_stands_for_a_release_has_no_comments(fake: FakeVllm) -> None:
    with running(fake.url, compat="erag-2.1") as gateway, gateway.client() as client:
        fake.queue([STREAM_HEAD, *map(chunk, EVENTS), STREAM_END])
        fake.queue([STREAM_HEAD, *[chunk(PING) + chunk(piece) for piece in EVENTS], STREAM_END])
        plain, commented = (client.post(CHAT, json=SIMPLIFIED).content for _ in range(2))
    assert plain == commented


def test_comments_are_no_tokens(gateway: Gateway, fake: FakeVllm) -> None:
    """Of a stream of which none were told they are estimated by its events."""
    for script in ([*map(chunk, EVENTS)], [chunk(PING), *[chunk(piece) + chunk(PING) for piece in EVENTS]]):
        fake.queue([STREAM_HEAD, *script, STREAM_END])
    with gateway.client() as client:
        for _ in range(2):
            client.post(CHAT, json=OPENAI)
    first, second = gateway.log(2)
    assert first["completion_tokens"] == second["completion_tokens"] > 0


# Heartbeats: the gateway's own


@pytest.mark.parametrize("body", [OPENAI, SIMPLIFIED, {**SIMPLIFIED, "stream_style": "repr"}])
def test_a_stream_in_which_nothing_comes_has_comments_from_its_head_on(fake: FakeVllm, body: object) -> None:
    before_head, before_token, amid = Hold(), Hold(), Hold()
    script: list[Step] = [before_head, STREAM_HEAD, before_token, *map(chunk, EVENTS[:-1]), amid, chunk(DONE)]
    fake.queue([STREAM_HEAD, *map(chunk, EVENTS), STREAM_END], [*script, STREAM_END])
    with running(fake.url) as gateway, gateway.client() as client:
        plain = client.post(CHAT, json=body).content
        (first,) = gateway.log(1)
    with running(fake.url, heartbeat_interval=0.1) as gateway, gateway.client() as client:
        with client.stream("POST", CHAT, json=body) as got:
            assert (got.status_code, got.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            pieces, content = got.iter_raw(), b""
            for hold in (before_head, before_token, amid):
                seen = content.count(PING)
                while content.count(PING) < seen + 2:
                    content += next(pieces)
                hold.release()
            content += b"".join(pieces)
        (second,) = gateway.log(1)
    assert content.replace(PING, b"") == plain
    assert [line["outcome"] for line in (first, second)] == ["done", "done"]
    assert first["completion_tokens"] == second["completion_tokens"]


@pytest.mark.parametrize("cut", [0, 40, len(EVENTS[0]), len(b"".join(EVENTS[:4])) - 9])
def test_events_keep_their_order_however_they_came_behind_a_comment(fake: FakeVllm, cut: int) -> None:
    """The one with the finish reason waits for the next, in which the tokens are told."""
    begin = b"".join(EVENTS[:4])
    script: list[Step] = [0.4, STREAM_HEAD]
    for piece in filter(None, (begin[:cut], begin[cut:])):
        script += [chunk(piece), 0.1]
    fake.queue([STREAM_HEAD, *map(chunk, EVENTS), STREAM_END])
    fake.queue([*script, chunk(EVENTS[4]), 0.1, chunk(DONE), STREAM_END])
    with running(fake.url, heartbeat_interval=0.1) as gateway, gateway.client() as client:
        soon, late = (client.post(CHAT, json=SIMPLIFIED).content for _ in range(2))
    assert late.startswith(PING)
    assert late.replace(PING, b"") == soon.replace(PING, b"")  # which a busy machine may comment, too


def test_one_that_waits_in_the_queue_has_comments(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue([hold, response("200 OK", completion())])
    with (
        running(fake.url, heartbeat_interval=0.1, max_in_flight=1) as gateway,
        gateway.client() as client,
        gateway.client() as other,
        ThreadPoolExecutor() as threads,
    ):
        running_call = threads.submit(other.post, CHAT, json={**OPENAI, "stream": False})
        assert hold.reached.wait(20)
        with client.stream("POST", CHAT, json=OPENAI) as got:
            pieces = got.iter_raw()
            content = b""
            while content.count(PING) < 2:
                content += next(pieces)
            assert (got.status_code, content.replace(PING, b"")) == (200, b"")
            assert len(fake.received) == 1
            hold.release()
            content += b"".join(pieces)
        assert running_call.result().status_code == 200
    assert content.replace(PING, b"") == b"".join(EVENTS)


@pytest.mark.parametrize(
    ("path", "begins", "end"),
    [
        (CHAT, b'data: {"error"', DONE),
        ("/v1/responses", b'event: error\ndata: {"type":"error"', b"}\n\n"),
        ("/v1/messages", b'event: error\ndata: {"type":"error"', b"}\n\n"),
    ],
)
def test_a_refusal_behind_a_heartbeat_is_told_in_the_stream(
    fake: FakeVllm, path: str, begins: bytes, end: bytes
) -> None:
    hold = Hold()
    refusal = b'{"error":{"message":"too long","type":"BadRequestError","param":"input","code":400}}'
    fake.queue([hold, response("400 Bad Request", refusal)])
    with running(fake.url, heartbeat_interval=0.1) as gateway, gateway.client() as client:
        with client.stream("POST", path, json={**OPENAI, "max_tokens": 5}) as got:
            pieces = got.iter_raw()
            content = next(pieces)
            assert (got.status_code, content.replace(PING, b"")) == (200, b"")
            hold.release()
            content += b"".join(pieces)
            request_id = got.headers["x-request-id"]
        (line,) = gateway.log(1)
    # An answer that comes sooner keeps its status.
    fake.queue([response("400 Bad Request", refusal)])
    with running(fake.url, heartbeat_interval=60) as gateway, gateway.client() as client:
        soon = client.post(path, json={**OPENAI, "max_tokens": 5})
    told = content.replace(PING, b"")
    assert told.startswith(begins)
    assert told.endswith(end)
    assert b'"message":"too long"' in told
    assert request_id.encode() in told
    assert (line["status"], line["outcome"]) == (200, "refused")
    assert (soon.status_code, soon.content) == (400, refusal)


def test_another_upstream_answers_behind_a_heartbeat(fake: FakeVllm) -> None:
    """What one has refused before it began, as it does before a heartbeat."""
    hold = Hold()
    with FakeVllm() as second:
        answers: list[list[Step]] = [[hold, response("503 Service Unavailable", b"{}")], stream(EVENTS)]
        for one in (fake, second):
            one.queue(*answers)
        with (
            running(fake.url, second.url, heartbeat_interval=0.1) as gateway,
            gateway.client() as client,
            client.stream("POST", CHAT, json=OPENAI) as got,
        ):
            pieces = got.iter_raw()
            content = next(pieces)
            asked = fake if fake.received else second
            other = second if asked is fake else fake
            other.clear()
            hold.release()
            content += b"".join(pieces)
    assert content.replace(PING, b"") == b"".join(EVENTS)
    assert (len(fake.received), len(second.received)) == (1, 1)


def test_without_the_setting_a_silent_stream_has_no_head(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue([hold, response("400 Bad Request", b"{}")])
    with running(fake.url) as gateway, gateway.connect() as connection:
        body = b'{"model":"demo","messages":[{"role":"user","content":"Hi"}],"stream":true}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        assert hold.reached.wait(20)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        hold.release()
        connection.settimeout(20)
        assert connection.recv(12) == b"HTTP/1.1 400"
