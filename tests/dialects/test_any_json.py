"""Whatever JSON comes, on whatever path: a call that vLLM can read, or a 4xx that says what is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.dialects.prompts import from_ask, from_generate
from gateway.dialects.simplified import from_body, is_simplified
from gateway.wire.routes import ROUTES, Route
from tests.support.examples import examples
from tests.support.recorders import Conversation

POSTED = [route for route in ROUTES if route.body not in ("none", "upload")]
FIELDS = ["messages", "query", "prompt", "question", "model", "stream", "streaming", "max_tokens", "max_new_tokens"]
FIELDS += ["data", "stream_style", "n", "stop", "temperature", "user", "system", "role", "content", "type", "text"]
FIELDS += ["reranked_docs", "metadata", "url", "output_guardrail_params"]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["user", "repr"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=2), inner, max_size=4)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)
# What vLLM may be sent though nobody here has heard of it.
UNKNOWN = st.dictionaries(
    st.text(min_size=3, max_size=8).map("unknown_".__add__), JSON.filter(lambda one: one is not None), max_size=3
)


@given(st.sampled_from(POSTED), OBJECTS | JSON)
@examples(300)
@example(POSTED[0], {"messages": {"user": "Hi"}, "data": {"reranked_docs": [{"metadata": {"url": {"a": []}}}]}})
@example(POSTED[0], {"messages": [{"role": "user"}], "max_new_tokens": 2**63, "stream": None})
def test_any_json_is_a_call_or_a_4xx(route: Route, body: Any) -> None:
    sent = json.dumps(body).encode()  # with NaN, surrogates and numbers of any size, as clients' libraries write them
    talk = Conversation(route=route)
    talk.ask(sent)
    if talk.transport.asked:
        connection = talk.connect()
        call = json.loads(connection.request_body)
        assert isinstance(call, dict)
        if route.body == "json":
            assert connection.request_body == sent
        talk.leave()
    else:
        assert 400 <= talk.client.status < 500
        assert talk.client.error["message"]
    talk.assert_settled()


@given(UNKNOWN)
def test_a_field_that_is_not_known_here_goes_on(unknown: dict[str, Any]) -> None:
    try:
        written = orjson.loads(orjson.dumps(unknown))
    except TypeError:
        return  # an integer past 64 bits, which is refused as it is read
    calls = [
        from_body({"messages": {"user": "Hi"}, **unknown}, "openai", "system", disable_streaming=False).to_call("m"),
        from_generate({"prompt": "Hi", **unknown}, disable_streaming=False).to_call("m"),
        from_ask({"question": "Hi", **unknown}, lambda model: math.inf).to_call("m"),
    ]
    for call in calls:
        assert orjson.loads(call).items() >= written.items()


@given(st.text(min_size=1).filter(lambda text: not text.isspace()), st.none() | st.text(min_size=1))
def test_a_text_reaches_the_model_as_it_was_said(user: str, system: str | None) -> None:
    body: dict[str, Any] = {"messages": {"user": user, "system": system}}
    assert is_simplified(body)
    said = orjson.loads(from_body(body, "openai", "system", disable_streaming=False).to_call("m"))["messages"]
    assert said[-1] == {"role": "user", "content": user}
    assert [one["content"] for one in said[:-1]] == ([system] if system else [])
    assert orjson.loads(from_ask({"question": user}, lambda model: math.inf).to_call("m"))["prompt"] == user
