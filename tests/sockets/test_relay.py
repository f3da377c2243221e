"""The data path on real sockets: what goes through, byte for byte, and what ends a call."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import re
import socket

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.observability.own_version import own_build
from tests.support import fake_vllm
from tests.support.fake_vllm import (
    CLOSE,
    DONE,
    EVENTS,
    RESET,
    STREAM_END,
    STREAM_HEAD,
    FakeVllm,
    Hold,
    Step,
    chunk,
    response,
)
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
OPENAI = b'{ "messages": [{"role":"user","content":"caf\\u00e9"}],  "model":"demo" }'
OPENAI_STREAM = b'{"messages": [{"role":"user","content":"Hi"}],"stream":true}'
SIMPLIFIED = {"messages": {"system": "Be brief.", "user": "Hi"}}
BOTH_WHOLE = [OPENAI, b'{"messages":{"user":"Hi"},"streaming":false}']


def post(gateway: Gateway, body: bytes) -> socket.socket:
    """A request whose answer is read by hand."""
    connection = gateway.connect()
    connection.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)) + body)
    return connection


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_an_openai_call_is_relayed_byte_for_byte_both_ways(client: httpx.Client, fake: FakeVllm, path: str) -> None:
    answer = b'{"choices": [ ] , "x":"\xc3\xa9"}'
    fake.queue([response("200 OK", answer, "vary: Origin", "x-two: 1", "x-two: 2")])

    got = client.post(f"{path}?a=b%20c", content=OPENAI, headers={"content-type": "application/json; charset=utf-8"})

    sent = fake.received[0]
    assert (sent.method, sent.target, sent.body) == ("POST", f"{path}?a=b%20c", OPENAI)
    assert sent.header("content-type") == "application/json; charset=utf-8"
    assert (got.status_code, got.content) == (200, answer)
    assert got.headers.get_list("x-two") == ["1", "2"]
    assert got.headers["vary"] == "Origin"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_a_long_call_is_relayed_by_what_is_around_its_texts(client: httpx.Client, fake: FakeVllm, path: str) -> None:
    text = "Er sagt: \u201eGrüße\u201c.\n" * 2000
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 30_000}}
    messages = [{"role": "user", "content": text}, {"role": "user", "content": [image, {"type": "text", "text": "x"}]}]
    body = json.dumps({"model": "demo-model", "prompt": text, "input": text, "messages": messages}).encode()
    assert client.post(path, content=body).status_code == 200
    assert fake.received[-1].body == body


def test_a_long_call_is_refused_for_the_same_as_a_short_one(client: httpx.Client, fake: FakeVllm) -> None:
    long = "word " * 7000
    url = {"type": "image_url", "image_url": {"url": f"http://evil.example/{long.replace(' ', '')}"}}
    named = {"type": "image_url", long + "url": "http://evil.example/"}
    for body, said in (
        ({"messages": long, "n": 10**9}, "n must be at most"),
        ({"messages": [{"role": "user", "content": [url, long]}]}, "its host is 'evil.example'"),
        ({"messages": [{"role": "user", "content": [named, long]}]}, "its host is 'evil.example'"),
        ({"messages": {"user": 5}, "x": long}, "messages.user"),
        ({"messages": 5, "x": long}, "messages must be"),
    ):
        got = client.post("/v1/chat/completions", json=body)
        assert got.status_code == 400, body
        assert said in got.json()["error"]["message"]
    got = client.post("/v1/chat/completions", content=b'{"messages":[{"content":"%b"},]}' % long.encode())
    assert "is not valid JSON" in got.json()["error"]["message"]
    assert fake.received == []


def test_a_stream_is_relayed_byte_for_byte(client: httpx.Client, fake: FakeVllm) -> None:
    got = client.post(CHAT, content=OPENAI_STREAM)

    assert got.content == b"".join(EVENTS)
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, len(b"".join(EVENTS))), max_size=12))
def test_any_split_of_the_upstreams_bytes_gives_the_same_bytes(
    client: httpx.Client, fake: FakeVllm, cuts: list[int]
) -> None:
    whole = b"".join(EVENTS)
    edges = sorted({0, len(whole), *cuts})
    pieces = [whole[a:b] for a, b in itertools.pairwise(edges)]
    fake.queue([STREAM_HEAD, *map(chunk, pieces), STREAM_END])

    assert client.post(CHAT, content=OPENAI_STREAM).content == whole


def test_each_event_arrives_as_soon_as_it_is_sent(client: httpx.Client, fake: FakeVllm) -> None:
    holds = [Hold() for _ in EVENTS]
    script: list[Step] = [STREAM_HEAD]
    for hold, event in zip(holds, EVENTS, strict=True):
        script += [hold, chunk(event)]
    fake.queue([*script, STREAM_END])

    for hold in holds[:1]:
        hold.release()
    with client.stream("POST", CHAT, content=OPENAI_STREAM) as got:
        pieces = got.iter_raw()
        for event, following in zip(EVENTS, [*holds[1:], Hold()], strict=True):
            assert next(pieces) == event
            following.release()


def test_models_are_relayed(client: httpx.Client) -> None:
    got = client.get("/v1/models")

    assert [model["id"] for model in got.json()["data"]] == ["demo"]
    assert client.head("/v1/models").status_code == 200


def test_neither_hop_by_hop_headers_nor_the_clients_secrets_go_upstream(client: httpx.Client, fake: FakeVllm) -> None:
    secret = {"authorization": "Bearer sk-1", "cookie": "a=b", "proxy-authorization": "Basic x", "proxy-mine": "y"}
    hops = {"connection": "keep-alive, x-mine", "x-mine": "1", "te": "trailers", "keep-alive": "timeout=5"}

    # More than one, and in this order.
    trace = [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("tracestate", "a=1,b=\t2")]
    trace += [("tracestate", "c=3"), ("baggage", "k=v;p")]

    client.post(CHAT, content=OPENAI, headers=[*secret.items(), *hops.items(), *trace])

    sent = fake.received[0]
    assert [name for name in (*secret, *hops) if sent.header(name)] == []
    assert [header for header in sent.headers if header in trace] == trace
    assert sent.header("host") == f"127.0.0.1:{fake.port}"


def test_hop_by_hop_headers_of_an_answer_do_not_reach_the_client(client: httpx.Client, fake: FakeVllm) -> None:
    hops = ["Connection: keep-alive, X-Mine", "x-mine: 1", "Keep-Alive: timeout=5", "Proxy-Authenticate: Basic"]
    hops += ["Proxy-Connection: keep-alive", "Trailer: x", "TE: trailers", "Upgrade: h2c"]
    for stream in (False, True):
        body = b"{}" if not stream else b"".join(EVENTS)
        kind = "text/event-stream" if stream else "application/json"
        fake.queue([response("200 OK", body, *hops, "x-kept: 1", kind=kind)])

        got = client.post(CHAT, content=OPENAI)

        assert got.content == body
        assert got.headers["x-kept"] == "1"
        assert {one.partition(":")[0].lower() for one in hops} & set(got.headers) == set()


def test_the_upstreams_key_is_ours(fake: FakeVllm) -> None:
    with running(fake.url, upstream_api_key="k-1") as gateway, gateway.client() as client:
        client.post(CHAT, content=OPENAI, headers={"authorization": "Bearer theirs"})

    assert fake.received[0].header("authorization") == "Bearer k-1"
    assert {probe.header("authorization") for probe in fake.probed} == {"Bearer k-1"}


@pytest.mark.parametrize("given_id", ["req-1.a:b/c+d=@_", "a" * 128])
def test_a_sane_request_id_is_kept_and_another_goes_upstream(gateway: Gateway, fake: FakeVllm, given_id: str) -> None:
    with gateway.client() as client:
        answers = [client.post(CHAT, content=OPENAI, headers={"x-request-id": given_id}) for _ in range(2)]

    for got in answers:
        assert got.headers.get_list("x-request-id") == [given_id]
    sent = [received.header("x-request-id") or "" for received in fake.received]
    assert len(set(sent)) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in sent)
    lines = gateway.log(2)
    assert [line["request_id"] for line in lines] == [given_id] * 2
    assert [line["upstream_request_id"] for line in lines] == sent


# What vLLM 0.32 reads of a request's head, Amazon's containers of it, and the proxies that Kubernetes puts before it.
OBEYED = [
    ("X-data-parallel-rank", "1"),
    ("X-Vllm-Priority", "-9"),
    ("X-Session-ID", "theirs"),
    ("endpoint-load-metrics-format", "JSON"),
    ("X-Amzn-SageMaker-Session-Id", "theirs"),
    ("X-Amzn-SageMaker-Adapter-Identifier", "theirs"),
    ("x-data-parallel-host-port", "10.0.0.1:80"),
    ("x-prefiller-host-port", "10.0.0.1:80"),
    ("x-encoder-hosts-ports", "10.0.0.1:80"),
    ("x-gateway-destination-endpoint", "10.0.0.1:80"),
    ("x-vllm-whatever-comes", "1"),
]


def test_a_recording_is_not_called_upstream_as_its_client_says(client: httpx.Client, fake: FakeVllm) -> None:
    """vLLM ends what it hears by that name once its client leaves, whoever else calls theirs so."""
    for _ in range(2):
        client.post("/v1/audio/transcriptions", files={"file": b"sound"}, headers=[("x-request-id", "theirs"), *OBEYED])
    first, second = fake.received
    assert len({first.header("x-request-id"), second.header("x-request-id"), "theirs"}) == 3
    assert [name for name, _ in OBEYED if first.header(name.lower()) is not None] == []


@pytest.mark.parametrize("content", [OPENAI, BOTH_WHOLE[1]])
def test_no_header_that_vllm_obeys_goes_upstream(client: httpx.Client, fake: FakeVllm, content: bytes) -> None:
    client.post(CHAT, content=content, headers=[*OBEYED, ("x-kept", "1")])
    sent = fake.received[0]
    assert [name for name, _ in OBEYED if sent.header(name.lower()) is not None] == []
    assert sent.header("x-kept") == "1"


def test_a_header_that_vllm_obeys_goes_upstream_where_a_setting_names_it(fake: FakeVllm) -> None:
    with running(fake.url, forwarded_headers="X-Session-ID,X-Vllm-Priority") as gateway, gateway.client() as client:
        client.post(CHAT, content=OPENAI, headers=[*OBEYED, ("x-request-id", "theirs")])
    sent = fake.received[0]
    passed = [(name, value) for name, value in OBEYED if sent.header(name.lower()) == value]
    assert passed == [("X-Vllm-Priority", "-9"), ("X-Session-ID", "theirs")]
    assert sent.header("x-request-id") != "theirs"


@pytest.mark.parametrize("given_id", ["a" * 129, 'a"b', "a b", "\u00e9", ""])
def test_any_other_request_id_is_replaced(client: httpx.Client, fake: FakeVllm, given_id: str) -> None:
    got = client.post(CHAT, content=OPENAI, headers={b"x-request-id": given_id.encode()})

    made = got.headers["x-request-id"]
    assert len(made) == 32
    assert fake.received[0].header("x-request-id") == made


def test_connections_are_reused(fake: FakeVllm) -> None:
    with running(fake.url, probe_interval=60) as gateway, gateway.client() as client:
        for _ in range(3):
            client.post(CHAT, content=OPENAI)

    assert len({request.connection for request in fake.received}) == 1


def test_a_request_on_a_connection_that_was_closing_is_sent_once_more(fake: FakeVllm) -> None:
    with running(fake.url, probe_interval=60) as gateway, gateway.client() as client:
        client.post(CHAT, content=OPENAI)
        fake.queue([CLOSE])

        got = client.post(CHAT, content=OPENAI)

    assert got.status_code == 200
    assert [request.connection for request in fake.received[1:]] == [
        fake.received[0].connection,
        fake.received[2].connection,
    ]


def test_a_request_on_a_new_connection_is_never_sent_again(fake: FakeVllm) -> None:
    fake.queue([CLOSE])
    fake.close_after_probes()

    with running(fake.url) as gateway, gateway.client() as client:
        got = client.post(CHAT, content=OPENAI)

    assert got.status_code == 502
    assert got.json()["error"]["code"] == "upstream_broken"
    assert len(fake.received) == 1


def test_an_upstream_that_dies_in_mid_stream_ends_it_with_an_error_event(gateway: Gateway, fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, chunk(EVENTS[0]), chunk(EVENTS[1] + EVENTS[2][:20]), RESET])

    with gateway.client() as client:
        got = client.post(CHAT, content=OPENAI_STREAM, headers={"x-request-id": "r-1"})

    relayed, error, done, nothing = got.text.rsplit("\n\n", 3)
    assert relayed.encode() == (EVENTS[0] + EVENTS[1]).rstrip()
    assert '"code":"upstream_broken"' in error
    assert '"request_id":"r-1"' in error
    assert (done, nothing) == ("data: [DONE]", "")
    assert gateway.log(1)[0]["outcome"] == "upstream_error"


def test_a_stream_without_its_end_gets_an_error_event(client: httpx.Client, fake: FakeVllm) -> None:
    fake.queue([STREAM_HEAD, *map(chunk, EVENTS[:3]), STREAM_END])

    got = client.post(CHAT, content=OPENAI_STREAM)

    assert got.content.startswith(b"".join(EVENTS[:3]))
    assert b'"code":"upstream_broken"' in got.content
    assert got.content.endswith(DONE)


def test_an_upstream_that_dies_in_a_whole_answer_cuts_the_connection(client: httpx.Client, fake: FakeVllm) -> None:
    fake.queue([response("200 OK", b'{"choices": []}')[:-5], RESET])

    with pytest.raises(httpx.RemoteProtocolError):
        client.post(CHAT, content=OPENAI)


def test_an_upstream_that_dies_in_a_whole_answer_to_a_simplified_call_is_a_502(
    client: httpx.Client, fake: FakeVllm
) -> None:
    fake.queue([response("200 OK", b'{"choices": []}')[:-5], RESET])

    assert client.post(CHAT, json={**SIMPLIFIED, "streaming": False}).status_code == 502


@pytest.mark.parametrize("body", BOTH_WHOLE)
@pytest.mark.parametrize("status", ["400 Bad Request", "429 Too Many Requests", "500 Internal Server Error", "503 X"])
def test_the_upstreams_own_errors_arrive_as_it_wrote_them(
    client: httpx.Client, fake: FakeVllm, status: str, body: bytes
) -> None:
    said = b'{"error":{"message":"temperature must be \xc3\xa9","type":"BadRequestError","param":"t","code":400}}'
    fake.queue([response(status, said, "retry-after: 7")])

    got = client.post(CHAT, content=body)

    assert (got.status_code, got.content, got.headers["retry-after"]) == (int(status[:3]), said, "7")
    assert len(fake.received) == 1


def test_an_upstream_that_is_not_up_yet_is_a_503_and_works_once_it_is() -> None:
    with FakeVllm() as fake:
        port = fake.port
    with running(f"http://127.0.0.1:{port}") as gateway, gateway.client() as client:
        before = [client.post(CHAT, content=body) for body in (OPENAI, b'{"messages":"Hi"}')]
        health = client.get("/v1/health_check")
        with FakeVllm(port):
            gateway.becomes(200)
            after = [client.post(CHAT, content=body) for body in (OPENAI, b'{"messages":"Hi"}')]
        gone = client.post(CHAT, content=OPENAI)
        health_gone = gateway.becomes(503)
        with FakeVllm(port):
            back = client.post(CHAT, content=OPENAI)

    assert [got.status_code for got in before] == [503, 503]
    assert all(int(got.headers["retry-after"]) > 0 for got in before)
    assert (health.status_code, health.json()["upstreams"][0]["state"]) == (503, "loading")
    assert [got.status_code for got in after] == [200, 200]
    assert gone.status_code == 502
    assert (health_gone.status_code, health_gone.json()["upstreams"][0]["state"]) == (503, "down")
    assert back.status_code == 200


@pytest.mark.parametrize(
    ("limit", "script", "code"),
    [
        ({"first_token_timeout": 0.2}, [Hold()], "first_token_timeout"),
        ({"first_token_timeout": 0.2}, [STREAM_HEAD, Hold()], "first_token_timeout"),
        ({"idle_timeout": 0.2}, [STREAM_HEAD, chunk(EVENTS[0]), Hold()], "idle_timeout"),
        ({"total_timeout": 0.2}, [Hold()], "total_timeout"),
    ],
)
def test_each_time_limit_has_its_own_answer(
    fake: FakeVllm, limit: dict[str, float], script: list[Step], code: str
) -> None:
    fake.queue(script)

    with running(fake.url, **limit) as gateway, gateway.client() as client:
        got = client.post(CHAT, content=OPENAI_STREAM)
        line = gateway.log(1)[0]

    assert fake.received[0].closed.wait(5)
    assert f'"code":"{code}"' in got.text
    assert got.status_code == (200 if code == "idle_timeout" else 504)
    # Or OpenAI's and Anthropic's clients would call again, twice, and wait as long for each.
    assert got.headers.get("x-should-retry") == (None if code == "idle_timeout" else "false")
    assert line["outcome"] == f"timeout:{code.removesuffix('_timeout')}"


def test_an_upstream_that_takes_no_connection_is_a_504() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(address)
        with running(f"http://127.0.0.1:{address[1]}", connect_timeout=0.3) as gateway, gateway.client() as client:
            got = client.post(CHAT, content=OPENAI)
        for one in waiting:
            one.close()

    assert (got.status_code, got.json()["error"]["code"]) == (504, "connect_timeout")
    assert got.headers["x-should-retry"] == "true"


def test_a_slow_reader_pauses_the_upstream_and_loses_nothing(gateway: Gateway, fake: FakeVllm) -> None:
    event = fake_vllm.event({"content": "x" * 60_000})
    hold = Hold()
    fake.queue([STREAM_HEAD, *[chunk(event)] * 800, hold, chunk(DONE), STREAM_END])
    connection = post(gateway, OPENAI_STREAM)
    request = fake.wait_for_request()

    assert not hold.reached.wait(1), "48 MB were taken from the upstream for a client that read none"
    hold.release()
    got = b""
    while not got.endswith(b"0\r\n\r\n"):
        got += connection.recv(1 << 20)
    connection.close()

    assert got.count(event.strip()) == 800
    assert not request.closed.is_set()


def test_calls_are_shared_and_an_upstream_that_refuses_is_not_felt(fake: FakeVllm) -> None:
    with contextlib.ExitStack() as others:
        other = others.enter_context(FakeVllm())
        with running(fake.url, other.url) as gateway, gateway.client() as client:
            holds = [Hold() for _ in range(4)]
            scripts: list[list[Step]] = [[hold, response("200 OK", b"{}")] for hold in holds]
            fake.queue(*scripts[:2])
            other.queue(*scripts[2:])
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                calls = [pool.submit(client.post, CHAT, content=OPENAI) for _ in holds]
                for server in (fake, other):
                    server.wait_for_request(2)
                for hold in holds:
                    hold.release()
                assert [call.result().status_code for call in calls] == [200] * 4
            others.close()
            assert [client.post(CHAT, content=OPENAI).status_code for _ in range(6)] == [200] * 6


def test_64_clients_at_once(gateway: Gateway, fake: FakeVllm) -> None:
    with gateway.client(limits=httpx.Limits(max_connections=64)) as client:
        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            streams = [pool.submit(client.post, CHAT, content=OPENAI_STREAM) for _ in range(128)]
            assert {stream.result().content for stream in streams} == {b"".join(EVENTS)}
        assert metric(client, "gateway_in_flight ") == 0
        assert metric(client, "gateway_upstream_in_flight") == 0


@pytest.mark.parametrize(
    ("broken", "method", "path"),
    [
        pytest.param(
            "gateway.dialects.reader.simplified.from_body",
            "POST",
            CHAT,
            marks=pytest.mark.skipif(own_build() == "compiled", reason="what is compiled calls no stand-in for it"),
        ),
        ("gateway.observability.metrics.Metrics.text", "GET", "/metrics"),
    ],
)
def test_a_bug_of_ours_is_answered_and_logged(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, broken: str, method: str, path: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(broken, fail)
    with gateway.client() as client:
        got = client.request(method, path, json=SIMPLIFIED)

    assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    assert "a bug" not in got.text
    assert gateway.log(1)[0]["status"] == 500
