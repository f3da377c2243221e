"""However a body is made up, to read it takes little time, or it is refused by its values, or by its bytes."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.dialects.json_body import PART
from gateway.dialects.media_urls import check_in_steps
from gateway.dialects.reader import BodyReader
from gateway.wire.errors import Rejected, TooLarge
from gateway.wire.routes import BodyKind
from tests.support.recorders import Conversation, body_limits

MIB = 1024 * 1024


def reader(**settings: Any) -> BodyReader:
    return Conversation(**settings).path.reader


def chat(content: bytes) -> bytes:
    return b'{"model":"demo","messages":[{"role":"user","content":' + content + b"}]}"


def repeated(piece: bytes, begin: bytes = b"[", end: bytes = b"]", *, size: int = 15 * MIB) -> bytes:
    return begin + b",".join([piece] * (size // (len(piece) + 1))) + end


# By name the kind of call and a body of some 15 MiB that is mostly values, or short texts.
MANY: dict[str, tuple[BodyKind, bytes]] = {
    "content": ("chat", chat(repeated(b"[]"))),
    "content parts": ("chat", chat(repeated(b'{"type":"text","text":"a"}'))),
    "embeddings": ("json", b'{"input":' + repeated(b"[0]") + b"}"),
    "documents": (
        "chat",
        b'{"messages":"a","data":{"reranked_docs":' + repeated(b'{"text":"a","metadata":{"url":"a"}}') + b"}}",
    ),
    "a simplified field": ("chat", b'{"messages":"a","x":' + repeated(b"[]") + b"}"),
    "generate": ("generate", b'{"prompt":"a","x":' + repeated(b"[]") + b"}"),
    "numbers": ("json", b'{"input":' + repeated(b"1") + b"}"),
    "texts": ("json", b'{"input":' + repeated(b'""') + b"}"),
    "texts of commas": ("json", b'{"input":' + repeated(b'",[{,"') + b"}"),
    "commas behind backslashes": ("json", b'{"a":"' + b"\\" * (13 * MIB) + b'"' + b"," * 1_000_100),
    "commas behind a long string": ("json", b'{"a":"' + b"\\\\" * MIB + b'\\""' + b"," * 1_000_100),
    "names": ("json", repeated(b'"a":1', b"{", b"}")),
    "values": ("json", b'{"input":' + repeated(b"1", size=2 * MIB) + b"}"),
    "arrays": ("json", b'{"input":' + repeated(b"[]", size=MIB) + b"}"),
    "objects": ("chat", chat(repeated(b'{"type":"text","text":"a"}', size=2 * MIB))),
    "fields": ("json", repeated(b'"a":1', b"{", b"}", size=MIB)),
}


@pytest.mark.parametrize("name", MANY)
def test_too_many_values_are_refused_before_they_are_read(name: str) -> None:
    kind, body = MANY[name]
    for settings in ({}, {"compat": "erag-2.1"}):
        with pytest.raises(TooLarge, match=r"GATEWAY_MAX_JSON_(VALUES|BYTES)"):
            reader(**settings).read(kind, body)


# What the limits let in, as large as they do: it is read, or refused for something else.
TEXT = repeated(b"a [b], {c}: d", b'"', b'"')
MOST: dict[str, tuple[BodyKind, bytes]] = {
    "a prompt": ("chat", chat(TEXT)),
    "a simplified prompt": ("chat", b'{"messages":' + TEXT + b"}"),
    "a prompt of escapes": ("chat", chat(b'"' + b'\\"[],{}' * (2 * MIB) + b'"')),
    "messages": (
        "chat",
        b'{"model":"demo","messages":' + repeated(b'{"role":"user","content":"' + b"a," * 3000 + b'"}') + b"}",
    ),
    "arrays": ("json", b'{"input":[' + b",".join([b"[]"] * 99_000) + b"]}"),
    "numbers": ("json", b'{"input":[' + b",".join([b"1"] * 990_000) + b"]}"),
    "parts": ("chat", chat(b"[" + b",".join([b'{"type":"text","text":"a"}'] * 49_000) + b"]")),
    "urls": ("chat", chat(b"[" + b",".join([b'{"image_url":"data:a"}'] * 99_000) + b"]")),
    "documents": (
        "chat",
        b'{"messages":"a","data":{"reranked_docs":['
        + b",".join([b'{"text":"a","metadata":{"url":"a"}}'] * 33_000)
        + b"]}}",
    ),
}


REFUSED = {
    "messages": "GATEWAY_MAX_MESSAGES",
    **dict.fromkeys(("arrays", "parts", "urls", "documents"), "GATEWAY_MAX_INPUTS"),
}


@pytest.mark.parametrize("name", MOST)
def test_what_may_come_is_not_taken_for_too_much(name: str) -> None:
    kind, body = MOST[name]
    if name in REFUSED:
        with pytest.raises(Rejected, match=REFUSED[name]):
            reader().read(kind, body)
    else:
        assert reader().read(kind, body)


@pytest.mark.parametrize("size", range(-3, 4))
@pytest.mark.parametrize("backslashes", range(7))
def test_a_string_is_passed_over_wherever_its_escapes_are_cut(size: int, backslashes: int) -> None:
    limits = body_limits(max_json_values=1000)
    text = (
        b"x" * (PART - 6 + size - backslashes) + b"\\" * backslashes + (b'"' if backslashes % 2 else b"") + b"," * 2000
    )
    body = b'{"x":"' + text + b'"}'
    assert orjson.loads(body)
    list(limits.check_size(body, body))
    with pytest.raises(TooLarge):
        list(limits.check_size(body + b"," * 2000, body + b"," * 2000))


def test_the_limit_counts_what_a_parser_makes() -> None:
    limits = body_limits(max_json_values=1000)
    for value, most in (([], 100), (1, 999), ("a,b", 999), ({"a": 1}, 100)):
        for count, refused in ((most - 2, False), (most + 2, True)):
            body = orjson.dumps({"x": [value] * count})
            if not refused:
                list(limits.check_size(body, body))
                continue
            with pytest.raises(TooLarge):
                list(limits.check_size(body, body))


def test_what_is_no_long_string_is_bounded_by_its_bytes() -> None:
    settings = {"body_limits": body_limits(max_json_bytes=100_000)}
    short, long = b'"' + b"\\n" * 400 + b'"', b'"' + b"x" * 2000 + b'"'
    assert reader(**settings).read("json", b'{"input":' + repeated(long, size=MIB) + b"}")
    assert reader(**settings).read("json", b'{"input":' + repeated(short, size=99_000) + b"}")
    with pytest.raises(TooLarge, match=r"at most 100000 bytes \(GATEWAY_MAX_JSON_BYTES\)"):
        reader(**settings).read("json", b'{"input":' + repeated(short, size=101_000) + b"}")


@pytest.mark.parametrize("value", [["a"] * 100_000, {"x": [["a"] * 50_000] * 2}, [{"a": 1}] * 50_000])
def test_many_values_are_looked_through_step_by_step(value: object) -> None:
    assert len(list(check_in_steps(value, b'url"', frozenset(), False))) >= 4
    assert len(list(check_in_steps(value, b'"uuid"', frozenset(), True))) >= 4
    assert list(check_in_steps(value, b'"uuid"', frozenset(), False)) == []
    assert list(check_in_steps(value, b"", frozenset(), True)) == []


@pytest.mark.parametrize("kind", ["chat", "json"])
def test_what_takes_long_is_a_step_of_its_own(kind: BodyKind) -> None:
    body = chat(b'[{"image_url":"data:a"}]')[:-1] + b',"x":"' + b"\\n" * MIB + b'","y":["' + b'","'.join([b"a"] * MIB)
    limits = body_limits(max_json_bytes=16 * MIB, max_json_values=16 * MIB)
    steps = reader(body_limits=limits).read_in_steps(kind, body + b'"]}')
    # Its long strings, its values by 128 KiB, the parser, what the walk for URLs looks for, and that walk.
    assert len(list(steps)) >= 1 + 2 * MIB * 2 // PART + 2


@pytest.mark.parametrize(
    ("inside", "refused"),
    [
        (b'"' + b"x" * MIB + b'"', False),
        (b'"' + b"\\n" * 99_000 + b'"', False),
        (b'"' + b"\\n" * 101_000 + b'"', True),
        (b'"' + "é".encode() * 99_000 + b'"', False),
        (b'"' + "é".encode() * 101_000 + b'"', True),
        (repeated(b'"a"', size=48_000), False),
        (repeated(b'"a"', size=51_000), True),
    ],
    ids=["text", "escapes", "too many escapes", "foreign", "too much foreign", "values", "too many values"],
)
@pytest.mark.parametrize("compat", [None, "erag-2.1"])
def test_what_is_read_and_written_anew_counts_twice(inside: bytes, refused: bool, compat: str | None) -> None:
    body = b'{"messages":{"user":"Hi"},"x":' + inside + b"}"
    one = reader(body_limits=body_limits(max_json_bytes=100_000), compat=compat)
    relayed = b'{"model":"demo","messages":[],"x":' + inside + b"}"
    if compat is None:
        assert one.read("chat", relayed)
    if refused:
        with pytest.raises(TooLarge, match="half of GATEWAY_MAX_JSON_BYTES"):
            one.read("chat", body)
    else:
        assert one.read("chat", body)
