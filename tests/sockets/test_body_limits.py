"""What a call may ask for, and what is refused with nothing sent upstream."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.errors import BadRequest
from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import running
from tests.support.recorders import body_limits

CHAT = "/v1/chat/completions"
BOUNDS = body_limits(max_n=4, max_new_tokens=100, max_messages=3, max_inputs=5, max_json_depth=6)
TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({"n": 5}, "n must be at most 4 (GATEWAY_MAX_N), but it is 5.", "n"),
        ({"best_of": 1e9}, "best_of must be at most 4 (GATEWAY_MAX_N)", "best_of"),
        ({"n": "3"}, 'n must be an integer, but it is "3".', "n"),
        ({"n": True}, "n must be an integer, but it is true.", "n"),
        ({"n": [3]}, "n must be an integer, but it is an array.", "n"),
        ({"max_tokens": "10"}, 'max_tokens must be an integer, but it is "10".', "max_tokens"),
        ({"min_tokens": 101}, "min_tokens must be at most 100 (GATEWAY_MAX_NEW_TOKENS)", "min_tokens"),
        ({"stream": "true"}, 'stream must be true or false, but it is "true".', "stream"),
        ({"stream": 1}, "stream must be true or false, but it is 1.", "stream"),
        ({"ec_transfer_params": {"peer_host": "x"}}, "ec_transfer_params is not taken here", "ec_transfer_params"),
        ({"kv_transfer_params": {"remote_host": "x"}}, "kv_transfer_params is not taken here", "kv_transfer_params"),
        ({"vllm_xargs": {"a": 1, "kv_transfer_params": "x"}}, "vllm_xargs.kv_tr", "vllm_xargs.kv_transfer_params"),
        ({"vllm_xargs": {"ec_transfer_params": ["x"]}}, "vllm_xargs.ec_transfer", "vllm_xargs.ec_transfer_params"),
        ({"input": ["a"] * 6}, "input must be at most 5 (GATEWAY_MAX_INPUTS), but they are 6.", "input"),
        ({"input": [[1]] * 6}, "input must be at most 5 (GATEWAY_MAX_INPUTS), but they are 6.", "input"),
        ({"documents": ["a"] * 6}, "documents must be at most 5", "documents"),
        ({"text_1": ["a"] * 6}, "text_1 must be at most 5", "text_1"),
        ({"text_2": ["a"] * 6}, "text_2 must be at most 5", "text_2"),
        ({"data_1": ["a"] * 6}, "data_1 must be at most 5", "data_1"),
        ({"data_1": "a", "data_2": ["b"] * 6}, "data_2 must be at most 5", "data_2"),
        ({"queries": ["a"] * 6}, "queries must be at most 5", "queries"),
        ({"items": ["a"] * 6}, "items must be at most 5", "items"),
        ({"prompt_embeds": ["AAAA"] * 6}, "prompt_embeds must be at most 5", "prompt_embeds"),
        ({"prompt_embeds": ["AAAA"] * 3, "n": 2}, "n times the prompts must be at most 5 answers", "n"),
        ({"prompt": ["a"] * 3, "prompt_embeds": ["AAAA"] * 3}, "n times the prompts must be at most 5 answers", "n"),
        ({"prompt": ["a"] * 3, "n": 2}, "n times the prompts must be at most 5 answers (GATEWAY_MAX_INPUTS)", "n"),
        ({"messages": [[TURN]] * 6}, "messages must be at most 5 chats (GATEWAY_MAX_INPUTS), but they are", "messages"),
        ({"messages": [[TURN, TURN]] * 2}, "messages must be at most 3 (GATEWAY_MAX_MESSAGES), but they", "messages"),
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
        {"n": None, "max_tokens": None, "messages": "a" * 99, "stream": None},
        {"input": [1] * 99, "prompt": ["a"] * 5, "n": 1, "documents": "x"},
        {"prompt": "a", "prompt_embeds": "AAAA", "n": 2},
        {"vllm_xargs": {"a": 1, "session_id": "x"}, "kv_transfer_params": None},
        {"vllm_xargs": ["kv_transfer_params"]},
        {"vllm_xargs": "kv_transfer_params"},
        {"prompt_embeds": "AAAA", "n": 4},
        {"data_1": "a", "data_2": ["b"] * 5},
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
    bounds = body_limits(max_n=1, max_new_tokens=None, max_messages=1, max_json_depth=depth(body))
    bounds.check(body)
    with pytest.raises(BadRequest):
        body_limits(max_n=1, max_new_tokens=None, max_messages=1, max_json_depth=depth(body) - 1).check(body)


@pytest.mark.usefixtures("way")
def test_nothing_goes_upstream_of_what_asks_for_too_much(fake: FakeVllm) -> None:
    bounds = {"max_n": 2, "max_new_tokens": 50, "max_messages": 2, "max_inputs": 3, "max_json_depth": 10}
    with running(fake.url, **bounds) as gateway, gateway.client() as client:
        for path, body in (
            (CHAT, {"model": "demo", "messages": [TURN] * 3}),
            (CHAT, {"model": "demo", "messages": [TURN], "n": 3}),
            (CHAT, {"messages": {"user": "hi"}, "max_new_tokens": 51}),
            ("/v1/completions", {"prompt": "hi", "best_of": 3}),
            ("/v1/responses", {"input": "hi", "max_output_tokens": 51}),
            ("/v1/messages", {"messages": [TURN], "max_tokens": 51}),
            ("/generate", {"prompt": "hi", "n": 3}),
            ("/v1/completions", {"prompt_embeds": ["AAAA"] * 4}),
            ("/v1/completions", {"prompt_embeds": ["AAAA"] * 2, "n": 2}),
            ("/v1/score", {"data_1": "a", "data_2": ["b"] * 4}),
            ("/v1/score", {"text_1": "a", "text_2": ["b"] * 4}),
            ("/v1/embeddings", {"input": orjson.loads("[" * 10 + "]" * 10)}),
        ):
            refused = client.post(path, json=body)
            assert refused.status_code == 400, (path, refused.text)
            assert "GATEWAY_MAX_" in refused.json()["error"]["message"]
        assert fake.received == []
        taken: httpx.Response = client.post(CHAT, json={"messages": {"user": "hi"}, "streaming": False})
        assert taken.status_code == 200
    assert orjson.loads(fake.received[0].body)["max_tokens"] == 50


@pytest.mark.usefixtures("way")
def test_a_field_that_is_refused_is_so_wherever_vllm_obeys_it(fake: FakeVllm) -> None:
    said = {"session_id": "another's"}
    with running(fake.url, refused_fields="session_id") as gateway, gateway.client() as client:
        for path, body in (
            (CHAT, {"model": "demo", "messages": [TURN]}),
            (CHAT, {"messages": {"user": "hi"}}),
            (CHAT, {"messages": [TURN], "tools": ["x" * 2000] * 20}),
            ("/v1/completions", {"prompt": "hi"}),
            ("/v1/responses", {"input": "hi"}),
            ("/v1/messages", {"messages": [TURN], "max_tokens": 5}),
            ("/generate", {"prompt": "hi"}),
        ):
            for more, param in ((said, "session_id"), ({"vllm_xargs": said}, "vllm_xargs.session_id")):
                refused = client.post(path, json=body | more)
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), path
        assert fake.received == []
        assert client.post(CHAT, json={"messages": [TURN], "vllm_xargs": {"kv_transfer_params": 1}}).status_code == 200
