"""Each event goes out for itself, in order, and the end behind the last, whatever came at once."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.relay.paced_client import PacedClient
from gateway.wire.heads import AnswerHead
from tests.support.recorders import ClientRecorder, Conversation, FakeClock

HEAD = AnswerHead(200, [], streams=True)
EVENTS = [b"data: %d\n\n" % number for number in range(5)]


def paced() -> tuple[PacedClient, ClientRecorder, FakeClock]:
    clock, recorder = FakeClock(), ClientRecorder()
    client = PacedClient(recorder, clock.call_later)
    client.start(HEAD, None, "id")
    return client, recorder, clock


def test_what_comes_at_once_goes_out_one_by_one_and_the_end_after_it() -> None:
    client, recorder, clock = paced()
    client.body(b"".join(EVENTS[:3]))
    client.body(EVENTS[3])
    client.end()
    assert (recorder.pieces, recorder.ending) == (EVENTS[:1], "")
    for count in (2, 3, 4):
        clock.advance(0.001)
        assert recorder.pieces == EVENTS[:count]
    assert recorder.ending == "end"
    clock.advance(1)
    assert (recorder.pieces, recorder.ending) == (EVENTS[:4], "end")


def test_what_comes_slowly_goes_out_as_it_comes() -> None:
    client, recorder, clock = paced()
    for number, event in enumerate(EVENTS, 1):
        client.body(event)
        assert recorder.pieces == EVENTS[:number]
        clock.advance(0.02)
    client.end()
    assert recorder.ending == "end"


def test_what_no_model_writes_goes_out_as_it_comes() -> None:
    client, recorder, _ = paced()
    events = [b"data: %060d\n\n" % number for number in range(3000)]
    client.body(b"".join(events))
    assert len(events) - 64 * 1024 // len(events[0]) - 1 <= len(recorder.pieces) < len(events)
    assert recorder.pieces == events[: len(recorder.pieces)]


def test_nothing_more_goes_to_who_has_left_or_was_cut_off() -> None:
    client, recorder, clock = paced()
    client.body(b"".join(EVENTS))
    recorder.gone = True
    assert client.is_gone()
    clock.advance(1)
    assert recorder.pieces == EVENTS[:1]

    client, recorder, clock = paced()
    client.body(b"".join(EVENTS))
    client.abort()
    clock.advance(1)
    assert (recorder.pieces, recorder.ending) == (EVENTS[:1], "abort")


CALL: dict[str, Any] = {"messages": {"user": "hi"}}


@pytest.mark.parametrize("leaves", [False, True])
def test_a_call_that_has_ended_still_writes_what_waits(leaves: bool) -> None:
    talk = Conversation(compat="erag-1.4", stream_style="repr")
    talk.ask(CALL)
    talk.connect()
    talk.head(200, [(b"content-type", b"text/event-stream")])
    chunk = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    talk.exchange.upstream_body(b": ping\n\n" + chunk * 3 + b"data: [DONE]\n\n")
    talk.exchange.upstream_end()
    assert talk.exchange.outcome == "done"
    assert talk.client.pieces == [b"data: 'x'\n\n"]
    if leaves:
        talk.leave()
    talk.clock.advance(1)
    assert talk.client.pieces == ([b"data: 'x'\n\n"] if leaves else [*[b"data: 'x'\n\n"] * 3, b"data: [DONE]\n\n"])
    talk.assert_settled()
