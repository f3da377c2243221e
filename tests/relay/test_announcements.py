"""What vLLM says of a response before its engine begins: neither a first token, nor an event, nor a sign of it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.sse import only_announces
from tests.relay.test_exchange import answering
from tests.support.fake_vllm import STREAM_END, STREAM_HEAD, FakeVllm, Step, chunk
from tests.support.gateway_process import running
from tests.support.recorders import LIMITS, MESSAGES, RESPONSES, Conversation


def event(name: str, number: int = 0, **more: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (
        name.encode(),
        orjson.dumps({"type": name, "sequence_number": number, **more}),
    )


# As vLLM tells of a call with long instructions, which come back in it.
LONG = {"response": {"instructions": "event: x " * 20_000}}
CREATED, QUEUED, IN_PROGRESS = (event(f"response.{name}") for name in ("created", "queued", "in_progress"))
ANNOUNCED = [CREATED, QUEUED, event("response.in_progress", 2)]
TOLD = [event("response.output_text.delta", 3, delta="x"), event("response.completed", 4)]


def responding(**more: Any) -> Conversation:
    return answering({"model": "demo", "stream": True}, route=RESPONSES, **more)


@pytest.mark.parametrize(
    ("data", "beginning", "announces"),
    [
        (CREATED, b"", True),
        (CREATED + IN_PROGRESS, b"", True),
        (CREATED.replace(b"\n", b"\r\n"), b"", True),
        (CREATED.replace(b"event: ", b"event:"), b"", True),
        (b": a comment\n\n" + CREATED, b"", True),
        (CREATED + TOLD[0], b"", False),
        (TOLD[0] + CREATED, b"", False),
        (event("response.failed"), b"", False),
        (event("response.in_progress_of_another_kind"), b"", False),
        (event("error"), b"", False),
        (b'data: {"type":"response.created"}\n\n', b"", False),
        (b"x" * 99, CREATED[:64], True),
        (b"x" * 99, TOLD[0][:64], False),
        (b"x\n\n" + TOLD[0], CREATED[:64], False),
        (b"", b"", False),
    ],
)
def test_what_only_announces_is_known_by_its_names(data: bytes, beginning: bytes, announces: bool) -> None:
    assert only_announces(data, beginning) is announces


@pytest.mark.parametrize("more", [{}, LONG])
def test_the_first_token_of_a_response_may_take_its_time(more: dict[str, Any]) -> None:
    talk = responding()
    early = [event("response.created", 0, **more), event("response.in_progress", 1, **more)]
    for piece in early:
        for at in range(0, len(piece), 60_000):
            talk.exchange.upstream_body(piece[at : at + 60_000])
    assert talk.client.content == b"".join(early), "they go out at once"
    talk.clock.advance(LIMITS.first_token_timeout - 1)
    assert (talk.exchange.outcome, talk.exchange.first_byte_at, talk.exchange.events) == ("", None, 0)
    began = talk.clock.now
    for piece in TOLD:
        talk.exchange.upstream_body(piece)
    talk.exchange.upstream_end()
    talk.assert_settled()
    assert talk.client.content == b"".join([*early, *TOLD])
    assert (talk.exchange.outcome, talk.exchange.first_byte_at, talk.exchange.events) == ("done", began, 2)


def test_a_first_token_that_does_not_come_is_told_by_its_own_limit() -> None:
    talk = responding()
    for piece in ANNOUNCED:
        talk.exchange.upstream_body(piece)
        talk.clock.advance(1)
    talk.clock.advance(LIMITS.first_token_timeout)
    talk.assert_settled()
    assert talk.exchange.outcome == "timeout:first_token"
    assert talk.client.content.startswith(b"".join(ANNOUNCED) + b"event: error\n")
    assert b'"sequence_number":3' in talk.client.content
    assert talk.upstreams[0].broken_in_a_row == 1


def test_an_idle_gap_is_one_after_the_first_token() -> None:
    talk = responding()
    for piece in [*ANNOUNCED, TOLD[0]]:
        talk.exchange.upstream_body(piece)
    talk.clock.advance(LIMITS.idle_timeout + 1)
    assert talk.exchange.outcome == "timeout:idle"


def test_only_a_responses_events_are_known_by_these_names() -> None:
    talk = answering({"model": "demo", "stream": True}, route=MESSAGES)
    talk.exchange.upstream_body(CREATED)
    assert talk.exchange.first_byte_at == talk.clock.now


@given(st.lists(st.integers(1, 300), max_size=30), st.booleans())
def test_however_it_is_split_the_first_token_is_what_the_model_says(cuts: list[int], as_chunks: bool) -> None:
    talk = responding()
    if as_chunks:
        talk.client.chunk = lambda framed: talk.client.body(framed.split(b"\r\n", 1)[1][:-2])
    early, told = b"".join(ANNOUNCED), b"".join(TOLD)

    def bring(data: bytes) -> None:
        for size in [*cuts, len(data)]:
            piece, data = data[:size], data[size:]
            # As connections do: what is one chunk, and ends with a blank line, is not taken apart.
            if piece[-2:] == b"\n\n":
                talk.exchange.upstream_chunk(b"%x\r\n%b\r\n" % (len(piece), piece), len(piece))
            elif piece:
                talk.exchange.upstream_body(piece)

    bring(early)
    assert (talk.client.content, talk.exchange.first_byte_at) == (early, None)
    talk.clock.advance(LIMITS.idle_timeout + 1)
    bring(told)
    talk.exchange.upstream_end()
    assert talk.client.content == early + told
    assert (talk.exchange.outcome, talk.exchange.first_byte_at) == ("done", talk.clock.now)
    assert talk.exchange.events == 2


@pytest.mark.usefixtures("way")
def test_a_response_that_waits_for_its_engine_is_not_cut(fake: FakeVllm) -> None:
    waits: list[Step] = [STREAM_HEAD, *map(chunk, ANNOUNCED), 1.0, *map(chunk, TOLD), STREAM_END]
    with running(fake.url, idle_timeout=0.5) as gateway, gateway.client() as client:
        fake.queue(waits)
        answered = client.post("/v1/responses", json={"model": "demo", "input": "Hi", "stream": True})
        (line,) = gateway.log(1)
        first = client.get("/v1/status").json()["now"]["first_token_p50"]
    assert answered.content == b"".join([*ANNOUNCED, *TOLD])
    assert line["outcome"] == "done"
    assert line["first_token_s"] >= 1.0
    assert first >= 1.0
