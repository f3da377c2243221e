"""Every call that is relayed, on both ways in: what goes on, how its streams end, and what there is not."""

from __future__ import annotations

import itertools
import json

import httpx
import orjson
import pytest

from gateway.server.openapi import describe
from gateway.wire.routes import NAMES, REFUSED, ROUTES, Route
from tests.support.fake_vllm import CLOSE, RESET, STREAM_END, STREAM_HEAD, FakeVllm, Hold, Step, chunk, response
from tests.support.gateway_process import running
from tests.support.recorders import MESSAGES, RESPONSES, Conversation

pytestmark = pytest.mark.usefixtures("way")

SPACED = b'{ "model":"demo",  "input": ["caf\\u00e9"] }'
POSTED = [route for route in ROUTES if route.body == "json"]
OLDER = {"/generate": b'{"prompt":"Hi"}', "/api/v1/ask": b'{"question":"Hi"}'}
STORED = [route for route in ROUTES if "{" in route.path]


def named(name: str, number: int = 0, **fields: object) -> bytes:
    """An event as Responses and Messages send it."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps({"type": name, **fields}) + b"\n\n"


STREAMS = {
    "/v1/responses": [
        named("response.created", response={"usage": None}, sequence_number=0),
        named("response.output_text.delta", delta="Hi", sequence_number=1),
        named(
            "response.completed",
            response={"usage": {"input_tokens": 17, "input_tokens_details": {}, "output_tokens": 2}},
            sequence_number=2,
        ),
    ],
    "/v1/messages": [
        named("message_start", message={"usage": {"input_tokens": 17, "output_tokens": 0}}),
        named("content_block_delta", delta={"type": "text_delta", "text": "Hi"}, index=0),
        named("message_delta", delta={"stop_reason": "end_turn"}, usage={"input_tokens": 17, "output_tokens": 2}),
        named("message_stop"),
    ],
}
STREAMED = b'{"model":"demo","stream":true}'


@pytest.fixture(params=list(STREAMS))
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_each_call_is_relayed_byte_for_byte_both_ways(client: httpx.Client, fake: FakeVllm) -> None:
    answer = b'{"data": [ ], "usage":{"prompt_tokens":4,"completion_tokens":0}}'
    for route in POSTED:
        fake.queue([response("200 OK", answer)])

        got = client.post(f"{route.path}?a=b", content=SPACED)

        sent = fake.received[-1]
        assert (sent.method, sent.target, sent.body) == ("POST", f"{route.path}?a=b", SPACED)
        assert sent.header("content-type") == "application/json"
        assert (got.status_code, got.content) == (200, answer)


@pytest.mark.parametrize("route", STORED, ids=lambda route: route.path)
def test_a_response_is_asked_for_by_its_id(client: httpx.Client, fake: FakeVllm, route: Route) -> None:
    fake.queue([response("200 OK", b"{}")])
    target = route.path.format(response_id="resp_91b0d8b4224395c8")

    got = client.request(route.method, f"{target}?stream=false")

    sent = fake.received[0]
    assert (sent.method, sent.target, sent.body) == (route.method, f"{target}?stream=false", b"")
    assert got.status_code == 200
    assert got.headers.get_list("x-request-id") == [sent.header("x-request-id")]


NO_IDS = [
    "..",
    "render",
    "resp_",
    "resp_%2e%2e",
    "%2e%2e",
    "a%2fb",
    "a%20b",
    "a%3fb=1",
    "a%00",
    "%c3%a9",
    "resp_" + "a" * 129,
    "a%0d%0ab",
    "%",
    "a;b",
]


def test_an_id_that_could_change_the_path_is_of_none(client: httpx.Client, fake: FakeVllm) -> None:
    for route, name in itertools.product(STORED, NO_IDS):
        target = client.base_url.copy_with(raw_path=route.path.format(response_id=name).encode())

        got = client.request(route.method, target)

        assert got.status_code in (404, 405), name
        assert got.json()["error"]["type"] in ("not_found_error", "invalid_request_error")
    assert fake.received == []


def test_a_path_with_a_line_feed_behind_it_is_none(client: httpx.Client, fake: FakeVllm) -> None:
    paths = ["/v1/models%0A", "/health%0A", "/v1/chat/completions%0A", "/v1/responses/resp_a/cancel%0A", "/metrics%0A"]
    for path, method in itertools.product(paths, ["GET", "POST"]):
        got = client.request(method, client.base_url.copy_with(raw_path=path.encode()))
        assert (got.status_code, got.json()["error"]["code"]) == (404, "path_not_found"), path
    assert fake.received == []
    assert "%0A" not in (metrics := client.get("/metrics").text)
    assert "\\n" not in metrics.split("# HELP gateway_outcomes")[0].split("gateway_requests_total{", 1)[1]


def test_no_clients_word_is_the_name_of_a_series(client: httpx.Client) -> None:
    for method in ("DELETE", "PUT"):
        assert client.request(method, "/v1/responses/junk-of-a-client").status_code == 405
    assert "junk-of-a-client" not in client.get("/metrics").text


def test_a_stored_responses_stream_has_limits_and_its_silence_is_no_fault(fake: FakeVllm) -> None:
    limits = {"first_token_timeout": 0.4, "idle_timeout": 0.3, "total_timeout": 20}
    with running(fake.url, **limits) as gateway, gateway.client() as client:
        for told, limit in ((1, b"first_token"), (2, b"idle"), (2, b"idle")):
            fake.queue([STREAM_HEAD, *map(chunk, STREAMS["/v1/responses"][:told]), Hold()])
            got = client.get("/v1/responses/resp_1?stream=true")
            assert b'"code":"%b_timeout"' % limit in got.content
        assert client.get("/ping").status_code == 200
        assert 'gateway_upstream_state{state="serving"' in client.get("/metrics").text
        assert client.get("/v1/health_check").status_code == 200


def test_other_methods_on_messages_are_refused_in_anthropics_envelope(client: httpx.Client) -> None:
    got = client.get("/v1/messages")
    assert (got.status_code, got.json()["type"]) == (405, "error")


def test_what_is_no_json_object_is_refused_here(client: httpx.Client, fake: FakeVllm) -> None:
    for route, body in itertools.product(POSTED, [b"", b"{", b"[]", b"7"]):
        got = client.post(route.path, content=body)

        assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error")
        assert got.json().get("type") == ("error" if route.ends == "messages" else None)
    assert fake.received == []


def test_a_stream_is_relayed_to_its_own_end(client: httpx.Client, fake: FakeVllm, path: str) -> None:
    fake.queue([STREAM_HEAD, *map(chunk, STREAMS[path]), STREAM_END])

    got = client.post(path, content=STREAMED)

    assert got.content == b"".join(STREAMS[path])
    metrics = client.get("/metrics").text
    assert 'gateway_tokens_total{kind="prompt",model="demo",source="reported"} 17.0' in metrics
    assert 'gateway_tokens_total{kind="completion",model="demo",source="reported"} 2.0' in metrics
    assert 'gateway_outcomes_total{outcome="done"} 1.0' in metrics


@pytest.mark.parametrize("end", ["reset", "close", "clean"])
def test_a_stream_that_breaks_ends_as_its_clients_expect(
    client: httpx.Client, fake: FakeVllm, path: str, end: str
) -> None:
    first, second, *_ = STREAMS[path]
    hold = Hold()
    steps: list[Step] = [hold, RESET] if end == "reset" else [hold, CLOSE] if end == "close" else [STREAM_END]
    fake.queue([STREAM_HEAD, chunk(first), chunk(second), *steps])

    with client.stream("POST", path, content=STREAMED) as got:
        received = b""
        for piece in got.iter_raw():
            received += piece
            if received == first + second:
                hold.release()

    name, data = received.removeprefix(first + second).removesuffix(b"\n\n").split(b"\ndata: ")
    error = json.loads(data)
    assert (name, error["type"]) == (b"event: error", "error")
    assert error["request_id"] == got.headers["x-request-id"]
    if path == "/v1/responses":
        assert (error["code"], error["sequence_number"]) == ("upstream_broken", 2)
        assert error["message"].startswith("The model server ")
    else:
        assert error["error"]["type"] == "api_error"
        assert error["error"]["message"].startswith("The model server ")


def test_an_error_that_the_model_server_tells_of_is_the_end(client: httpx.Client, fake: FakeVllm, path: str) -> None:
    told = [STREAMS[path][0], named("error", code="x", message="CUDA is gone", sequence_number=1)]
    fake.queue([STREAM_HEAD, *map(chunk, told), STREAM_END])

    got = client.post(path, content=STREAMED)

    assert got.content == b"".join(told)
    assert 'outcome="upstream_error"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_last_event_that_is_too_large_to_be_held_is_an_end_all_the_same(pieces: int) -> None:
    talk = Conversation(route=RESPONSES)
    talk.ask({"model": "demo", "stream": True})
    talk.connect()
    talk.head(200, [(b"content-type", b"text/event-stream")])
    large = named("response.completed", response={"text": "x" * 200_000, "usage": None}, sequence_number=7)
    talk.exchange.upstream_body(STREAMS["/v1/responses"][0])
    for at in range(0, len(large), len(large) // pieces + 1):
        talk.exchange.upstream_body(large[at : at + len(large) // pieces + 1])
    talk.exchange.upstream_end()
    assert talk.client.content == STREAMS["/v1/responses"][0] + large
    assert (talk.client.ending, talk.exchange.outcome) == ("end", "done")
    talk.assert_settled()


def test_anthropics_clients_read_our_errors() -> None:
    talk = Conversation(route=MESSAGES)
    talk.ask({"model": "demo"})
    talk.exchange.upstream_unreachable("nothing listens there")
    told = orjson.loads(talk.client.content)
    assert told["type"] == "error"
    assert (told["error"]["type"], told["error"]["code"]) == ("api_error", "upstream_unreachable")
    talk.assert_settled()


def test_what_is_switched_off_does_not_exist(fake: FakeVllm) -> None:
    with running(fake.url, routes="chat,models") as gateway, gateway.client() as client:
        described = client.get("/openapi.json").json()["paths"]
        for route in ROUTES:
            fake.queue([response("200 OK", b"{}")])
            body = b'{"messages":[],"model":"demo"}' if route.method == "POST" else None
            got = client.request(route.method, route.path.format(response_id="resp_1"), content=body)

            served = route.name in ("chat", "models")
            assert (got.status_code, route.path in described) == (200 if served else 404, served)


def test_what_is_refused_on_purpose_does_not_exist(client: httpx.Client, fake: FakeVllm) -> None:
    for path, method in itertools.product(REFUSED.keys() - {"/health", "/metrics", "/ping"}, ["GET", "POST"]):
        # Of one that looks like a response's own, the method is what there is not.
        assert client.request(method, path).status_code in ((404, 405) if path.startswith("/v1/responses/") else (404,))
    assert fake.received == []


def test_the_description_names_every_route_and_nothing_else(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    assert described == json.loads(json.dumps(describe(ROUTES, page=True)))
    own = {"/health", "/ping", "/v1/health_check", "/v1/statistics", "/metrics", "/openapi.json"}
    own |= {"/", "/v1/status", "/v1/status/stream", "/v1/models/{model}"}
    assert set(described["paths"]) == {route.path for route in ROUTES} | own
    tags = [
        operation["tags"][0]
        for path in described["paths"].values()
        for operation in path.values()
        if "tags" in operation
    ]
    assert tuple(dict.fromkeys(tags)) == NAMES
