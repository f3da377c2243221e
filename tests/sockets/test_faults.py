"""Whatever an upstream does wrong: what the client sees, what is logged and counted, and that none of it is reused."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import pytest

from tests.support.fake_vllm import (
    DONE,
    EVENTS,
    STREAM_END,
    STREAM_HEAD,
    FakeVllm,
    Step,
    chunk,
    completion,
    event,
    response,
    stream,
)
from tests.support.gateway_process import running
from tests.support.paths import CERTIFICATES

pytestmark = pytest.mark.usefixtures("way")

SILENCE = 600.0  # until the connection is closed
CHAT = "/v1/chat/completions"
WHOLE = {"model": "demo", "messages": [{"role": "user", "content": "Hi."}]}
STREAM = {**WHOLE, "stream": True}
BODY = completion()
CONTENT = b"".join(EVENTS)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


@dataclass
class Fault:
    """What an upstream does, and what is to come of it.

    `code` is that of our error, whole or as an event after `content`; `cut` that the client's
    connection breaks off. `reused` says that the upstream's connection is still good.
    """

    script: Sequence[Step]
    asked: dict[str, Any] = field(default_factory=lambda: WHOLE)
    status: int = 502
    content: bytes | None = None
    code: str | None = "upstream_broken"
    cut: bool = False
    outcome: str = "upstream_error"
    reused: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def good(script: Sequence[Step], content: bytes = BODY, *, reused: bool = True, **more: Any) -> Fault:
    """What looks odd and is right."""
    return Fault(script, status=200, content=content, code=None, outcome="done", reused=reused, **more)


def broken_stream(script: Sequence[Step], content: bytes | None = EVENTS[0], **more: Any) -> Fault:
    """A stream that ends with our error event after `content`."""
    return Fault(script, **{"asked": STREAM, "status": 200, "content": content, **more})


def late(which: str, script: Sequence[Step], seconds: float = 0.4, **more: Any) -> Fault:
    """One of the time limits."""
    limit = {f"{which}_timeout": seconds}
    made = Fault(script, status=504, code=f"{which}_timeout", outcome=f"timeout:{which}", settings=limit)
    return made.__class__(**{**made.__dict__, **more})


def dripping(data: bytes) -> list[Step]:
    """A byte at a time, each soon but the whole never in time."""
    return [step for byte in data for step in (bytes([byte]), 0.02)]


SIMPLIFIED = {"messages": {"user": "Hi."}, "streaming": False}
LARGE = event({"content": "x" * 10_000_000})
CRLF = [one.replace(b"\n", b"\r\n") for one in EVENTS]
TWO = event({"content": "a"}).replace(b'"index":0', b'"index":1')

FAULTS = {
    # Before any answer
    "reset before the answer": Fault(["reset"]),
    "closed before the answer": Fault(["close"]),
    "silent, whole": late("total", [SILENCE]),
    "silent, streamed": late("first_token", [SILENCE], asked=STREAM),
    # In the head
    "reset in the status line": Fault([b"HTTP/1.", "reset"]),
    "reset in the headers": Fault([HEAD, "reset"]),
    "status line broken": Fault([b"HTTQ/1.1 200 OK\r\n\r\n"]),
    "status that does not exist": Fault([b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n"]),
    "head dripped, whole": late("total", dripping(HEAD)),
    "head dripped, streamed": late("first_token", dripping(SSE_HEAD), asked=STREAM),
    "one huge header": Fault([HEAD, b"x: " + b"y" * 100_000 + b"\r\n\r\n"]),
    "very many headers": Fault([HEAD, b"x: y\r\n" * 20_000 + b"\r\n"]),
    "headers without an end": Fault([HEAD, *[b"x: " + b"y" * 1000 + b"\r\n"] * 200]),
    "a head for the wrong protocol": Fault([b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"]),
    # Framing of whole answers
    "content-length too long": Fault(
        [HEAD + b"content-length: 9999\r\n\r\n" + BODY, "close"], status=200, code=None, cut=True
    ),
    "content-length too short": Fault(
        [HEAD + b"content-length: 4\r\n\r\n" + BODY], status=200, content=BODY[:4], code=None, outcome="done"
    ),
    "two content-lengths": Fault([HEAD + b"content-length: 4\r\ncontent-length: 5\r\n\r\n" + BODY]),
    "content-length and chunks": Fault(
        [HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(BODY) + STREAM_END]
    ),
    "content-length that is no number": Fault([HEAD + b"content-length: x\r\n\r\n" + BODY]),
    "reset in the body": Fault(
        [HEAD + b"content-length: 9999\r\n\r\n" + BODY, "reset"], status=200, code=None, cut=True
    ),
    "chunk size wrong": Fault(
        [HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(BODY) + b"zz\r\n"], status=200, code=None, cut=True
    ),
    "chunk size huge": Fault(
        [HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(BODY) + b"f" * 17 + b"\r\n"],
        status=200,
        code=None,
        cut=True,
    ),
    "chunks cut": Fault(
        [HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(BODY), "close"], status=200, code=None, cut=True
    ),
    "a second answer": good([response("200 OK", BODY) + response("200 OK", b"smuggled")], reused=False),
    "a body after a 204": Fault(
        [b"HTTP/1.1 204 No Content\r\n\r\nbody"], status=204, content=b"", code=None, outcome="done"
    ),
    "an upgrade": Fault([b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"]),
    # What is odd and right
    "1xx first": good([b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + response("200 OK", BODY)]),
    "trailers": good([HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk(BODY) + b"0\r\nx: y\r\n\r\n"]),
    "connection: close": good([response("200 OK", BODY, "connection: close")], reused=False),
    "HTTP/1.0 with a length": good(
        [b"HTTP/1.0 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY), "close"], reused=False
    ),
    "HTTP/1.0 without a length": good([b"HTTP/1.0 200 OK\r\n\r\n" + BODY, "close"], reused=False),
    "duplicate headers": good([response("200 OK", BODY, "x-a: 1\r\nx-a: 2")]),
    # Streams
    "stream reset": broken_stream([STREAM_HEAD + chunk(EVENTS[0]), "reset"]),
    "stream cut": broken_stream([STREAM_HEAD + chunk(EVENTS[0]), "close"]),
    "half an event and the end": broken_stream([STREAM_HEAD + chunk(EVENTS[0] + EVENTS[1][:20]) + STREAM_END]),
    "half an event and a cut": broken_stream([STREAM_HEAD + chunk(EVENTS[0] + EVENTS[1][:20]), "close"]),
    "stream goes silent": broken_stream(
        [STREAM_HEAD + chunk(EVENTS[0]), SILENCE],
        code="idle_timeout",
        outcome="timeout:idle",
        settings={"idle_timeout": 0.4},
    ),
    "stream drips for too long": broken_stream(
        [STREAM_HEAD + chunk(EVENTS[0]), *dripping(chunk(EVENTS[1] * 3))],
        code="total_timeout",
        outcome="timeout:total",
        settings={"total_timeout": 0.8},
    ),
    "[DONE] missing": broken_stream(stream(EVENTS[:2]), b"".join(EVENTS[:2])),
    "an empty stream": broken_stream([STREAM_HEAD + STREAM_END], b"", status=502),
    "chunk size wrong in a stream": broken_stream([STREAM_HEAD + chunk(EVENTS[0]) + b"zz\r\n"]),
    "an event of 10 MB": good(stream([EVENTS[0], LARGE, DONE]), EVENTS[0] + LARGE + DONE, asked=STREAM),
    "an event of 10 MB, cut": broken_stream(
        [STREAM_HEAD + chunk(EVENTS[0]) + b"f00000\r\n" + LARGE[:9_000_000], "close"], None, code=None, cut=True
    ),
    "split UTF-8": good(
        [
            STREAM_HEAD,
            *map(chunk, ('data: {"é":1}\n\n'.encode()[:10], 'data: {"é":1}\n\n'.encode()[10:], DONE)),
            STREAM_END,
        ],
        'data: {"é":1}\n\n'.encode() + DONE,
        asked=STREAM,
    ),
    "CRLF events": good(stream(CRLF), b"".join(CRLF), asked=STREAM),
    "comments": good(stream([b": ping\n\n", *EVENTS]), b": ping\n\n" + CONTENT, asked=STREAM),
    "data without a space": good(
        stream([b"data:{}\n\n", b"data:[DONE]\n\n"]), b"data:{}\n\ndata:[DONE]\n\n", asked=STREAM
    ),
    "several choices": good(stream([EVENTS[0], TWO, DONE]), EVENTS[0] + TWO + DONE, asked=STREAM),
    "data after [DONE]": good(stream([*EVENTS, EVENTS[1]]), CONTENT + EVENTS[1], asked=STREAM),
    "reset after [DONE]": Fault([STREAM_HEAD + b"".join(map(chunk, EVENTS)), "reset"], STREAM, 200, CONTENT, code=None),
    "a stream where a whole answer was asked for": Fault(stream(EVENTS), SIMPLIFIED),
    "an error event in a 200": Fault(
        stream([EVENTS[0], b'data: {"error":{"code":500}}\n\n', DONE]),
        STREAM,
        200,
        EVENTS[0] + b'data: {"error":{"code":500}}\n\n' + DONE,
        None,
        reused=True,
    ),
}


# Made with openssl for 127.0.0.1: one that is good until 2120, one that was until 2021, and one for another host.


@pytest.mark.parametrize(
    ("certificate", "why"),
    [("good", ""), ("expired", "certificate has expired"), ("other", "IP address mismatch"), ("unknown", "self")],
)
def test_an_upstream_is_who_its_certificate_says(certificate: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if certificate != "unknown":
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "authority.pem"))
    file = CERTIFICATES / f"{'good' if certificate == 'unknown' else certificate}.pem"
    with FakeVllm(certificate=file) as fake, running(fake.url) as gateway, gateway.client() as client:
        answer = client.post(CHAT, json=WHOLE)
        state = client.get("/v1/health_check").json()["upstreams"][0]

    if certificate == "good":
        assert (answer.status_code, answer.content, state["state"]) == (200, BODY, "serving")
    else:
        assert answer.status_code == 503
        assert fake.received == []
        assert (state["state"], "certificate" in state["why"]) == ("down", True)
        assert why in state["why"] or certificate == "unknown"


@pytest.mark.parametrize(
    ("certificate", "settings", "serves"),
    [
        ("good", {"upstream_ca_file": str(CERTIFICATES / "authority.pem")}, True),
        ("good", {"upstream_ca_file": str(CERTIFICATES / "other.pem")}, False),
        ("other", {"upstream_ca_file": str(CERTIFICATES / "authority.pem")}, False),
        ("other", {"tls_skip_verify": "True"}, True),
        ("expired", {"tls_skip_verify": "True"}, True),
    ],
)
def test_whom_to_trust_may_be_said(certificate: str, settings: dict[str, str], serves: bool) -> None:
    with FakeVllm(certificate=CERTIFICATES / f"{certificate}.pem") as fake:
        with running(fake.url, **settings) as gateway, gateway.client() as client:
            answer = client.post(CHAT, json=WHOLE)
            state = client.get("/v1/health_check").json()["upstreams"][0]["state"]
        assert (answer.status_code, state) == ((200, "serving") if serves else (503, "down"))
        assert bool(fake.received) is serves


def outcome_of(client: httpx.Client, asked: dict[str, Any]) -> tuple[int, bytes, bool]:
    """Status, body, and whether it broke off."""
    with client.stream("POST", CHAT, json=asked) as answer:
        got = b""
        with contextlib.suppress(httpx.RemoteProtocolError):
            for piece in answer.iter_raw():
                got += piece
            return answer.status_code, got, False
        return answer.status_code, got, True


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_upstream_has_its_promised_outcome(name: str, fake: FakeVllm) -> None:
    fault = FAULTS[name]
    fake.queue(fault.script)
    fake.close_after_probes()
    # A later probe would take the connection that the next call is to have.
    with running(fake.url, probe_interval=60, **fault.settings) as gateway, gateway.client() as client:
        status, content, cut = outcome_of(client, fault.asked)
        (line,) = gateway.log(1)
        after = client.post(CHAT, json=WHOLE)
        counted = client.get("/metrics").text

    assert (status, cut) == (fault.status, fault.cut)
    if fault.code is not None:
        before = fault.content or b""
        assert content.startswith(before)
        error = content[len(before) :]
        if status == 200:
            error, _, end = error.removeprefix(b"data: ").partition(b"\n\n")
            assert end == DONE
        assert orjson.loads(error)["error"]["code"] == fault.code
        assert orjson.loads(error)["error"]["request_id"] == line["request_id"]
    elif fault.content is not None:
        assert content == fault.content
    assert (line["status"], line["outcome"]) == (status, fault.outcome)
    assert f'status="{status}"' in counted
    assert f'gateway_outcomes_total{{outcome="{fault.outcome}"}}' in counted
    assert "gateway_in_flight 0.0" in counted
    assert 'gateway_upstream_in_flight{upstream="' + fake.url + '"} 0.0' in counted
    # The next call is answered as if nothing had been.
    assert (after.status_code, after.content) == (200, BODY)
    assert len(fake.received) == 2
    first, second = fake.received
    assert (first.connection == second.connection) is fault.reused
