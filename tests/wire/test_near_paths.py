"""The path that was nearly meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.near_paths import NearPaths
from gateway.wire.routes import REFUSED, ROUTES

SERVED = [*dict.fromkeys(route.path for route in ROUTES), "/", "/health", "/v1/health_check", "/ping", "/metrics"]
NEAR = NearPaths(SERVED)
CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("/chat/completions", CHAT),
        ("/v1/v1/chat/completions", CHAT),
        ("/v1/v1/v1/chat/completions", CHAT),
        ("/v1/chat/completions/", CHAT),
        ("//v1/chat/completions", CHAT),
        ("/v1//chat/completions", CHAT),
        ("/V1/Chat/Completions", CHAT),
        ("/api/chat/completions", CHAT),
        ("/openai/v1/chat/completions", CHAT),
        ("/openai/deployments/gpt-4o/chat/completions", CHAT),
        ("/v2/chat/completions", CHAT),
        ("/v1/chat/completion", CHAT),
        ("/chat/completion", CHAT),
        ("/v1/chat/compeltions", None),
        ("/completions", "/v1/completions"),
        ("/v1/completion", "/v1/completions"),
        ("/v1/embedding", "/v1/embeddings"),
        ("/embeddings", "/v1/embeddings"),
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/messages", "/v1/messages"),
        ("/v1/v1/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/v1/messages/count-tokens", "/v1/messages/count_tokens"),
        ("/responses/resp_1a-B", "/v1/responses/{response_id}"),
        ("/v1/responses/resp_1/cancel/", "/v1/responses/{response_id}/cancel"),
        ("/rerank/", "/rerank"),
        ("/v2/rerank/", "/v2/rerank"),
        ("/v3/rerank", "/rerank"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/health", "/health"),
        ("/health_check", "/v1/health_check"),
        ("/metric", "/metrics"),
        ("/api/v1/ask/", "/api/v1/ask"),
        ("/nope", None),
        ("/v1", None),
        ("/v1/", None),
        ("", None),
        ("//", None),
        ("/" + "a" * 5000, None),
        (f"/{'x/' * 100}v1/chat/completions", None),
    ],
)
def test_what_was_meant(asked: str, meant: str | None) -> None:
    assert NEAR.nearest(asked) == meant


def test_what_is_served_is_near_to_nothing_else() -> None:
    assert [NEAR.nearest(path) for path in SERVED if path != "/"] == [path for path in SERVED if path != "/"]


def test_only_what_is_served_is_named() -> None:
    assert NearPaths(["/v1/models"]).nearest("/chat/completions") is None


def test_what_stays_on_vllm_is_not_taken_for_something_else() -> None:
    others = {path: NEAR.nearest(path) for path in REFUSED if path not in SERVED}
    assert {path: meant for path, meant in others.items() if meant} == {"/inference/v1/generate": "/generate"}


@given(st.text("/v1aet_-%\n", max_size=40) | st.text(max_size=300))
def test_any_text_is_near_to_what_is_served_or_to_nothing(path: str) -> None:
    assert NEAR.nearest(path) in {None, *SERVED}
