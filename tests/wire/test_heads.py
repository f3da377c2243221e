"""What is forwarded each way: never a header of one hop only, everything else in its order."""

from __future__ import annotations

from collections.abc import Callable

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.wire.head_cache import SameHead
from gateway.wire.heads import Header, RequestHead, answer_head, by_name, sane_request_id
from tests.support.examples import examples


def to_upstream(headers: list[Header]) -> list[Header]:
    lines = RequestHead(headers).lines.split(b"\r\n")[:-1]
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


def to_client(headers: list[Header]) -> list[Header]:
    return answer_head(200, headers)[0].headers


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
KEPT = [b"accept", b"cache-control", b"content-language", b"traceparent", b"x-a", b"x-b"]
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
def test_no_header_of_one_hop_or_named_by_connection_survives(forward: Forward, headers: list[Header]) -> None:
    named = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    assert not {name for name, _ in forward(headers)} & (named | set(ONE_HOP))


@BOTH_WAYS
@given(headers=HEADERS)
def test_order_and_duplicates_of_what_is_forwarded_are_kept(forward: Forward, headers: list[Header]) -> None:
    forwarded = forward(headers)
    rest = iter(headers)
    assert all(header in rest for header in forwarded)
    named = b",".join(value for name, value in headers if name == b"connection").lower()
    for name in KEPT:
        if name not in named:
            assert [h for h in forwarded if h[0] == name] == [h for h in headers if h[0] == name]


@pytest.mark.parametrize(
    "name",
    [b"authorization", b"content-length", b"cookie", b"expect", b"host", b"x-request-id", b"proxy-status", b"proxy-x"],
)
def test_what_is_ours_to_write_or_the_clients_secret_does_not_reach_the_upstream(name: bytes) -> None:
    assert to_upstream([(name, b"x"), (b"accept", b"*/*")]) == [(b"accept", b"*/*")]


@pytest.mark.parametrize("name", [b"date", b"server", b"x-request-id"])
def test_what_every_way_in_writes_itself_does_not_come_from_the_upstream(name: bytes) -> None:
    assert to_client([(name, b"x"), (b"content-type", b"text/plain")]) == [(b"content-type", b"text/plain")]


def test_the_length_of_an_answer_is_told_apart() -> None:
    head, length = answer_head(200, [(b"content-length", b"7"), (b"vary", b"Origin")])
    assert (head.headers, length) == ([(b"vary", b"Origin")], b"7")


@pytest.mark.parametrize("name", [b"content-type", b"content-encoding", b"retry-after", b"vary"])
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


class Parsed:
    """What a parser reads of one message."""

    def __init__(self, data: bytes) -> None:
        self.told: list[object] = []
        self.body = b""
        self.ended = 0
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(data)
        self.told += [
            parser.get_method(),
            parser.get_http_version(),
            parser.should_keep_alive(),
            parser.should_upgrade(),
        ]

    def on_url(self, url: bytes) -> None:
        self.told.append(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() != b"content-length":
            self.told.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.ended += 1


def message(lines: list[bytes], body: bytes) -> bytes:
    head = [b"POST /v1/chat/completions HTTP/1.1", *lines]
    return b"\r\n".join(head).replace(b"LENGTH", b"%d" % len(body)) + b"\r\n\r\n" + body


LINES = st.lists(
    st.sampled_from(
        [
            b"Host: x",
            b"Content-Length: LENGTH",
            b"content-length: LENGTH",
            b"content-length:LENGTH",
            b"Content-Length: LENGTH ",
            b" content-length: 3",
            b"x-content-length: 4",
            b"x: content-length: 5",
            b"x: a\r",
            b"x: a\ncontent-length: 5",
            b"Transfer-Encoding: chunked",
            b"Connection: close",
            b"",
            b"\tfolded",
        ]
    ),
    max_size=5,
)
BODIES = st.sampled_from([b"", b"{}", b"x" * 12, b"content-length: 1\r\n\r\n", b"0\r\n\r\n"])


@given(lines=LINES, first=BODIES, second=BODIES, more=st.sampled_from([b"", b"", b"\r\n", b"G", b"x" * 9]))
@example(lines=[b"Host: x", b"Content-Length: LENGTH"], first=b"{}", second=b"x" * 12, more=b"")
@example(lines=[b"Content-Length: LENGTH", b""], first=b"", second=b"", more=b"")
@examples(500)
def test_a_head_that_is_known_again_is_what_a_parser_would_read(
    lines: list[bytes], first: bytes, second: bytes, more: bytes
) -> None:
    data, again = message(lines, first), message(lines, second) + more
    try:
        before = Parsed(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return
    same = SameHead.of(data)
    if same is None or before.ended != 1 or not before.told[-2]:
        return
    at = same.body_at(again)
    # An empty line among them ends the head, and more comes behind the body.
    assert bool(at) is not bool(more) or (b"" in lines and not at)
    if at:
        after = Parsed(again)
        assert (after.told, after.ended) == (before.told, 1)
        assert after.body == again[at:]


@pytest.mark.parametrize(
    "again",
    [
        b"",
        b"POST / HTTP/1.1\r\ncontent-length: 2\r\nhost: x\r\n\r\nhi",
        b"POST /x HTTP/1.1\r\ncontent-length: 3\r\nhost: x\r\n\r\nhi",
        b"POST /x HTTP/1.1\r\ncontent-length: 2\r\nhost: x\r\n\r\nhi!",
        b"POST /x HTTP/1.1\r\ncontent-length: \r\nhost: x\r\n\r\n",
        b"POST /x HTTP/1.1\r\ncontent-length: +2\r\nhost: x\r\n\r\nhi",
        b"POST /x HTTP/1.1\r\ncontent-length: 2\r\nhost: y\r\n\r\nhi",
        b"POST /x HTTP/1.1\r\ncontent-length: 2",
        b"POST /x HTTP/1.1\r\ncontent-length: 0000000002\r\nhost: x\r\n\r\nhi",
    ],
)
def test_what_differs_in_more_than_its_length_or_is_not_whole_is_not_known_again(again: bytes) -> None:
    same = SameHead.of(b"POST /x HTTP/1.1\r\ncontent-length: 5\r\nhost: x\r\n\r\nhello")
    assert same is not None
    assert same.body_at(again) == 0
    assert same.body_at(b"POST /x HTTP/1.1\r\ncontent-length: 2\r\nhost: x\r\n\r\nhi") == 48


def test_a_head_is_known_again_with_any_length_but_those_that_make_its_digits_more() -> None:
    same = SameHead.of(message([b"Host: x", b"Content-Length: LENGTH", b"Accept: */*"], b"{}"))
    assert same is not None
    unknown = []
    for length in range(1100):
        data = message([b"Host: x", b"Content-Length: LENGTH", b"Accept: */*"], b"x" * length)
        at = same.body_at(data)
        if at:
            assert data[at:] == b"x" * length
        else:
            unknown.append(length)
    assert unknown == [9, 98, 99, 997, 998, 999]


def test_a_long_head_is_not_remembered() -> None:
    assert SameHead.of(b"POST / HTTP/1.1\r\ncontent-length: 0\r\nx: " + b"x" * 5000 + b"\r\n\r\n") is None
