"""Spans: which tree a collector sees, what goes upstream and into the log, and that nothing of it is there when off."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.app import create_tracer
from gateway.config.load import asks_for_traces, load
from gateway.config.settings import Settings
from gateway.observability.semconv import OPERATIONS
from gateway.wire.routes import ROUTES
from tests.support.collector import Collector, Sent
from tests.support.fake_vllm import (
    CLOSE,
    EVENTS,
    MODEL,
    STREAM_HEAD,
    FakeVllm,
    Hold,
    Received,
    chunk,
    completion,
    response,
)
from tests.support.gateway_process import Gateway, running
from tests.support.ports import free_port

ways = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
OPENAI = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BUSY = response("503 Service Unavailable", b'{"error":"busy"}')


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as started:
        ask_for_traces(monkeypatch, started.url)
        yield started


@pytest.fixture
def traced(collector: Collector, fake: FakeVllm) -> Iterator[Gateway]:
    with running(fake.url) as started:
        yield started


def ask_for_traces(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def ask(gateway: Gateway, body: Any, path: str = CHAT, **headers: str) -> int:
    with gateway.client() as client:
        return client.post(path, json=body, headers=headers).status_code


def said_by_tracing(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "gateway.observability.tracing"]


def tree(collector: Collector, received: Received) -> tuple[Sent, Sent]:
    """The request's span and the call's, as they hang together, the upstream below the call."""
    request, call = collector.wait(2)
    assert (request.kind, call.kind) == ("SERVER", "CLIENT")
    assert request.trace_id == call.trace_id
    assert call.parent == request.span_id
    # Trace Context of level 2, 3.2.2.5: a trace id of our own is random, which is another flag.
    flags = "01" if request.parent else "03"
    assert [value for name, value in received.headers if name == "traceparent"] == [
        f"00-{call.trace_id}-{call.span_id}-{flags}"
    ]
    assert request.began <= call.began <= call.ended <= request.ended + 0.001
    return request, call


@ways
def test_a_whole_answer_is_a_span_and_its_call_one_below(traced: Gateway, fake: FakeVllm, collector: Collector) -> None:
    before = time.time()
    assert ask(traced, OPENAI, **{"x-request-id": "id-1"}) == 200
    request, call = tree(collector, fake.wait_for_request())
    assert (request.name, call.name) == (f"POST {CHAT}", f"chat {MODEL}")
    assert not request.parent
    assert not request.failed
    assert not call.failed
    assert before - 0.1 < request.began < request.ended < time.time() + 0.1
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "url.scheme": "http",
        "http.response.header.x-request-id": ["id-1"],
        "http.response.status_code": 200,
    }
    assert call.attributes == {
        "server.address": "127.0.0.1",
        "server.port": fake.port,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": MODEL,
        "gen_ai.usage.input_tokens": 31,
        "gen_ai.usage.output_tokens": 4,
    }
    assert request.resource["service.name"] == "vllm-gateway"
    assert request.resource["service.version"]
    (line,) = traced.log(1)
    assert (line["trace_id"], line["span_id"]) == (request.trace_id, request.span_id)


@ways
def test_a_stream_tells_when_its_first_chunk_came(traced: Gateway, fake: FakeVllm, collector: Collector) -> None:
    assert ask(traced, {**OPENAI, "stream": True}) == 200
    _, call = tree(collector, fake.wait_for_request())
    assert call.attributes["gen_ai.request.stream"] is True
    assert 0 < call.attributes["gen_ai.response.time_to_first_chunk"] <= call.ended - call.began
    assert call.attributes["gen_ai.usage.output_tokens"] == 4


@ways
@pytest.mark.parametrize("streaming", [False, True])
def test_a_simplified_call_is_traced_alike(
    traced: Gateway, fake: FakeVllm, collector: Collector, streaming: bool
) -> None:
    assert ask(traced, {"messages": {"user": "Hi."}, "streaming": streaming}) == 200
    request, call = tree(collector, fake.wait_for_request())
    assert (request.name, call.name) == (f"POST {CHAT}", f"chat {MODEL}")
    assert ("gen_ai.request.stream" in call.attributes) == streaming


@ways
def test_the_clients_trace_goes_on(traced: Gateway, fake: FakeVllm, collector: Collector) -> None:
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=value,other=1"}
    assert ask(traced, OPENAI, **sent) == 200
    received = fake.wait_for_request()
    request, _ = tree(collector, received)
    assert (request.trace_id, request.parent) == (TRACE, PARENT)
    assert [value for name, value in received.headers if name == "tracestate"] == ["vendor=value,other=1"]
    assert request.state == "vendor=value,other=1"


@ways
def test_what_the_client_does_not_sample_is_passed_on_and_not_exported(fake: FakeVllm, collector: Collector) -> None:
    with running(fake.url) as gateway:
        assert ask(gateway, OPENAI, traceparent=f"00-{TRACE}-{PARENT}-00", tracestate="vendor=value") == 200
        (line,) = gateway.log(1)
    received = fake.wait_for_request()
    assert received.header("traceparent") == f"00-{TRACE}-{line['span_id']}-00"
    assert received.header("tracestate") == "vendor=value"
    assert line["trace_id"] == TRACE
    assert line["span_id"] != PARENT
    assert collector.spans == []


@ways
@pytest.mark.parametrize(
    "sent",
    [
        "",
        "nothing",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01, 00-{TRACE}-{PARENT}-01",
        "x" * 4000,
    ],
)
def test_a_parent_that_cannot_be_understood_begins_a_new_trace(
    traced: Gateway, fake: FakeVllm, collector: Collector, sent: str
) -> None:
    assert ask(traced, OPENAI, traceparent=sent, tracestate="vendor=value") == 200
    received = fake.wait_for_request()
    request, _ = tree(collector, received)
    assert request.trace_id != TRACE
    assert not request.parent
    # Trace Context, 3.3.1: it belongs to the parent.
    assert received.header("tracestate") is None


@ways
def test_two_parents_are_none(traced: Gateway, fake: FakeVllm, collector: Collector) -> None:
    line = f"traceparent: 00-{TRACE}-{PARENT}-01\r\n".encode()
    body = json.dumps(OPENAI).encode()
    with traced.connect() as connection:
        connection.sendall(
            b"POST %b HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b"
            % (CHAT.encode(), line * 2, len(body), body)
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    request, _ = tree(collector, fake.wait_for_request())
    assert request.trace_id != TRACE
    assert not request.parent


@ways
def test_calls_that_are_alike_have_spans_of_their_own(traced: Gateway, fake: FakeVllm, collector: Collector) -> None:
    with traced.client() as client:
        for _ in range(3):
            assert client.post(CHAT, json=OPENAI, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).is_success
    spans = collector.wait(6)
    assert len({span.span_id for span in spans}) == 6
    told = [received.header("traceparent") for received in fake.received]
    assert told == [f"00-{TRACE}-{span.span_id}-01" for span in spans if span.kind == "CLIENT"]


@ways
@pytest.mark.parametrize(
    ("status", "error"), [("500 Internal Server Error", "upstream_error"), ("404 Not Found", "404")]
)
def test_an_error_of_the_upstreams_is_told(
    traced: Gateway, fake: FakeVllm, collector: Collector, status: str, error: str
) -> None:
    fake.queue([response(status, b'{"error":"no"}')])
    assert ask(traced, OPENAI) == int(status[:3])
    request, call = tree(collector, fake.wait_for_request())
    assert request.attributes["http.response.status_code"] == int(status[:3])
    assert call.failed
    assert call.attributes["error.type"] == error
    # What is the client's fault is none of ours.
    assert request.failed == (status[0] == "5")
    assert request.attributes.get("error.type") == (error if status[0] == "5" else None)


@ways
def test_a_stream_that_breaks_is_an_error_though_its_status_was_none(
    traced: Gateway, fake: FakeVllm, collector: Collector
) -> None:
    fake.queue([STREAM_HEAD, chunk(EVENTS[1]), CLOSE])
    assert ask(traced, {**OPENAI, "stream": True}) == 200
    for span in tree(collector, fake.wait_for_request()):
        assert span.failed
        assert span.attributes["error.type"] == "upstream_error"


@ways
def test_a_client_that_leaves_is_no_error_of_ours(traced: Gateway, fake: FakeVllm, collector: Collector) -> None:
    fake.queue([Hold()])
    body = json.dumps(OPENAI).encode()
    with traced.connect() as connection:
        connection.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(body)))
        connection.sendall(body)
        received = fake.wait_for_request()
    for span in tree(collector, received):
        assert not span.failed
        assert span.attributes["error.type"] == "client_left"
        assert "http.response.status_code" not in span.attributes


@ways
def test_what_is_refused_before_it_goes_upstream_is_one_span(traced: Gateway, collector: Collector) -> None:
    assert ask(traced, {"messages": 1}, traceparent=f"00-{TRACE}-{PARENT}-01") == 400
    (request,) = collector.wait(1)
    assert (request.name, request.trace_id, request.parent) == (f"POST {CHAT}", TRACE, PARENT)
    assert request.attributes["http.response.status_code"] == 400
    assert not request.failed
    (line,) = traced.log(1)
    assert (line["trace_id"], line["span_id"]) == (TRACE, request.span_id)


@ways
def test_a_call_that_another_upstream_takes_is_still_one_span(fake: FakeVllm, collector: Collector) -> None:
    fake.queue([BUSY])
    with FakeVllm() as other, running(fake.url, other.url) as gateway:
        assert ask(gateway, OPENAI) == 200
        received = other.wait_for_request()
        _, call = tree(collector, received)
    assert fake.wait_for_request().header("traceparent") == received.header("traceparent")
    assert not call.failed
    assert call.attributes["http.request.resend_count"] == 1
    assert call.attributes["server.port"] == other.port


@ways
def test_a_recording_is_traced_as_it_goes_up(traced: Gateway, fake: FakeVllm, collector: Collector) -> None:
    with traced.client() as client:
        answer = client.post(
            "/v1/audio/transcriptions", files={"file": b"sound"}, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}
        )
    assert answer.status_code == 200
    request, call = tree(collector, fake.wait_for_request())
    assert request.trace_id == TRACE
    assert call.name == "POST /v1/audio/transcriptions"
    assert call.attributes["url.template"] == "/v1/audio/transcriptions"
    assert "gen_ai.operation.name" not in call.attributes


def test_every_operation_is_of_a_path_that_there_is() -> None:
    assert {route.path for route in ROUTES} >= OPERATIONS.keys()


@ways
def test_no_prompt_answer_or_key_is_in_a_span(fake: FakeVllm, collector: Collector) -> None:
    key = "a-very-secret-key-of-the-clients-0001"
    fake.queue([response("200 OK", completion("an answer"))])
    with running(fake.url, api_keys=(key,), upstream_api_key="the-upstreams-key") as gateway:
        body = {"messages": {"system": "a system text", "user": "a prompt"}, "streaming": False}
        assert ask(gateway, body, authorization=f"Bearer {key}") == 200
        assert ask(gateway, body, authorization="Bearer another") == 401
    collector.wait(3)
    assert not re.search(rb"an answer|a system text|a prompt|secret|upstreams-key|another", collector.raw)


@ways
def test_only_what_is_relayed_is_traced(fake: FakeVllm, collector: Collector) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        for path in ("/health", "/ping", "/v1/health_check", "/metrics", "/v1/statistics", "/nothing"):
            client.get(path)
        assert "trace_id" not in gateway.log(1)[0]
    assert collector.spans == []


def test_the_sampler_is_the_one_that_is_asked_for(
    fake: FakeVllm, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    with running(fake.url) as gateway:
        assert ask(gateway, OPENAI) == 200
        assert ask(gateway, {"messages": 1}) == 400
    assert (fake.received[0].header("traceparent") or "")[-2:] in ("00", "02")
    assert collector.spans == []


def test_the_service_has_the_name_that_it_is_given(
    fake: FakeVllm, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with running(fake.url) as gateway:
        assert ask(gateway, OPENAI) == 200
    resource = collector.wait(2)[0].resource
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("mine", "test")


def test_a_dead_collector_hurts_nobody_and_does_not_hold_the_end(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask_for_traces(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with running(fake.url) as gateway:
        for _ in range(3):
            assert ask(gateway, OPENAI) == 200
        ending = time.monotonic()
    assert time.monotonic() - ending < 5
    (said,) = said_by_tracing(caplog)
    assert "refused" in said


def test_a_collector_that_never_answers_does_not_hold_the_end(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ask_for_traces(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        with running(fake.url) as gateway:
            assert ask(gateway, OPENAI) == 200
            ending = time.monotonic()
        assert time.monotonic() - ending < 5


def test_that_spans_are_refused_is_told_once_and_that_they_are_no_more(
    fake: FakeVllm, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bad, good = "tracing: Failed to export spans batch code: 400, reason: Bad Request", "tracing: spans are sent again"
    expected = [bad, good, bad, good]
    with running(fake.url) as gateway:
        for calls, status in enumerate((400, 400, 400, 200, 200, 400, 400, 200), 1):
            collector.status = status
            assert ask(gateway, OPENAI) == 200
            collector.wait(2 * calls)  # its spans may come in two batches
        # What became of the last one is told by the exporter's own thread, which the end would cut short.
        until = time.monotonic() + 10
        while len(said_by_tracing(caplog)) < len(expected) and time.monotonic() < until:
            time.sleep(0.01)
    assert said_by_tracing(caplog) == expected


def test_what_the_sdk_says_of_a_clients_headers_is_not_logged(
    traced: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    for state in ("no pair", "a=1,a=1", "x" * 5000, ",".join(f"k{number}=1" for number in range(40))):
        assert ask(traced, OPENAI, traceparent=f"00-{TRACE}-{PARENT}-01", tracestate=state) == 200
    assert ask(traced, OPENAI, traceparent="x" * 5000) == 200
    assert said_by_tracing(caplog) == []


def test_a_queue_that_is_full_is_told_of_once(
    fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ask_for_traces(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
        with running(fake.url) as gateway:
            for _ in range(8):
                assert ask(gateway, OPENAI) == 200
    assert said_by_tracing(caplog)[0] == "tracing: Queue full, dropping Span."
    assert len([said for said in said_by_tracing(caplog) if "Queue" in said]) == 1


ON = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "mine"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (ON, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({**ON, "OTEL_SDK_DISABLED": "true"}, False),
        ({**ON, "OTEL_SDK_DISABLED": "false"}, True),
        ({**ON, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ON, "OTEL_TRACES_EXPORTER": "console, otlp"}, True),
        ({**ON, "OTEL_TRACES_EXPORTER": "console"}, False),
    ],
)
def test_traces_are_asked_for_by_the_standard_variables(
    given: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert asks_for_traces() == expected


def test_who_asks_for_another_protocol_is_told_which_is_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert load()[2] == []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    (warning,) = load()[2]
    assert "OTEL_EXPORTER_OTLP_PROTOCOL is grpc" in warning
    assert "http/protobuf" in warning
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    assert load()[2] == []


def test_without_what_it_needs_nothing_is_traced_and_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ask_for_traces(monkeypatch, "http://127.0.0.1:4318")
    monkeypatch.delitem(sys.modules, "gateway.observability.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert create_tracer(Settings()) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "pip install 'vllm-gateway[otel]'" in record.getMessage()


OFF = """
import asyncio, sys
from gateway.app import create_app
from gateway.config.secrets import read_secrets
from gateway.config.settings import Settings
from gateway.server.uvicorn_server import create_server
async def run():
    settings = Settings(GATEWAY_PORT=0)
    app = create_app(settings, read_secrets(settings))
    create_server(settings, read_secrets(settings), app).config.load()
    async with app.router.lifespan_context(app) as state:
        assert state["parts"].data_path.traced is None
asyncio.run(run())
print([name for name in sys.modules if name.partition(".")[0] in ("opentelemetry", "google", "requests")])
"""


def test_off_nothing_of_it_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", OFF], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@ways
def test_off_the_context_passes_by(gateway: Gateway, fake: FakeVllm) -> None:
    sent = {"traceparent": f"00-{TRACE}-{PARENT}-00", "tracestate": "no pair"}
    assert ask(gateway, OPENAI, **sent) == 200
    received = fake.wait_for_request()
    assert {name: received.header(name) for name in sent} == sent
    assert "trace_id" not in gateway.log(1)[0]
