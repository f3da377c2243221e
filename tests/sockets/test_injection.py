"""Clients' words in logs and metrics: never a line, a field or a series of their own, on both ways in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import Gateway, running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
FORMS: list[Any] = [[], {"user": "Hi"}]  # relayed, and refused here
FORGED = 'gateway_requests_total{route="/forged",status="200"} 1'
# What httpx does not send in one.
_IN_A_HEADER = re.compile(rb"[\x00-\x20\x7f]")
WORDS = [
    f"x\n{FORGED}\n",
    f'demo"}} 1\n{FORGED}\n# ',
    'x\r\n{"level":"INFO","message":"forged"}\r\n',
    "x status=200 path=/forged",
    '","path":"/forged","x":"',
    "\\",
    "\\n",
    "\0",
    "\x1b[2J\x1b]0;forged\x07",
    "\x9b2J",
    "\u2028\u202eforged",
    "\x7f",
    "x" * 100_000,
]


def wait_for_lines(gateway: Gateway, count: int) -> list[bytes]:
    """The next so many lines of the log, as they were written."""
    text = b""
    while text.count(b"\n") < count:
        text += os.read(gateway._log, 65536)
    return text.splitlines()


def series(gateway: Gateway) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """The names and labels of what is counted, as Prometheus reads them."""
    with gateway.client() as client:
        client.get("/metrics")  # which counts itself
        text = client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(params=["json", "text"])
def logging_gateway(fake: FakeVllm, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with running(fake.url, log_format=request.param) as started:
        yield started


def test_the_name_of_a_model_makes_no_line_and_no_series(logging_gateway: Gateway) -> None:
    with logging_gateway.client() as client:
        for messages in FORMS:
            client.post(CHAT, content=orjson.dumps({"messages": messages, "model": "first"}))
            before = series(logging_gateway)
            for word in WORDS:
                client.post(CHAT, content=orjson.dumps({"messages": messages, "model": word}))
            assert series(logging_gateway) == before
    lines = wait_for_lines(logging_gateway, 2 + 2 * len(WORDS))
    assert len(lines) == 2 + 2 * len(WORDS)
    for line in lines:
        assert all(32 <= byte < 128 for byte in line)
        assert len(line) < 2000
        if line.startswith(b"{"):
            assert json.loads(line)["path"] == CHAT
        else:
            assert line.split(b" ")[1:4] in ([b"200", b"POST", CHAT.encode()], [b"404", b"POST", CHAT.encode()])


def test_a_path_a_query_and_a_request_id_make_no_line_and_no_series(logging_gateway: Gateway) -> None:
    with logging_gateway.client() as client:
        client.get("/nowhere")
        before = series(logging_gateway)
        asked = 0
        for word in WORDS[:-1]:
            encoded = "".join(f"%{byte:02x}" for byte in word.encode())
            for path in (f"/{encoded}", f"/v1/responses/{encoded}", f"/nowhere?{encoded}", f"/v1/models/{encoded}"):
                got = client.get(path, headers={b"x-request-id": _IN_A_HEADER.sub(b'"', word.encode())})
                assert got.status_code == 404
                assert len(got.headers["x-request-id"]) == 32
                asked += 1
        assert series(logging_gateway) == before
    lines = wait_for_lines(logging_gateway, asked + 1)
    assert len(lines) == asked + 1
    assert all(32 <= byte < 128 for line in lines for byte in line)
    assert all(json.loads(line)["status"] == 404 for line in lines if line.startswith(b"{"))


def test_a_model_that_an_upstream_names_oddly_is_one_label(fake: FakeVllm) -> None:
    name = WORDS[1]
    with FakeVllm(models=(name,)) as odd, running(odd.url) as gateway, gateway.client() as client:
        client.post(CHAT, content=orjson.dumps({"messages": [], "model": name}))
        labels = [dict(labels) for sample, labels in series(gateway) if sample == "gateway_requests_total"]
    assert name in [one["model"] for one in labels]
    assert "/forged" not in [one["route"] for one in labels]
