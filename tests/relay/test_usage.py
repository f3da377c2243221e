"""Token counts, found in the end of an answer without parsing it."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.relay import usage


def usage_in(tail: bytes) -> tuple[int, int] | None:
    return usage.usage_in(usage.usage_text(tail))


REPORTED = b'"usage":{"prompt_tokens":31,"total_tokens":53,"completion_tokens":22}'


@pytest.mark.parametrize(
    ("tail", "found"),
    [
        (b"", None),
        (b"data: [DONE]\n\n", None),
        (b'{"usage":null}', None),
        (b'{"usage":{}}', None),
        (b'{"usage":{"prompt_tokens":3}}', (3, 0)),
        (b'{"usage":{"completion_tokens":3}}', None),
        (b'{"prompt_tokens":1,"completion_tokens":2}', None),
        (b"{" + REPORTED + b"}", (31, 22)),
        (b'{"usage": {"completion_tokens": 2,\n "prompt_tokens": 1}}', (1, 2)),
        (b'ge":{"prompt_tokens":8,"completion_tokens":9}}\n\ndata: {' + REPORTED + b"}\n\ndata: [DONE]\n\n", (31, 22)),
        (b'{"usage":{"prompt_tokens":8,"completion_tokens":9}}\n\ndata: {' + REPORTED + b"}\n\n", (31, 22)),
        (b'{"usage":{"prompt_tokens":0,"completion_tokens":0,"prompt_tokens_details":null}}', (0, 0)),
        (
            b'{"usage":{"input_tokens":17,"input_tokens_details":{"cached_tokens":0},"output_tokens":22},"user":0}',
            (17, 22),
        ),
        (b'{"usage":{"prompt_tokens":3},"metrics":{"completion_tokens":9}}', (3, 0)),
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\ndata: {"usage":null}\n\n', (3, 4)),
        (
            b'{"usage":{"input_tokens":16,"output_tokens":2,"cache_read_input_tokens":984,'
            b'"cache_creation_input_tokens":5}}',
            (1005, 2),
        ),
        (b'{"usage":{"input_tokens":16,"output_tokens":2,"cache_read_input_tokens":null}}', (16, 2)),
        (
            b'{"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":0,"input_tokens_per_turn":['
            + b"12000," * 500
            + b'1]},"output_tokens":22,"output_tokens_details":{"tool_output_tokens":1}}}',
            (9, 22),
        ),
        (b"{" + REPORTED + b',"tools":[{"usage":{"prompt_tokens":0,"completion_tokens":0}}]}', (31, 22)),
        (b'{"tools":[{"usage":{"prompt_tokens":0,"completion_tokens":0}}],' + REPORTED + b"}", (31, 22)),
        (b'{"usage":{"prompt_tokens_details":{"cached_tokens":5},"prompt_tokens":7,"completion_tokens":1}}', (7, 1)),
    ],
)
def test_the_last_usage_that_vllm_reported_is_found(tail: bytes, found: tuple[int, int] | None) -> None:
    assert usage_in(tail) == found


@given(
    st.sampled_from(['"usage":', '{"usage":{"prompt_tokens":9,"completion_tokens":9}}', ""]), st.text(), st.booleans()
)
def test_a_model_that_writes_of_usage_is_not_mistaken_for_vllm(written: str, more: str, after: bool) -> None:
    text = b'"content":' + json.dumps(written + more).encode()
    assert usage_in(b"{" + text + b"}") is None
    assert usage_in(b"{" + (REPORTED + b"," + text if after else text + b"," + REPORTED) + b"}") == (31, 22)


@given(st.integers(min_value=0, max_value=2**40), st.integers(min_value=0, max_value=2**40))
def test_whole_numbers_are_read_exactly(prompt: int, completion: int) -> None:
    said = {"usage": {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}}
    for separators in ((",", ":"), (", ", ": ")):
        assert usage_in(json.dumps(said, separators=separators).encode()) == (prompt, completion)


@given(st.integers(min_value=1, max_value=99), st.text(alphabet='"usage:{}', max_size=20))
def test_the_first_usage_is_found_however_an_answer_was_split(size: int, written: str) -> None:
    answer = b'{"query":' + json.dumps(written).encode() + b"," + REPORTED + b',"results":[' + b"1," * 9000 + b"1]}"
    first = b""
    for at in range(0, len(answer), size):
        first = usage.first_usage(first, answer[at : at + size])
    assert len(first) <= 4096 + size
    assert usage.usage_in(usage.usage_text(answer[-100:], first)) == (31, 22)
    assert usage.usage_text(b'"results":[]', usage.first_usage(b"", b'{"content":"\\"usage\\":{')) == b""


PICTURE = "A" * 100_000
URL = f"data:image/png;base64,{PICTURE}"


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": URL},
        {"type": "input_audio", "input_audio": {"data": PICTURE, "format": "wav"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
        {"type": "image_embeds", "image_embeds": PICTURE},
        {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{PICTURE},{PICTURE}"}},
    ],
)
def test_a_picture_or_a_recording_is_worth_a_thousand_tokens(item: dict[str, object]) -> None:
    text = {"role": "user", "content": "x" * 5000}
    for separators in ((",", ":"), (", ", ": ")):
        body = json.dumps({"messages": [text, {"content": [item, item]}]}, separators=separators).encode()
        without = len(re.sub(rb"A{9,}(,A+)?", b"", body))
        assert usage.prompt_size(body) == pytest.approx(without + 2 * 4000, abs=50)
    small = json.dumps({"content": [{"type": "image_url", "image_url": {"url": URL[:3000]}}], "text": "x" * 9000})
    assert usage.prompt_size(small.encode()) == len(small)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"content": URL}]},
        {"messages": [{"content": '{"url":"' + URL}]},
        {"messages": [{"content": 'see "data":"' + PICTURE}]},
        {"messages": [{"content": PICTURE}]},
        {"data": "one word and another " * 1000},
        {"data": {"reranked_docs": [{"text": PICTURE}]}},
        {"url": "https://example.com/;base64," + PICTURE},
    ],
)
def test_what_is_written_is_text_however_it_looks(body: dict[str, object]) -> None:
    content = json.dumps(body).encode()
    assert usage.prompt_size(content) == len(content)


def test_of_very_many_items_those_past_a_bound_count_as_text() -> None:
    content = json.dumps([{"data": "A" * 5000}] * 300).encode()
    assert usage.prompt_size(content) == len(content) - 256 * 1000


def test_an_item_is_found_wherever_a_step_ends() -> None:
    for before in range(1024 * 1024 - 60, 1024 * 1024 + 2):
        content = b'{"x":"' + b"-" * before + b'","url":"' + URL.encode() + b'"}'
        assert usage.prompt_size(content) == len(content) - len(PICTURE) - len(";base64,") + 4000


@pytest.mark.parametrize(
    ("details", "cached"),
    [
        (b"", 0),
        (b',"prompt_tokens_details":null', 0),
        (b',"prompt_tokens_details":{"cached_tokens":24}', 24),
        (b',"input_tokens_details":{"cached_tokens":16,"cached_tokens_per_turn":[1]}', 16),
        (b',"cache_read_input_tokens":9', 9),
        (b',"prompt_tokens_details":{"cached_tokens":null}', 0),
    ],
)
def test_what_the_prefix_cache_had_is_found(details: bytes, cached: int) -> None:
    tail = b'{"usage":{"prompt_tokens":31,"completion_tokens":22' + details + b"}}"
    assert usage.cached_in(usage.usage_text(tail)) == cached


def test_a_number_of_absurd_length_does_not_raise() -> None:
    # Python refuses to read an integer of more than 4,300 digits.
    for name, found in ((b"prompt", None), (b"total", (31, 0))):
        text = REPORTED.replace(name + b'_tokens":', name + b'_tokens":' + b"1" * 5000)
        assert usage_in(b"{" + text + b"}") == found
