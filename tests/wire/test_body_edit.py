"""A body is edited in its bytes: what is not meant stays as it came, and what is meant is what a parser reads."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.body_edit import edited

BODIES: list[tuple[bytes, bytes]] = [
    (b'{"model":"a","n":1}', b'{"model":"new","n":1}'),
    (b'{ "n": 1,\n "model" :  "a" }\n', b'{ "n": 1,\n "model" :  "new" }\n'),
    (b'{"model":"a\\"}","n":1}', b'{"model":"new","n":1}'),
    (b'{"model":null,"n":1}', b'{"model":"new","n":1}'),
    (b'{"n":1}', b'{"n":1,"model":"new"}'),
    (b'{"model":{"a":1}}', b'{"model":{"a":1},"model":"new"}'),
    (b"{}", b'{"model":"new"}'),
    (b" { } ", b' { "model":"new"} '),
    # A name that is another's, or is one of two, is left alone: the last one wins.
    (b'{"x":{"model":"a"}}', b'{"x":{"model":"a"},"model":"new"}'),
    (b'{"x":{"model":"a"},"model":"b"}', b'{"x":{"model":"a"},"model":"b","model":"new"}'),
    (b'{"x":{"model":"a"},"mod\\u0065l":"b"}', b'{"x":{"model":"a"},"mod\\u0065l":"b","model":"new"}'),
    (b'{"model":"a","mod\\u0065l":"b"}', b'{"model":"a","mod\\u0065l":"b","model":"new"}'),
    (b'{"model":"a","model":"b"}', b'{"model":"a","model":"b","model":"new"}'),
    (b'{"x":"\\"model\\":\\"a\\"","model":"b"}', b'{"x":"\\"model\\":\\"a\\"","model":"new"}'),
    (b'{"x":"' + b"x" * 70_000 + b'","model":"b"}', b'{"x":"' + b"x" * 70_000 + b'","model":"b","model":"new"}'),
]


@pytest.mark.parametrize(("body", "wanted"), BODIES)
def test_the_model_is_replaced_at_its_place_or_stands_last(body: bytes, wanted: bytes) -> None:
    assert edited(body, orjson.loads(body), model="new") == wanted


def test_fields_are_added_before_the_last_brace() -> None:
    body = b'{"model":"a", "messages":[{"content":"}"}] }\r\n'
    got = edited(body, orjson.loads(body), stream_options={"include_usage": True}, model="b")
    assert got == b'{"model":"b", "messages":[{"content":"}"}] ,"stream_options":{"include_usage":true}}\r\n'


def test_what_is_not_edited_is_the_same_object() -> None:
    body = b'{"model":"a"}'
    assert edited(body, {"model": "a"}) is body


NAMES = st.sampled_from(["model", "stream_options", "x", "mode", "ümodel"])
JSON = st.recursive(st.none() | st.text() | st.integers(-5, 5), lambda inner: st.dictionaries(NAMES, inner, max_size=3))


@given(st.dictionaries(NAMES, JSON), st.sampled_from([None, 1]), st.booleans())
def test_a_parser_reads_the_body_with_the_changes(body: dict[str, Any], indent: int | None, escaped: bool) -> None:
    content = json.dumps(body, indent=indent, ensure_ascii=escaped).encode(errors="replace")
    body = orjson.loads(content)
    for parse in (orjson.loads, json.loads):
        assert parse(edited(content, body, model="new")) == {**body, "model": "new"}
        options = {"include_usage": True}
        assert parse(edited(content, body, stream_options=options)) == {**body, "stream_options": options}
