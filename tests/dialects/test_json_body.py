"""A request's body: an object, or a sentence that says what is wrong and where."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.dialects.json_body import to_object, to_utf8, without_long_strings
from gateway.wire.errors import BadRequest
from tests.support.examples import examples

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=4))
@settings(max_examples=50)
def test_any_json_object_is_read_as_it_is(value: dict[str, Any]) -> None:
    assert to_object(json.dumps(value, ensure_ascii=False).encode()) == value


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


@given(st.dictionaries(st.text(), JSON, max_size=4), st.sampled_from(ENCODINGS))
@settings(max_examples=50)
def test_any_encoding_that_vllms_parser_takes_is_taken(value: dict[str, Any], encoding: str) -> None:
    body = json.dumps(value, ensure_ascii=False).encode(encoding)
    assert json.loads(body) == value  # as the parser does
    assert to_object(to_utf8(body)) == value
    if encoding.startswith("utf-8"):
        assert to_utf8(body) is body


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"\xff\xfe", b"\xff\xfe{", b"\0", b"{\0", b"\xff\xfe\0\xd8{\0", b"\0\0\xfe\xff\0\0"]
)
def test_what_is_in_none_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest):
        to_object(to_utf8(body))


@given(st.binary(max_size=40) | st.text('{}[]",:\\ -+.0e1aNInfty\n\u00e9').map(str.encode))
@example(b"[" * 5000)
@example(b'{"a":' * 5000)
@example(b'{"a":1e999}')
@settings(max_examples=50)
def test_any_bytes_are_an_object_or_a_bad_request(body: bytes) -> None:
    with contextlib.suppress(BadRequest):
        assert isinstance(to_object(body), dict)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"[]", "an array"),
        (b'"x"', "a string"),
        (b"true", "a boolean"),
        (b"null", "null"),
        (b"7", "a number"),
        (b"7.5", "a number"),
        (b"", "empty"),
        (b" \n", "empty"),
    ],
)
def test_json_that_is_no_object_is_called_by_its_kind(body: bytes, kind: str) -> None:
    with pytest.raises(BadRequest) as raised:
        to_object(body)
    assert raised.value.message == f"The request's body must be a JSON object, but it is {kind}."
    assert raised.value.param is None


@pytest.mark.parametrize(
    ("body", "field", "number"),
    [
        (b'{"temperature": NaN}', "temperature", "NaN"),
        (b'{"a": 1, "top_p":Infinity}', "top_p", "Infinity"),
        (b'{"a": {"b": nan}}', "b", "nan"),
        (b'{"temperature": -Infinity}', "temperature", "-Infinity"),
    ],
)
def test_a_number_that_json_has_not_is_shown_with_its_field(body: bytes, field: str, number: str) -> None:
    with pytest.raises(BadRequest) as raised:
        to_object(body)
    assert raised.value.param == field
    assert raised.value.message.startswith(f"{field} must be a finite number, but it is {number} (line 1, column ")


@pytest.mark.parametrize(
    ("body", "where", "field"),
    [
        (b'{"messages": tru}', "line 1, column 14", "messages"),
        (b'{"a": 1,\n "max_new_tokens": 1 2}', "line 2, column 22", "max_new_tokens"),
        (b'{"a": 1,\n "top_k": 01}', "line 2, column 11", "top_k"),
        (b'{"a" 1}', "line 1, column 6", None),
        (b"{", "line 1, column 2", None),
        ('{"é": "ü", "b": x}'.encode(), "line 1, column 17", "b"),
    ],
)
def test_broken_json_is_told_with_its_place_and_field(body: bytes, where: str, field: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        to_object(body)
    assert raised.value.param == field
    assert where in raised.value.message
    assert (f"in the value of {field}" in raised.value.message) == (field is not None)


def test_a_body_that_is_not_utf8_is_told_by_the_byte() -> None:
    with pytest.raises(BadRequest, match="must be UTF-8, but byte 7 is not"):
        to_object(b'{"a":"x\xff"}')


@given(st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=12, max_size=40))
@settings(max_examples=50)
def test_what_the_prompt_said_is_never_in_the_sentence(prompt: str) -> None:
    with pytest.raises(BadRequest) as raised:
        to_object(json.dumps({"messages": prompt}, ensure_ascii=False)[:-2].encode())
    assert prompt not in raised.value.message


# What is looked at of a long body

LONG = 1500
PIECES = ['"', "\\", "\n", "é", "{", "x", "data:", "y" * LONG, "\U0001f600" * LONG]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
DEEP = st.recursive(
    TEXTS | st.booleans(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)


def emptied(value: Any) -> Any:
    """With every long string empty, as far as `data:`; names stay."""
    if isinstance(value, str):
        return value if len(value) < 1000 else "data:" if value.startswith("data:") else ""
    if isinstance(value, list):
        return [emptied(one) for one in value]
    return {name: emptied(one) for name, one in value.items()} if isinstance(value, dict) else value


@given(st.dictionaries(TEXTS, DEEP, max_size=4), st.booleans())
@examples(200)
def test_but_for_its_long_strings_it_is_what_came(value: dict[str, Any], ascii_alone: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_alone, separators=(",", ":")).encode()
    # Where there are too many quotes to look at, some of the long strings may have stayed.
    assert emptied(to_object(without_long_strings(body))) == emptied(value)


BYTES = st.sampled_from([b'"', b"\\", b"{", b"}", b":", b",", b"\xff", b"x" * LONG])


@given(st.lists(BYTES, max_size=12).map(b"".join))
@example(b'"' + b"\\" * LONG + b'"')
@example(b'{"a":"' + b"\\" * 100 + b'","b":"' + b"x" * LONG + b'"}')
@examples(200)
def test_any_long_bytes_are_as_they_are_but_for_what_stands_in_quotes(body: bytes) -> None:
    short = without_long_strings(body)
    with contextlib.suppress(BadRequest):
        assert emptied(to_object(body)) == emptied(to_object(short))
    assert len(short) <= len(body)


def test_a_prompt_is_found_behind_what_calls_have_before_it() -> None:
    call = {"model": "m", "temperature": 0.2, "max_tokens": 5, "stream": True, "seed": 1, "user": "u"}
    texts = ['Answer "shortly".', 'He said "yes".\n' + "A sentence without a quote. \\ \n" * 2000]
    body = json.dumps(call | {"messages": [{"role": "user", "content": text} for text in texts]}).encode()
    assert len(without_long_strings(body)) < 400


def test_a_long_string_of_quotes_is_left_to_the_parser() -> None:
    body = json.dumps({"prompt": '"' * 100_000}).encode()
    assert without_long_strings(body) == body
