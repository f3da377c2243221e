"""What is forwarded each way: never a header of one hop only, everything else in its order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.headers import NOT_TO_CLIENT, NOT_TO_UPSTREAM, Header, by_name, forwarded, sane_request_id


def to_upstream(headers: list[Header]) -> list[Header]:
    return forwarded(headers, by_name(headers), NOT_TO_UPSTREAM)


def to_client(headers: list[Header]) -> list[Header]:
    return forwarded(headers, by_name(headers), NOT_TO_CLIENT)


Forward = Callable[[list[Header]], list[Header]]
BOTH_WAYS = pytest.mark.parametrize("forward", [to_upstream, to_client])

ONE_HOP = [
    b"connection",
    b"http2-settings",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
]
KEPT = [b"accept", b"cache-control", b"content-type", b"traceparent", b"x-a", b"x-b"]
VALUES = st.sampled_from([b"", b"1", b"close", b"a, b"])
NAMED = st.lists(st.sampled_from([b"x-a", b"X-A", b" x-b", b"\tX-B ", b"close", b"", b"Keep-Alive"]), max_size=3)
HEADERS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEPT), VALUES),
        st.tuples(st.sampled_from(ONE_HOP[1:]), VALUES),
        st.tuples(st.just(b"connection"), NAMED.map(b",".join)),
    ),
    max_size=8,
)


@BOTH_WAYS
@pytest.mark.parametrize("name", ONE_HOP)
def test_a_header_of_one_hop_is_not_forwarded(forward: Forward, name: bytes) -> None:
    assert forward([(b"accept", b"*/*"), (name, b"x"), (b"accept", b"x/y")]) == [
        (b"accept", b"*/*"),
        (b"accept", b"x/y"),
    ]


@BOTH_WAYS
@given(headers=HEADERS)
@settings(deadline=None, max_examples=50)
def test_no_header_of_one_hop_or_named_by_connection_survives(forward: Forward, headers: list[Header]) -> None:
    named = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    assert not {name for name, _ in forward(headers)} & (named | set(ONE_HOP))


@BOTH_WAYS
@given(headers=HEADERS)
@settings(deadline=None, max_examples=50)
def test_order_and_duplicates_of_what_is_forwarded_are_kept(forward: Forward, headers: list[Header]) -> None:
    forwarded = forward(headers)
    rest = iter(headers)
    assert all(header in rest for header in forwarded)
    named = b",".join(value for name, value in headers if name == b"connection").lower()
    for name in KEPT:
        if name not in named:
            assert [h for h in forwarded if h[0] == name] == [h for h in headers if h[0] == name]


@pytest.mark.parametrize("name", [b"authorization", b"content-length", b"cookie", b"expect", b"host", b"x-request-id"])
def test_what_is_ours_to_write_or_the_clients_secret_does_not_reach_the_upstream(name: bytes) -> None:
    assert to_upstream([(name, b"x"), (b"accept", b"*/*")]) == [(b"accept", b"*/*")]


@pytest.mark.parametrize("name", [b"date", b"server", b"x-request-id"])
def test_what_every_way_in_writes_itself_does_not_come_from_the_upstream(name: bytes) -> None:
    assert to_client([(name, b"x"), (b"content-type", b"text/plain")]) == [(b"content-type", b"text/plain")]


@pytest.mark.parametrize("name", [b"content-length", b"content-encoding", b"retry-after", b"set-cookie", b"vary"])
def test_what_describes_the_answer_reaches_the_client(name: bytes) -> None:
    assert to_client([(name, b"x"), (name, b"y")]) == [(name, b"x"), (name, b"y")]


def test_every_connection_header_names_headers_to_drop() -> None:
    headers = [(b"connection", b"close, X-A"), (b"x-a", b"1"), (b"x-b", b"2"), (b"x-c", b"3"), (b"connection", b"x-b")]
    assert to_upstream(headers) == [(b"x-c", b"3")]


@BOTH_WAYS
def test_the_list_that_came_is_left_as_it_was(forward: Forward) -> None:
    headers = [(b"connection", b"x-a"), (b"x-a", b"1"), (b"date", b"x"), (b"host", b"x")]
    before = list(headers)
    forward(headers)
    assert headers == before


@pytest.mark.parametrize(
    ("headers", "value"),
    [
        ([], None),
        ([(b"x-a", b"1")], None),
        ([(b"content-type", b"1")], b"1"),
        ([(b"content-type", b"")], b""),
        ([(b"content-type", b"1"), (b"x-a", b"0"), (b"content-type", b"2")], b"1,2"),
    ],
)
def test_what_is_read_is_found_by_name_repeated_ones_joined(headers: list[Header], value: bytes | None) -> None:
    assert by_name(headers).get(b"content-type") == value


@pytest.mark.parametrize("value", [b"a", b"0f3c-9.x_y:z/+=@", b"x" * 128])
def test_a_sane_request_id_is_taken_over(value: bytes) -> None:
    assert sane_request_id(value) == value.decode()


@pytest.mark.parametrize(
    "value", [b"", b"x" * 129, b"a b", b"a\n", b"a\r\nx: y", b'a"b', b"a\x1b[31m", "é".encode(), b"{}", b"a,b", b"a%b"]
)
def test_a_request_id_that_could_harm_a_log_line_is_not_taken_over(value: bytes) -> None:
    assert sane_request_id(value) is None


def test_a_request_id_sent_twice_is_not_taken_over() -> None:
    assert sane_request_id(by_name([(b"x-request-id", b"a"), (b"x-request-id", b"b")])[b"x-request-id"]) is None
