"""Models that chat, embed and rerank behind one port, each a real vLLM with the demo model.

Not among the tests that `make test` finds; `make test-restarts` runs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.heavy.restarts import Vllm
from tests.support.gateway_process import running

CHAT = "/v1/chat/completions"
POOLING = ("--runner", "pooling", "--convert", "embed")


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Vllm]]:
    servers = [
        Vllm(tmp_path_factory.mktemp("rerank"), *POOLING, name="rerank"),
        Vllm(tmp_path_factory.mktemp("embed"), *POOLING, name="embed"),
        Vllm(tmp_path_factory.mktemp("chat")),
    ]
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        started = [pool.submit(stack.enter_context, server.running()) for server in servers]
        for one in started:
            one.result()
        yield servers


@pytest.mark.usefixtures("way")
def test_each_call_goes_to_the_model_that_it_is_for(trio: list[Vllm]) -> None:
    with running(*(server.url for server in trio)) as gateway, gateway.client(timeout=60) as client:
        answer = client.post(CHAT, json={"messages": "What is vLLM?", "streaming": False}).json()
        assert (answer["model"], answer["text"][:4]) == ("demo-model", "vLLM")
        vector = client.post("/v1/embeddings", json={"model": "embed", "input": "What is vLLM?"}).json()
        assert (vector["model"], len(vector["data"])) == ("embed", 1)
        ranked = client.post("/rerank", json={"model": "rerank", "query": "vLLM", "documents": ["a", "vLLM"]}).json()
        assert (ranked["model"], len(ranked["results"])) == ("rerank", 2)

        for path, body in (("/v1/embeddings", {"input": "Hi"}), ("/rerank", {"query": "Hi", "documents": ["Hi"]})):
            got = client.post(path, json={"model": "demo-model", **body})
            assert got.status_code == 404
            assert got.json()["error"]["message"] == (
                f"The model 'demo-model' does not take {path}; those that do: rerank, embed."
            )


def test_the_health_check_means_the_model_that_chats_or_the_one_that_is_named(trio: list[Vllm]) -> None:
    reranks, embeds, chats = (server.url for server in trio)
    with running(reranks, embeds) as gateway, gateway.client() as client:
        assert health(client) == (200, "rerank")  # none can chat
    with running(embeds, "http://127.0.0.1:9", chats) as gateway, gateway.client() as client:
        assert health(client) == (200, "demo-model")
        assert health(client, "embed") == (200, "embed")
        assert health(client, "none") == (503, "none")
    with running(embeds, chats, model="demo-model") as gateway, gateway.client() as client:
        assert health(client) == (200, "demo-model")
        assert {one["state"] for one in client.get("/v1/health_check").json()["upstreams"]} == {"serving"}


def health(client: httpx.Client, model: str | None = None) -> tuple[int, str]:
    got = client.get("/v1/health_check", params={} if model is None else {"model": model})
    return got.status_code, got.json()["model"]
