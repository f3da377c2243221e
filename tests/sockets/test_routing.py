"""Several upstreams, and which of them takes a prompt, on both ways in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.support.fake_vllm import FakeVllm, response
from tests.support.gateway_process import running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
# So many that one of three has none once in millions of tries: where they go depends on the ports.
SALTS = [str(number) for number in range(40)]


@pytest.fixture
def three() -> Iterator[list[FakeVllm]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FakeVllm()) for _ in range(3)]


def document(number: int) -> str:
    return f"Document {number} says what it says. " * 40


def ask(client: httpx.Client, text: str, **more: object) -> None:
    messages = [{"role": "user", "content": text}]
    assert client.post(CHAT, json={"model": "demo", **more, "messages": messages}).status_code == 200


def takers(three: list[FakeVllm], beginning: str) -> list[int]:
    """Which of these had a prompt that begins so."""
    return [at for at, one in enumerate(three) if any(beginning.encode() in got.body for got in one.received)]


def test_prompts_that_begin_alike_go_to_one_upstream_of_any_gateway(three: list[FakeVllm]) -> None:
    urls = [one.url for one in three]
    with running(*urls) as first, running(*urls[::-1]) as second:
        for gateway in (first, second):
            with gateway.client() as client:
                for number in range(25):
                    for question in ("What?", "Why?"):
                        ask(client, document(number) + question)
                    simplified = {"messages": {"user": document(number + 50)}, "streaming": False}
                    assert client.post(CHAT, json={"temperature": 0.5, **simplified}).status_code == 200
                    assert client.post(CHAT, json={**simplified, "model": "demo"}).status_code == 200
                told = client.get("/metrics").text
            assert 'gateway_routed_total{how="first"} 100.0' in told
    homes = [takers(three, f"Document {number} ") for number in (*range(25), *range(50, 75))]
    assert all(len(home) == 1 for home in homes)
    assert len({home[0] for home in homes}) == 3


@pytest.mark.parametrize("settings", [{"routing": "least"}, {}])
def test_least_is_for_those_who_ask_for_it_and_for_what_generates_nothing(
    three: list[FakeVllm], settings: dict[str, str]
) -> None:
    for one in three:
        one.queue(*[[response("200 OK", b"{}")]] * 6)
    with running(*[one.url for one in three], **settings) as gateway, gateway.client() as client:
        for _ in range(6):
            if settings:
                ask(client, document(0))
            else:
                client.post("/v1/embeddings", json={"model": "demo", "input": document(0)})
        assert 'gateway_routed_total{how="least"} 6.0' in client.get("/metrics").text
    assert Counter(len(one.received) for one in three) == {2: 3}


def test_a_salt_is_part_of_where_a_prompt_goes(three: list[FakeVllm]) -> None:
    with running(*[one.url for one in three]) as gateway, gateway.client() as client:
        for salt in SALTS:
            for _ in range(2):
                ask(client, document(0), cache_salt=salt)
    assert takers(three, document(0)) == [0, 1, 2]
    for salt in SALTS:
        assert len(takers(three, f'"cache_salt":"{salt}"')) == 1


def test_one_that_is_gone_has_its_prompts_answered_elsewhere(three: list[FakeVllm]) -> None:
    urls = [one.url for one in three]
    with running(*urls, probe_interval=0.1) as gateway, gateway.client() as client:
        for number in range(12):
            ask(client, document(number))
        homes = [takers(three, f"Document {number} ")[0] for number in range(12)]
        three[0].probe_answers["/health"] = response("503 Service Unavailable", b"")
        while client.get("/v1/status").json()["upstreams"][0]["state"] == "serving":
            pass
        for one in three:
            one.received.clear()
        for number in range(12):
            ask(client, document(number))
    moved = [takers(three, f"Document {number} ")[0] for number in range(12)]
    assert all(after != 0 for after in moved)
    assert all(after == before for before, after in zip(homes, moved, strict=True) if before != 0)


def test_answers_say_who_gave_them_where_that_is_asked_for(three: list[FakeVllm]) -> None:
    urls = [one.url for one in three[:2]]
    three[0].queue([response("200 OK", b"{}", "x-gateway-upstream: inner", "x-gateway-model: inner")])
    with running(three[0].url) as gateway, gateway.client() as client:
        answer = client.post(CHAT, json={"model": "demo", "messages": [{"role": "user", "content": "Hi"}]})
        assert not [name for name in answer.headers if name.startswith("x-gateway-")]
    told = []
    for given in (urls, urls[::-1]):
        with (
            running(*given, route_headers=True, model_aliases="a=demo") as gateway,
            gateway.client() as client,
        ):
            for stream in (False, True):
                call = {"model": "demo", "stream": stream, "messages": [{"role": "user", "content": document(0)}]}
                told.append(client.post(CHAT, json=call).headers)
            refused = client.post(CHAT, json={"messages": 5})
            named = client.post(CHAT, json={"model": "no\r\nSuch: x", "messages": []})
            listed = client.get("/v1/models")
    (name,) = {headers["x-gateway-upstream"] for headers in told}
    assert (len(name), {headers["x-gateway-model"] for headers in told}) == (8, {"demo"})
    assert refused.status_code == 400
    assert "x-gateway-upstream" not in {*refused.headers, *listed.headers}
    assert named.headers["x-gateway-model"] == "no%0D%0ASuch:%20x"
