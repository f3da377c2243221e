"""What a call may ask for, and what is refused with nothing sent upstream."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.body_limits import BodyLimits
from gateway.wire.errors import BadRequest
from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import running

CHAT = "/v1/chat/completions"
BOUNDS = BodyLimits(max_n=4, max_new_tokens=100, max_messages=3, max_json_depth=6)
TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({"n": 5}, "n must be at most 4 (GATEWAY_MAX_N), but it is 5.", "n"),
        ({"best_of": 1e9}, "best_of must be at most 4 (GATEWAY_MAX_N)", "best_of"),
        ({"max_tokens": 101}, "max_tokens must be at most 100 (GATEWAY_MAX_NEW_TOKENS), but it is 101.", "max_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens must be at most 100", "max_completion_tokens"),
        ({"max_new_tokens": 2**40}, "max_new_tokens must be at most 100", "max_new_tokens"),
        ({"max_output_tokens": 101}, "max_output_tokens must be at most 100", "max_output_tokens"),
        ({"messages": [TURN] * 4}, "messages must be at most 3 (GATEWAY_MAX_MESSAGES), but they are 4.", "messages"),
        ({"a": [[[[[[]]]]]]}, "The request's body is nested more than 6 deep (GATEWAY_MAX_JSON_DEPTH).", None),
    ],
)
def test_too_much_is_refused_by_its_name(body: dict[str, Any], said: str, param: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        BOUNDS.check(body)
    assert raised.value.message.startswith(said)
    assert raised.value.param == param


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 4, "best_of": 1, "max_tokens": 100, "messages": [TURN] * 3},
        {"n": "5", "max_tokens": None, "messages": "a" * 99, "best_of": True},
        {"a": [[[[[]]]]]},
        {"a": {"b": {"c": {"d": {"e": {}}}}}},
    ],
)
def test_what_is_not_too_much_is_for_others_to_judge(body: dict[str, Any]) -> None:
    BOUNDS.check(body)


@given(
    st.recursive(st.none(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
)
def test_depth_is_counted_as_it_is(value: Any) -> None:
    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    body = {"a": value}
    bounds = BodyLimits(max_n=1, max_new_tokens=None, max_messages=1, max_json_depth=depth(body))
    bounds.check(body)
    with pytest.raises(BadRequest):
        BodyLimits(max_n=1, max_new_tokens=None, max_messages=1, max_json_depth=depth(body) - 1).check(body)


@pytest.mark.usefixtures("way")
def test_nothing_goes_upstream_of_what_asks_for_too_much(fake: FakeVllm) -> None:
    bounds = {"max_n": 2, "max_new_tokens": 50, "max_messages": 2, "max_json_depth": 10}
    with running(fake.url, **bounds) as gateway, gateway.client() as client:
        for path, body in (
            (CHAT, {"model": "demo", "messages": [TURN] * 3}),
            (CHAT, {"model": "demo", "messages": [TURN], "n": 3}),
            (CHAT, {"messages": {"user": "hi"}, "max_new_tokens": 51}),
            ("/v1/completions", {"prompt": "hi", "best_of": 3}),
            ("/v1/responses", {"input": "hi", "max_output_tokens": 51}),
            ("/v1/messages", {"messages": [TURN], "max_tokens": 51}),
            ("/generate", {"prompt": "hi", "n": 3}),
            ("/v1/embeddings", {"input": orjson.loads("[" * 10 + "]" * 10)}),
        ):
            refused = client.post(path, json=body)
            assert refused.status_code == 400, (path, refused.text)
            assert "GATEWAY_MAX_" in refused.json()["error"]["message"]
        assert fake.received == []
        taken: httpx.Response = client.post(CHAT, json={"messages": {"user": "hi"}, "streaming": False})
        assert taken.status_code == 200
    assert orjson.loads(fake.received[0].body)["max_tokens"] == 50
