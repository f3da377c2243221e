"""health_check and the probes behind it: what the upstreams say, and what is made of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from typing import Any

import httpx
import pytest

from gateway.pool.upstream_pool import Upstream, UpstreamPool
from gateway.upstream import prober
from gateway.upstream.credentials import FixedKey
from gateway.upstream.prober import Prober
from tests.support.fake_vllm import METRICS, FakeVllm, Hold, response
from tests.support.gateway_process import running
from tests.support.recorders import aliases_of

URL = "http://vllm.test:8008"
MODELS = {"data": [{"id": "demo"}, {"id": "lora"}]}
REFUSES = {"error": {"message": "System role not supported", "type": "BadRequestError", "param": None, "code": 400}}


def probed(
    answers: dict[str, httpx.Response | Exception] | None = None, *, served_before: bool = False, **options: Any
) -> tuple[Upstream, list[httpx.Request]]:
    """An upstream after one probe, healthy but for these answers, and what it was asked."""
    upstream = Upstream.from_url(URL)
    upstream.models = ("demo",) if served_before else ()
    prober_options = {
        "probe_interval": 5.0,
        "model": None,
        "system_role": "system",
        "credentials": FixedKey(),
        **options,
        "model_aliases": aliases_of(options.get("model_aliases", {})),
    }
    healthy: dict[str, httpx.Response | Exception] = {
        "/health": httpx.Response(200),
        "/v1/models": httpx.Response(200, json=MODELS),
        "/tokenize": httpx.Response(200, json={"count": 1}),
        "/v1/chat/completions": httpx.Response(405),
    }
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        found = {**healthy, **(answers or {})}[request.url.path]
        if isinstance(found, Exception):
            raise found
        return found

    async def probe() -> None:
        prober = Prober(UpstreamPool((upstream,)), transport=httpx.MockTransport(answer), **prober_options)
        async with prober.probing():
            pass

    asyncio.run(probe())
    return upstream, asked


def test_an_upstream_that_answers_everything_serves() -> None:
    upstream, asked = probed()

    assert (upstream.state, upstream.why, upstream.models) == ("serving", "", ("demo", "lora"))
    assert [request.url.path for request in asked] == ["/health", "/v1/models", "/tokenize"]


@pytest.mark.parametrize(
    ("path", "answer", "served_before", "state", "why"),
    [
        ("/health", httpx.ConnectError("connection refused"), False, "loading", "not started yet"),
        ("/health", httpx.ConnectError("connection refused"), True, "down", "it refuses connections"),
        ("/health", httpx.ConnectError("name or service not known"), False, "down", "cannot be reached"),
        ("/health", httpx.ReadTimeout("slow"), False, "down", "no answer within 5 s"),
        ("/health", httpx.RemoteProtocolError("cut"), False, "down", "broke off (RemoteProtocolError)"),
        ("/health", httpx.Response(503), False, "loading", "/health answers 503"),
        ("/health", httpx.Response(503), True, "down", "/health answers 503"),
        ("/health", httpx.Response(204), False, "loading", "/health answers 204"),
        ("/health", httpx.Response(404), False, "down", "/health answers 404"),
        ("/health", httpx.Response(401), False, "down", "/health answers 401: set GATEWAY_UPSTREAM_API_KEY to its key"),
        ("/v1/models", httpx.Response(401, json={"error": "Unauthorized"}), False, "down", "GATEWAY_UPSTREAM_API_KEY"),
        ("/v1/models", httpx.Response(500), False, "down", "/v1/models answers 500"),
        ("/v1/models", httpx.Response(200, json={"data": []}), False, "down", "no model list"),
        ("/v1/models", httpx.Response(200, text="<html>"), False, "down", "no model list"),
        ("/tokenize", httpx.Response(400, json=REFUSES), False, "down", "GATEWAY_SYSTEM_ROLE=merge"),
        ("/tokenize", httpx.Response(400, text="?"), False, "down", "status 400"),
        ("/tokenize", httpx.Response(404), False, "serving", ""),
    ],
)
def test_what_an_upstream_says_decides_its_state(
    path: str, answer: httpx.Response | Exception, served_before: bool, state: str, why: str
) -> None:
    upstream, _ = probed({path: answer}, served_before=served_before)

    assert upstream.state == state
    assert why in upstream.why
    assert bool(why) == bool(upstream.why)


@pytest.mark.parametrize(("system_role", "roles"), [("system", ["system", "user"]), ("merge", ["user"])])
def test_the_template_is_read_with_the_roles_that_calls_will_have(system_role: str, roles: list[str]) -> None:
    _, asked = probed(system_role=system_role)

    assert [message["role"] for message in json.loads(asked[-1].content)["messages"]] == roles


def test_a_template_that_refuses_even_a_user_is_down() -> None:
    upstream, _ = probed({"/tokenize": httpx.Response(400, json=REFUSES)}, system_role="merge")

    assert upstream.why == "its chat template refuses a user's message (System role not supported)"


def test_an_upstream_without_the_configured_model_is_down() -> None:
    upstream, _ = probed(model="other")

    assert upstream.state == "down"
    assert upstream.why == "it does not serve 'other' (GATEWAY_MODEL); it serves demo, lora"


@pytest.mark.parametrize("aliases", [{"rag": "lora"}, {"*": "lora"}, {"rag": "lora", "*": "x"}])
def test_the_configured_model_may_be_another_name(aliases: dict[str, str]) -> None:
    upstream, asked = probed(model="rag", model_aliases=aliases)

    assert (upstream.state, upstream.why) == ("serving", "")
    assert json.loads(asked[-1].content)["model"] == "lora"


def test_another_name_of_what_is_not_served_is_told_with_both_names() -> None:
    upstream, _ = probed(model="rag", model_aliases={"rag": "gone"})

    assert upstream.why == "it does not serve 'gone' (which GATEWAY_MODEL 'rag' stands for); it serves demo, lora"


@pytest.mark.usefixtures("way")
def test_a_gateway_whose_model_is_another_name_is_ready_as_its_calls_succeed(fake: FakeVllm) -> None:
    with running(fake.url, model="rag", model_aliases="rag=demo") as gateway, gateway.client() as client:
        ready = client.get("/v1/health_check")
        answered = client.post("/v1/chat/completions", json={"messages": "Hi.", "streaming": False})

    assert (ready.status_code, ready.json()["model"], answered.status_code) == (200, "demo", 200)


def test_health_check_tells_what_it_is_and_how_its_upstreams_are(fake: FakeVllm) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        got = client.get("/v1/health_check")

    said = got.json()
    assert got.status_code == 200
    assert said["Service Title"] == "vllm-gateway"
    assert said["Service Description"]
    (upstream,) = said["upstreams"]
    assert 0 <= upstream.pop("age") < 10  # seconds since it was asked
    assert upstream == {
        "url": fake.url,
        "state": "serving",
        "why": "",
        "models": ["demo"],
        "in_flight": 0,
        "source": fake.url,
        "prefix_hits": None,
    }


def test_what_it_had_in_its_prefix_cache_is_told_where_there_are_several(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prober, "_HITS_EVERY", 2)

    def counts(looked_for: int, found: int) -> bytes:
        more = f"vllm:prefix_cache_queries_total{{}} {looked_for}\nvllm:prefix_cache_hits_total{{}} {found}\n"
        return response("200 OK", METRICS + more.encode())

    with FakeVllm(models=("other",)) as silent, running(fake.url, silent.url, probe_interval=0.02) as gateway:
        for looked_for, found, part in ((100, 50, 0.5), (200, 125, 0.75)):
            fake.probe_answers["/metrics"] = counts(looked_for, found)
            until = time.monotonic() + 20
            with gateway.client() as client:
                while (told := client.get("/v1/health_check").json()["upstreams"])[0]["prefix_hits"] != part:
                    assert time.monotonic() < until, told
                assert told[1]["prefix_hits"] is None
                line = f'gateway_upstream_prefix_hit_ratio{{upstream="{fake.url}"}} {part}'
                assert line in client.get("/metrics").text


def test_the_template_is_read_once_a_start(fake: FakeVllm) -> None:
    with running(fake.url, probe_interval=0.05) as gateway:
        fake.wait(lambda: [probe.target for probe in fake.probed].count("/health") > 7)
        fake.probe_answers["/health"] = response("500 Internal Server Error", b"")
        gateway.becomes(503)
        fake.probe_answers["/health"] = response("200 OK", b"")
        gateway.becomes(200)

    assert [probe.target for probe in fake.probed].count("/tokenize") == 2
    assert not [request for request in fake.received if "completions" in request.target]


def test_an_upstream_whose_calls_break_is_down_until_one_succeeds(fake: FakeVllm) -> None:
    with running(fake.url, trusted_proxies="127.0.0.1") as gateway, gateway.client() as client:
        fake.queue(*[[response("500 Internal Server Error", b"{}")]] * 3)
        for caller in ("192.0.2.1", "192.0.2.2", "192.0.2.1"):
            client.post("/v1/chat/completions", json={"messages": []}, headers={"x-forwarded-for": caller})
        failing = client.get("/v1/health_check")
        client.post("/v1/chat/completions", json={"messages": []})
        back = client.get("/v1/health_check")

    assert (failing.status_code, failing.json()["upstreams"][0]["state"]) == (503, "down")
    assert "last calls broke" in failing.json()["upstreams"][0]["why"]
    assert back.status_code == 200


def test_an_upstream_that_hangs_does_not_hold_up_what_is_said_of_the_other(fake: FakeVllm) -> None:
    with FakeVllm() as other, running(fake.url, other.url, probe_interval=0.1) as gateway, gateway.client() as client:
        other.probe_answers["/health"] = b"HTTP/1.1 200 OK\r\ncontent-le"
        began = time.monotonic()
        got = client.get("/v1/health_check")
        assert time.monotonic() - began < 3
        assert (got.status_code, got.json()["status"]) == (200, "serving")
        until = time.monotonic() + 10
        while "no answer within 5 s" not in client.get("/v1/health_check").text:
            assert time.monotonic() < until


def test_a_model_list_that_is_nested_too_deeply_is_none() -> None:
    deep = httpx.Response(200, content=b"[" * 200_000 + b"]" * 200_000)
    upstream, _ = probed({"/v1/models": deep})
    assert (upstream.state, upstream.why) == ("down", "its /v1/models answers 200 and no model list")


@pytest.mark.parametrize("settings", [{"routes": "embeddings"}, {"connector": "langchain"}])
def test_a_model_that_need_not_chat_may_have_no_template(fake: FakeVllm, settings: dict[str, str]) -> None:
    fake.probe_answers["/tokenize"] = response("400 Bad Request", b'{"error":{"message":"it has no chat template"}}')
    with running(fake.url) as gateway, gateway.client() as client:
        assert client.get("/v1/health_check").status_code == 503
    with running(fake.url, **settings) as gateway, gateway.client() as client:
        assert client.get("/v1/health_check").status_code == 200


def test_a_model_that_has_no_chats_may_have_no_template() -> None:
    refused, missing = httpx.Response(400, json=REFUSES), httpx.Response(404)
    upstream, asked = probed({"/tokenize": refused, "/v1/chat/completions": missing})
    assert (upstream.state, upstream.why) == ("serving", "")
    assert [request.method for request in asked if request.url.path == "/v1/chat/completions"] == ["GET"]


def test_recordings_go_to_the_upstream_that_hears(fake: FakeVllm) -> None:
    with FakeVllm(models=("ear",)) as ear:
        ear.probe_answers["/v1/audio/transcriptions"] = response("405 Method Not Allowed", b"")
        ear.probe_answers["/tokenize"] = response("400 Bad Request", b"{}")
        ear.probe_answers["/v1/chat/completions"] = response("404 Not Found", b"")
        with running(fake.url, ear.url) as gateway, gateway.client() as client:
            assert client.get("/v1/health_check").json()["status"] == "serving"
            for _ in range(4):
                client.post("/v1/audio/transcriptions", files={"file": b"sound"})
            client.post("/v1/chat/completions", json={"model": "demo", "messages": []})
            metrics = client.get("/metrics").text
    assert [one.target for one in ear.received] == ["/v1/audio/transcriptions"] * 4
    assert [one.target for one in fake.received] == ["/v1/chat/completions"]
    assert 'model="ear",route="/v1/audio/transcriptions",status="200"' in metrics


def test_recordings_are_shared_by_all_that_hear_whatever_their_models(fake: FakeVllm) -> None:
    with FakeVllm(models=("ear-a",)) as one, FakeVllm(models=("ear-b",)) as other:
        for ear in (one, other):
            ear.probe_answers["/v1/audio/transcriptions"] = response("405 Method Not Allowed", b"")
        with running(fake.url, one.url, other.url) as gateway, gateway.client() as client:
            for _ in range(4):
                assert client.post("/v1/audio/transcriptions", files={"file": b"sound"}).status_code == 200
    assert (len(one.received), len(other.received), len(fake.received)) == (2, 2, 0)


def test_ping_says_serving_loading_or_down(fake: FakeVllm) -> None:
    with running(fake.url, probe_interval=0.05) as gateway, gateway.client() as client:
        serving = client.get("/ping")
        fake.probe_answers["/health"] = response("500 Internal Server Error", b"")
        down = gateway.becomes(503, "/ping")
    with running("http://127.0.0.1:9") as gateway, gateway.client() as client:
        loading = client.get("/ping")

    assert (serving.status_code, serving.json()) == (200, {"status": "healthy"})
    assert (down.status_code, down.json()) == (503, {"status": "unhealthy"})
    assert (loading.status_code, loading.content) == (204, b"")


def test_health_lives_without_any_upstream() -> None:
    with running("http://127.0.0.1:9") as gateway, gateway.client() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/health_check").status_code == 503


def test_metrics_count_requests_by_route_form_model_and_status(fake: FakeVllm) -> None:
    hold = Hold()
    fake.queue([hold, response("200 OK", b"{}")])
    with running(fake.url) as gateway, gateway.client() as client:
        hold.release()
        client.post("/v1/chat/completions", json={"messages": [], "model": "made-up"})
        client.post("/v1/chat/completions", json={"messages": "Hi", "model": "demo"})
        client.get("/nope")
        text = client.get("/metrics").text

    assert 'gateway_requests_total{form="openai",model="unknown",route="/v1/chat/completions",status="200"} 1.0' in text
    assert (
        'gateway_requests_total{form="simplified",model="demo",route="/v1/chat/completions",status="200"} 1.0' in text
    )
    assert 'gateway_requests_total{form="none",model="none",route="unknown",status="404"} 1.0' in text
    assert 'gateway_tokens_total{kind="completion",model="demo",source="reported"} 4.0' in text
    assert 'gateway_first_token_seconds_count{model="demo"} 1.0' in text
    assert 'gateway_output_event_seconds_count{model="demo"} 1.0' in text
    assert 'gateway_added_seconds_count{model="unknown"} 1.0' in text
    assert "\nprocess_resident_memory_bytes " in text
    assert f'gateway_upstream_state{{state="serving",upstream="{fake.url}"}} 1.0' in text
    assert "vllm:" not in text
    assert "nope" not in text
    assert "made-up" not in text


def test_a_health_check_asks_nobody_and_says_how_old_it_is(fake: FakeVllm) -> None:
    with running(fake.url, probe_interval=60) as gateway, gateway.client() as client:
        asked = len(fake.probed)
        ages = [client.get("/v1/health_check").json()["upstreams"][0]["age"] for _ in range(20)]
        assert (len(fake.probed), ages) == (asked, sorted(ages))


def test_an_upstream_whose_call_breaks_is_asked_at_once(fake: FakeVllm) -> None:
    with running(fake.url, probe_interval=60) as gateway, gateway.client() as client:
        fake.probe_answers["/health"] = response("503 Service Unavailable", b"")
        fake.queue([response("500 Internal Server Error", b"{}")])
        client.post("/v1/chat/completions", json={"messages": []})
        down = gateway.becomes(503)
    assert down.json()["upstreams"][0]["why"] == "its /health answers 503"


def test_what_a_probe_gets_compressed_is_not_decompressed(fake: FakeVllm) -> None:
    large = gzip.compress(b'{"data":[]}' + b" " * 10_000_000)
    fake.probe_answers["/v1/models"] = response("200 OK", large, "content-encoding: gzip")
    with running(fake.url) as gateway, gateway.client() as client:
        (upstream,) = client.get("/v1/health_check").json()["upstreams"]
    assert upstream["why"] == "its /v1/models answers 200 and no model list"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("path", ["/tokenize", "/v1/models"])
def test_what_no_text_can_hold_is_told_of(fake: FakeVllm, path: str) -> None:
    if path == "/tokenize":
        fake.probe_answers[path] = response("400 Bad Request", b'{"error":{"message":"\\ud800"}}')
    else:
        fake.probe_answers[path] = response("200 OK", b'{"data":[{"id":"\\ud800"}]}')
    with running(fake.url) as gateway, gateway.client() as client:
        got = client.get("/v1/health_check")
    assert got.status_code == 503
    assert got.json()["upstreams"][0]["why"]


@pytest.mark.usefixtures("way")
def test_a_health_check_that_fails_says_so(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        monkeypatch.setattr(Prober, "report", lambda *_: 1 / 0)
        got = client.get("/v1/health_check")
        (line,) = gateway.log(1)
    assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    assert got.headers["x-request-id"] == got.json()["error"]["request_id"] == line["request_id"]


def test_probes_take_a_connection_that_calls_take_too(fake: FakeVllm) -> None:
    with running(fake.url, probe_interval=0.05) as gateway, gateway.client() as client:
        fake.wait(lambda: len(fake.probed) > 20)
        client.post("/v1/chat/completions", json={"messages": []})
        fake.wait(lambda: len(fake.probed) > 30)
    assert fake.connections <= 2  # a probe and a call may want one at the same time


def test_a_connection_that_the_upstream_has_closed_is_no_fault(fake: FakeVllm) -> None:
    fake.probe_answers["/health"] = response("200 OK", b"", "connection: close")
    with running(fake.url, probe_interval=0.05) as gateway, gateway.client() as client:
        fake.wait(lambda: len(fake.probed) > 20)
        assert client.get("/v1/health_check").json()["upstreams"][0]["why"] == ""


def test_the_model_list_is_read_with_some_probes_alone(fake: FakeVllm) -> None:
    with running(fake.url, probe_interval=0.02):
        fake.wait(lambda: len(fake.probed) > 60)
    asked = [probe.target for probe in fake.probed]
    assert asked.count("/health") > 3 * asked.count("/v1/models")
