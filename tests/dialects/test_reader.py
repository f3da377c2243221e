"""Which model a call is for, and what is changed in one that is relayed: nothing but what the documents say."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest

from gateway.dialects.reader import BodyReader
from gateway.wire.routes import BodyKind
from tests.support.paths import ROOT
from tests.support.recorders import Conversation, body_limits

CHAT = {"model": "other", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
BATCH = {"model": "demo", "messages": [CHAT["messages"], CHAT["messages"]]}
PROMPT = {"model": "demo", "prompt": "Hi", "max_tokens": None}
INPUT = {"model": "demo", "input": "Hi"}
BOUND = {"body_limits": body_limits(max_new_tokens=9)}
# By field and setting: the call, what that setting makes the reader do, and to what the field is changed.
EDITS: dict[tuple[str, str], tuple[BodyKind, dict[str, Any], dict[str, Any], Any]] = {
    ("model", "GATEWAY_MODEL_ALIASES"): ("chat", CHAT, {"model_aliases": {"other": "demo"}}, "demo"),
    ("model", "GATEWAY_COMPAT"): ("chat", CHAT, {"compat": "erag-2.1"}, "demo"),
    ("stream_options", "GATEWAY_COUNT_TOKENS"): ("chat", CHAT, {"counts_all": True}, {"include_usage": True}),
    ("max_completion_tokens", "GATEWAY_MAX_NEW_TOKENS"): ("chat", CHAT, BOUND, 9),
    ("max_tokens", "GATEWAY_MAX_NEW_TOKENS"): ("completion", PROMPT, BOUND, 9),
    ("max_output_tokens", "GATEWAY_MAX_NEW_TOKENS"): ("response", INPUT, BOUND, 9),
}


def reader(**settings: Any) -> BodyReader:
    return Conversation(**settings).path.reader


@pytest.mark.parametrize(("edit", "example"), EDITS.items(), ids=map(" by ".join, EDITS))
def test_a_relayed_call_is_changed_by_a_setting_alone(edit: tuple[str, str], example: Any) -> None:
    kind, body, settings, value = example
    content = orjson.dumps(body)
    assert orjson.loads(reader(**settings).read(kind, content)[0]) == {**body, edit[0]: value}
    assert reader().read(kind, content)[0] is content


def test_a_batch_of_chats_is_held_to_the_limit_as_one_is() -> None:
    sent, *_ = reader(**BOUND).read("batch", orjson.dumps(BATCH))
    assert sent.endswith(b'"max_completion_tokens":9}')
    assert orjson.loads(sent) == {**BATCH, "max_completion_tokens": 9}


def test_a_call_that_names_its_limit_keeps_it() -> None:
    calls: list[tuple[BodyKind, dict[str, Any]]] = [
        ("chat", {**CHAT, "max_tokens": 5}),
        ("chat", {**CHAT, "max_completion_tokens": 5}),
        ("batch", {**BATCH, "max_tokens": 5}),
        ("completion", {**PROMPT, "max_tokens": 5}),
        ("response", {**INPUT, "max_output_tokens": 5}),
        ("json", INPUT),
    ]
    for kind, body in calls:
        content = orjson.dumps(body)
        assert reader(**BOUND).read(kind, content)[0] == content
    unsaid = orjson.dumps({"prompt": "Hi"})  # vLLM gives 16
    for most, sent in ((15, {"prompt": "Hi", "max_tokens": 15}), (16, {"prompt": "Hi"})):
        bound = body_limits(max_new_tokens=most)
        assert orjson.loads(reader(body_limits=bound).read("completion", unsaid)[0]) == sent


def test_the_documents_name_every_change() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| .* \| `(GATEWAY_\w+)` \|$", (ROOT / "docs/api.md").read_text(), re.MULTILINE
    )
    # The last two by the call's key, which tests/sockets/test_stored_responses.py brings.
    assert set(rows) == {*EDITS, ("request_id", "GATEWAY_API_KEYS"), ("cache_salt", "GATEWAY_CACHE_SALT")}


@pytest.mark.parametrize(
    ("settings", "asked", "meant"),
    [
        ({}, "demo", "demo"),
        ({}, "adapter", "adapter"),
        ({"model": "demo-b"}, "adapter", "adapter"),
        ({"compat": "erag-1.4"}, "gpt-3.5-turbo", "demo"),
        ({"compat": "erag-1.4", "model": "demo-b"}, "gpt-3.5-turbo", "demo-b"),
        ({"compat": "erag-1.4"}, "demo-b", "demo-b"),
        ({"model_aliases": {"fast": "demo-b"}}, "fast", "demo-b"),
        ({"model_aliases": {"demo": "demo-b"}}, "demo", "demo"),
        ({"model_aliases": {"*": "demo-b"}}, "anything", "demo-b"),
        ({"model_aliases": {"*": "demo-b", "fast": "x"}}, "fast", "x"),
        ({"model_aliases": {"*": "demo-b"}, "compat": "erag-2.1"}, "anything", "demo-b"),
    ],
)
def test_the_model_is_the_one_that_was_meant_in_both_forms(settings: dict[str, Any], asked: str, meant: str) -> None:
    for body in ({"messages": "Hi.", "model": asked}, {**CHAT, "model": asked}):
        talk = Conversation(models=("demo", "demo-b"), **settings)
        talk.ask(body)
        assert orjson.loads(talk.connect().request_body)["model"] == meant
        assert talk.exchange.model == meant


def test_one_that_names_none_is_for_the_first_that_can_chat() -> None:
    talk = Conversation(upstreams=2)
    embedder, chats = talk.upstreams
    embedder.models, embedder.routes = ("embed",), frozenset({"embeddings"})
    chats.models, chats.routes = ("chat",), frozenset({"chat"})
    talk.ask({"messages": "Hi."})
    assert orjson.loads(talk.connect().request_body)["model"] == "chat"
    assert talk.transport.asked[0][0] is chats
