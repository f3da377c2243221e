"""The simplified form: request to chat call, and the reply and stream back."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.simplified import Simplified, from_body, is_simplified
from gateway.dialects.streams import Style
from gateway.wire.errors import BadRequest

Body = dict[str, Any]
Role = Literal["system", "merge"]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi."}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
PARTS = [{"type": "text", "text": "What is"}, IMAGE, {"type": "text", "text": "this?"}]
ANSWER = {"id": "c-1", "choices": [{"message": {"content": "Hello."}, "finish_reason": "stop"}], "usage": {"n": 1}}


def read(body: Body, role: Role = "system", style: Style = "openai", whole: bool = False) -> Simplified:
    return from_body(body, style, role, disable_streaming=whole)


def refused(body: Body, role: Role = "system") -> BadRequest:
    with pytest.raises(BadRequest) as raised:
        read(body, role).to_call("m")
    return raised.value


def read_or_refused(body: Body, role: Role, whole: bool) -> Simplified | BadRequest:
    try:
        return read(body, role, whole=whole)
    except BadRequest as error:
        return error


@pytest.mark.parametrize(
    ("sent", "written"),
    [
        ({"temperature": 0, "top_p": 1, "max_new_tokens": 64}, b'"max_tokens":64,"temperature":0,"top_p":1,'),
        ({"max_new_tokens": 5.0, "temperature": 0.5}, b'"max_tokens":5,"temperature":0.5,"top_p":0.95,'),
        ({}, b'"max_tokens":512,"temperature":0.01,'),
    ],
)
def test_whole_numbers_go_on_as_such(sent: Body, written: bytes) -> None:
    request = from_body({"messages": "Hi", **sent}, "openai", "system", disable_streaming=True, max_new_tokens=512)
    assert written in request.to_call("demo")


@pytest.mark.parametrize(
    ("body", "simplified"),
    [
        ({"messages": {}}, True),
        ({"messages": ""}, True),
        ({"query": "Hi."}, True),
        ({"query": None}, True),
        ({"messages": None, "query": "Hi."}, True),
        ({"messages": [], "max_new_tokens": 5}, True),
        ({"messages": [], "streaming": None}, True),
        ({"messages": []}, False),
        ({"messages": [], "query": "Hi.", "max_tokens": 5, "stream": True}, False),
        ({"messages": 7, "query": "Hi."}, False),
        ({"messages": None}, False),
        ({}, False),
    ],
)
def test_the_form_is_told_by_the_messages(body: Body, simplified: bool) -> None:
    assert is_simplified(body) is simplified


@pytest.mark.parametrize(
    ("body", "role", "messages", "prompt"),
    [
        ({"messages": {"system": "Be brief.", "user": "Hi."}}, "system", [SYSTEM, USER], "Hi."),
        ({"messages": {"user": "Hi."}}, "system", [USER], "Hi."),
        ({"messages": {"system": None, "user": "Hi."}}, "system", [USER], "Hi."),
        ({"messages": {"system": "", "user": "Hi."}}, "merge", [USER], "Hi."),
        ({"messages": "Hi."}, "system", [USER], "Hi."),
        ({"query": "Hi."}, "merge", [USER], "Hi."),
        (
            {"messages": {"system": "Be brief.", "user": "Hi."}},
            "merge",
            [{"role": "user", "content": "Be brief.\n\nHi."}],
            "Hi.",
        ),
        ({"messages": [SYSTEM, USER], "max_new_tokens": 9}, "system", [SYSTEM, USER], "Hi."),
        ({"messages": {"user": PARTS}}, "system", [{"role": "user", "content": PARTS}], "What is\nthis?"),
        (
            {"messages": {"system": "Be brief.", "user": PARTS}},
            "merge",
            [{"role": "user", "content": [{"type": "text", "text": "Be brief.\n\n"}, *PARTS]}],
            "What is\nthis?",
        ),
        (
            {"messages": [USER, SYSTEM, {"role": "user", "content": "Bye."}], "streaming": True},
            "merge",
            [{"role": "user", "content": "Be brief.\n\nHi."}, {"role": "user", "content": "Bye."}],
            "Bye.",
        ),
        (
            {"messages": [{"role": "user", "content": [1]}], "streaming": True},
            "merge",
            [{"role": "user", "content": [1]}],
            "",
        ),
    ],
)
def test_messages_of_every_form_become_a_chat(body: Body, role: Role, messages: list[Body], prompt: str) -> None:
    request = read(body, role)
    assert (request.chat["messages"], request.echoed["prompt"]) == (messages, prompt)


def test_what_is_not_sent_gets_the_defaults_of_the_systems_it_replaces() -> None:
    assert read({"messages": "Hi."}).chat == {
        "messages": [USER],
        "max_tokens": 1024,
        "temperature": 0.01,
        "top_p": 0.95,
        "stream": True,
    }


@pytest.mark.parametrize(
    ("sent", "forwarded"),
    [
        ({"max_new_tokens": 5}, {"max_tokens": 5}),
        ({"max_new_tokens": 5.0}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"temperature": 0, "top_p": 1}, {"temperature": 0, "top_p": 1}),
        ({"temperature": None, "max_new_tokens": None}, {"temperature": 0.01, "max_tokens": 1024}),
        ({"top_k": 10, "repetition_penalty": 1.03, "seed": 0}, {"top_k": 10, "repetition_penalty": 1.03, "seed": 0}),
        ({"top_k": None, "typical_p": 0.5, "id": "x", "stream_style": "repr"}, {}),
        (
            {"model": "m", "stream_options": {"include_usage": True}},
            {"stream_options": {"include_usage": True}},
        ),
        ({"model": "", "streaming": False, "stream_options": {}}, {"stream": False}),
        ({"input_guardrail_params": {}, "output_guardrail_params": {}, "data": {}}, {}),
    ],
)
def test_fields_are_forwarded_only_when_sent(sent: Body, forwarded: Body) -> None:
    defaults = {"messages": [USER], "max_tokens": 1024, "temperature": 0.01, "top_p": 0.95, "stream": True}
    assert read({"messages": "Hi.", **sent}).chat == {**defaults, **forwarded}


@pytest.mark.parametrize(
    ("sent", "whole", "streaming", "echoed"),
    [
        ({}, False, True, True),
        ({"streaming": False}, False, False, False),
        ({"stream": False}, False, False, False),
        ({"stream": True, "streaming": True}, False, True, True),
        ({"streaming": None, "stream": False}, False, False, False),
        ({"streaming": True}, True, False, True),
        ({}, True, False, True),
        ({"stream": False}, True, False, False),
    ],
)
def test_it_streams_unless_the_request_or_the_gateway_says_not(
    sent: Body, whole: bool, streaming: bool, echoed: bool
) -> None:
    request = read({"messages": "Hi.", **sent}, whole=whole)
    assert (request.streaming, request.chat["stream"]) == (streaming, streaming)
    assert (request.echoed["streaming"], request.echoed["stream"]) == (echoed, echoed)  # what was asked for


@pytest.mark.parametrize(
    ("sent", "style"), [({}, "openai"), ({"stream_style": "repr"}, "repr"), ({"stream_style": None}, "openai")]
)
def test_a_request_may_say_its_own_style(sent: Body, style: Style) -> None:
    assert read({"messages": "Hi.", **sent}).style == style
    assert read({"messages": "Hi."}, style=style).style == style


@pytest.mark.parametrize(
    ("sent", "param", "said"),
    [
        ({"messages": {}}, "messages.user", "it is missing"),
        ({"messages": {"user": " \n"}}, "messages.user", "it is empty"),
        ({"messages": {"user": 7}}, "messages.user", "it is a number"),
        ({"messages": {"user": "Hi.", "system": ["x"]}}, "messages.system", "it is an array"),
        ({"messages": {"user": []}}, "messages.user", "it is empty"),
        ({"messages": {"user": ["x"]}}, "messages.user[0]", "an object with a type"),
        ({"messages": {"user": [IMAGE, {"text": "x"}]}}, "messages.user[1]", "an object with a type"),
        ({"data": {"reranked_docs": {"x": 1}}}, "data.reranked_docs", "an array of documents"),
        ({"messages": ""}, "messages", "it is empty"),
        ({"messages": None, "query": True}, "query", "it is a boolean"),
        ({"messages": [], "streaming": True}, "messages", "at least one message of role 'user'"),
        ({"messages": [USER, "x"], "streaming": True}, "messages[1]", "it is a string"),
        ({"messages": [{"role": 1}], "streaming": True}, "messages[0].role", "must be a string, but it is"),
        ({"max_new_tokens": 0}, "max_new_tokens", "it is 0"),
        ({"max_tokens": 2**31}, "max_tokens", f"it is {2**31}"),
        ({"max_new_tokens": "5"}, "max_new_tokens", 'it is "5"'),
        ({"max_new_tokens": 5.5}, "max_new_tokens", "it is 5.5"),
        ({"max_new_tokens": 3e9}, "max_new_tokens", "it is 3000000000.0"),
        ({"max_new_tokens": True}, "max_new_tokens", "it is true"),
        ({"max_new_tokens": 5, "max_tokens": 6}, "max_new_tokens", "(5 and 6)"),
        ({"temperature": -0.1}, "temperature", "it is -0.1"),
        ({"temperature": "hot"}, "temperature", 'it is "hot"'),
        ({"temperature": True}, "temperature", "it is true"),
        ({"top_p": 0}, "top_p", "it is 0"),
        ({"top_p": 1.1}, "top_p", "it is 1.1"),
        ({"top_p": [1]}, "top_p", "it is an array"),
        ({"streaming": "False"}, "streaming", 'it is "False"'),
        ({"stream": 1}, "stream", "it is 1"),
        ({"streaming": True, "stream": False}, "streaming", "(true and false)"),
        ({"streaming": True, "stream": 1}, "streaming", "(true and 1)"),
        ({"stream_style": "xml"}, "stream_style", "'openai' or 'repr' or 'answer_part'"),
        ({"model": {}}, "model", "it is an object"),
        ({"data": []}, "data", "it is an array"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_wrong_about_it(sent: Body, param: str, said: str) -> None:
    error = refused({"messages": "Hi.", **sent})
    assert error.param == param
    assert said in error.message
    assert param in error.message


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": [{"type": "text", "text": "Be brief."}]}])
def test_a_system_message_without_text_cannot_be_merged(content: Body) -> None:
    body: Body = {"messages": [{"role": "system", **content}, USER], "max_new_tokens": 5}
    assert refused(body, "merge").param == "messages"


@pytest.mark.parametrize("name", ["chat_template_kwargs", "data"])
def test_a_request_too_deep_to_be_written_again_is_refused(name: str) -> None:
    # orjson reads 1024 levels and writes 254.
    deep = orjson.loads(b'{"a":' * 300 + b"1" + b"}" * 300)
    assert "deep" in refused({"messages": "Hi.", name: deep}).message


SCALARS = st.none() | st.booleans() | st.integers(-2, 2**33) | st.floats(-1, 2) | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["user", "system", "openai", "repr"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "user", "system"]), inner, max_size=3)
    ),
    max_leaves=6,
)
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"])}, optional={"content": VALUES})
NUMBERS = ["max_new_tokens", "max_tokens", "temperature", "top_p", "top_k"]
NAMES = ["query", "model", "streaming", "stream", "stream_style", "data", "stop", *NUMBERS]
BODIES = st.fixed_dictionaries(
    {"messages": VALUES | st.just("Hi.") | st.lists(TURNS, min_size=1, max_size=3)},
    optional=dict.fromkeys(NAMES, VALUES),
)


@given(BODIES.filter(is_simplified), st.sampled_from(get_args(Role)), st.booleans())
def test_any_body_is_a_simplified_request_or_a_bad_request_that_names_a_field(
    body: Body, role: Role, whole: bool
) -> None:
    before = orjson.dumps(body)
    read_as = read_or_refused(body, role, whole)
    if isinstance(read_as, BadRequest):
        assert read_as.param
        assert re.split(r"[.\[]", read_as.param)[0] in {"messages", *NAMES}
        assert read_as.param in read_as.message
    else:
        assert orjson.loads(orjson.dumps(read_as.chat)) == read_as.chat
        assert json.loads(read_as.to_reply(orjson.dumps(ANSWER)))["text"] == "Hello."
    assert orjson.dumps(body) == before
