"""Server-sent events: however the bytes are split, and with every end of line, the same events."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.sse import (
    DONE,
    Decoder,
    Ends,
    data_of,
    encode,
    end_of_last_event,
    has_end,
    has_error,
    next_sequence_number,
)

VALUES = st.binary(max_size=6).filter(lambda value: not value.startswith(b" ") and not {10, 13} & set(value))
DATA_LINES = st.builds(lambda start, value: (start + value, value), st.sampled_from([b"data:", b"data: "]), VALUES)
OTHER_LINES = st.sampled_from([(b": ping", None), (b"event: x", None), (b"database: x", None), (b":data: x", None)])
EVENTS = st.lists(st.lists(st.one_of(DATA_LINES, OTHER_LINES, st.just((b"data", b""))), max_size=3), max_size=4)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
Lines = list[tuple[bytes, bytes | None]]


def stream_of(events: list[Lines], end: bytes) -> bytes:
    return b"".join(b"".join(line + end for line, _ in event) + end for event in events)


def data_in(events: list[Lines]) -> list[bytes]:
    found = ([value for _, value in event if value is not None] for event in events)
    return [b"\n".join(values) for values in found if values]


def decoded(pieces: Iterable[bytes]) -> list[bytes]:
    decoder = Decoder(limit=1024)
    return [data for piece in pieces for data in decoder.feed(piece)]


@given(EVENTS, LINE_ENDS)
def test_every_split_point_of_a_stream_gives_the_same_events(events: list[Lines], end: bytes) -> None:
    stream = stream_of(events, end)
    for at in range(len(stream) + 1):
        assert decoded([stream[:at], stream[at:]]) == data_in(events)


@given(EVENTS, LINE_ENDS)
def test_a_stream_that_comes_byte_by_byte_gives_the_same_events(events: list[Lines], end: bytes) -> None:
    stream = stream_of(events, end)
    assert decoded(stream[at : at + 1] for at in range(len(stream))) == data_in(events)


@given(EVENTS, LINE_ENDS)
def test_the_end_of_the_last_event_never_cuts_an_event_and_leaves_none_behind(events: list[Lines], end: bytes) -> None:
    stream = stream_of(events, end)
    for at in range(len(stream) + 1):
        whole = end_of_last_event(stream[:at])
        assert decoded([stream[:whole]]) + decoded([stream[whole:]]) == data_in(events)
        assert decoded([stream[whole:at]]) == []


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (b"", 0),
        (b"data: x", 0),
        (b"data: x\n", 0),
        (b"data: x\r\n", 0),
        (b"data: x\r\n\r", 0),
        (b"data: x\n\n", 9),
        (b"data: x\r\n\r\n", 11),
        (b"data: x\n\r\n", 10),
        (b"data: x\r\r", 9),
        (b"data: x\n\ndata: y", 9),
        (b"data: x\n\ndata: y\n", 9),
        (b"data: x\n\ndata: y\n\n", 18),
        (b"data: x\r\n\r\ndata: y\r\n", 11),
        (b"data: x\n\ndata: y\r\n\r\n", 20),
    ],
)
def test_whole_events_end_after_the_last_blank_line(data: bytes, end: int) -> None:
    assert end_of_last_event(data) == end


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\n\n", b"x"),
        (b"data:  x\n\n", b" x"),
        (b"data: a: b\n\n", b"a: b"),
        (b"data: x\ndata: y\n\n", b"x\ny"),
        (b"data: x\r\ndata: y\r\n\r\n", b"x\ny"),
        (b"event: e\nid: 7\ndata: x\n\n", b"x"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b": ping\n\n", None),
        (b"event: e\n\n", None),
        (b"datum: x\n\n", None),
        (b" data: x\n\n", None),
        (b"\n", None),
        (b"", None),
    ],
)
def test_the_data_of_an_event_is_its_data_lines(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == data


@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"").replace(b"\r", b"")), max_size=5))
def test_what_was_encoded_is_decoded_as_it_was(pieces: list[bytes]) -> None:
    assert decoded([b"".join(map(encode, pieces))]) == pieces


def test_the_end_of_a_stream_is_encoded_as_openai_clients_expect_it() -> None:
    assert encode(DONE) == b"data: [DONE]\n\n"


def test_an_event_that_never_ended_gives_nothing() -> None:
    assert decoded([b"data: x\n\n", b"data: y\n"]) == [b"x"]


def test_an_unfinished_event_past_the_limit_is_refused() -> None:
    decoder = Decoder(limit=10)
    assert decoder.feed(b"data: 6789") == []
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        decoder.feed(b"0")


def test_many_events_in_one_read_may_pass_the_limit_together() -> None:
    assert Decoder(limit=10).feed(encode(b"x") * 50) == [b"x"] * 50


@pytest.mark.parametrize(
    ("ends", "data", "found"),
    [
        ("done", b"data: [DONE]\n\n", True),
        ("done", b"e\r\ndata: [DONE]\n\n\r\n", True),
        ("done", b'data: {"text":"data: [DONE]"}\n\n', False),
        ("done", b"event: message_stop\ndata: {}\n\n", False),
        ("responses", b"event: response.completed\ndata: {}\n\n", True),
        ("responses", b"event: response.incomplete\r\ndata: {}\r\n\r\n", True),
        ("responses", b"event:error\ndata: {}\n\n", True),
        ("responses", b"event: response.in_progress\ndata: {}\n\n", False),
        ("responses", b'data: {"text":"event: response.completed"}\n\n', False),
        ("responses", b"data: [DONE]\n\n", False),
        ("messages", b"event: message_delta\ndata: {}\n\nevent: message_stop\ndata: {}\n\n", True),
        ("messages", b"event: message_stopped\ndata: {}\n\n", False),
    ],
)
def test_a_streams_end_is_the_event_that_ends_its_kind(ends: Ends, data: bytes, found: bool) -> None:
    assert has_end(data, ends) is found


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'data: {"error":{}}\n\n', True),
        (b"20\r\nevent: error\ndata: {}\n\n", True),
        (b"event: response.failed\ndata: {}\n\n", True),
        (b"event: response.completed\ndata: {}\n\n", False),
        (b'data: {"text":"event: error"}\n\n', False),
    ],
)
def test_an_error_in_a_stream_is_seen(data: bytes, found: bool) -> None:
    assert has_error(data) is found


def test_an_event_of_responses_is_numbered_after_the_last() -> None:
    assert next_sequence_number(b'{"sequence_number":8}\n\ndata: {"sequence_number": 9,"type":"x"}') == 10
    assert next_sequence_number(b"data: {}\n\n") == 0
