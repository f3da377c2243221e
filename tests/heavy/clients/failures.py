"""What goes wrong reaches a client as the class of error that its own documentation names.

Not among the tests that `make test` finds; `make test-clients` runs it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.heavy.clients.conftest import SCRIPTS, Clients
from tests.support.fake_vllm import EVENTS, RESET, STREAM_HEAD, FakeVllm, Step, chunk, response
from tests.support.gateway_process import running
from tests.support.ports import free_port
from tests.support.stack import MODEL, Stack

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is vLLM?"}], "max_tokens": 60}
BOTH = ("openai", "anthropic")
Outcome = dict[str, Any]


class Caller:
    """A process that has the clients loaded, and makes calls as it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, client: str, url: str, *, retries: int = 0, **call: Any) -> Outcome:
        """What came of a call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        told = {"client": client, "url": url, "retries": retries, "call": call}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._process.communicate(timeout=20)[1]
        found: Outcome = json.loads(line)
        return found


@pytest.fixture(scope="module")
def call(clients: Clients) -> Iterator[Caller]:
    with clients.start(clients.python, SCRIPTS / "fail.py") as process:
        try:
            yield Caller(process)
            assert process.communicate(timeout=20) == ("", "")
        finally:
            process.kill()


def names(found: Sequence[Outcome]) -> list[tuple[str | None, int | None]]:
    return [(outcome["error"], outcome["status"]) for outcome in found]


def test_what_is_wrong_with_a_call_is_said_by_its_class(call: Caller, url: str) -> None:
    simplified: dict[str, Any] = {"messages": {"user": "Hi"}, "max_new_tokens": 0}
    found = [
        call("openai", url, **ASK | {"model": "nope"}),
        call("openai", url, **ASK, temperature=-1),
        call("openai", url, **ASK, extra_body=simplified),
        call("openai", f"{url}/nowhere", **ASK),
        call("anthropic", url, **ASK | {"model": "nope"}),
        call("anthropic", url, **ASK | {"max_tokens": -1}),
        call("anthropic", f"{url}/nowhere", **ASK),
    ]

    assert names(found) == [
        *[("NotFoundError", 404), ("BadRequestError", 400), ("BadRequestError", 400), ("NotFoundError", 404)],
        *[("NotFoundError", 404), ("BadRequestError", 400), ("NotFoundError", 404)],
    ]
    assert "nope" in found[0]["message"]
    assert found[1]["param"] == "temperature"
    assert found[2]["param"] == "max_new_tokens"
    assert all(outcome["request id"] for outcome in found)


@pytest.mark.usefixtures("way")
def test_a_call_that_is_too_large_or_finds_no_room(call: Caller, stack: Stack) -> None:
    endless = {**ASK, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    large = {**ASK, "messages": [{"role": "user", "content": "x" * 1024}]}
    with (
        running(stack.vllm_url, max_in_flight=1, max_queue=0, max_body_bytes=1024) as gateway,
        gateway.client() as client,
        client.stream("POST", "/v1/chat/completions", json=endless) as held,
    ):
        pieces = held.iter_raw()  # kept, as httpx closes the answer with its iterator
        next(pieces)
        found = [call(client, gateway.url, **large) for client in BOTH] + [
            call(client, gateway.url, **ASK) for client in BOTH
        ]

    assert names(found) == [
        *[("APIStatusError", 413), ("ContentTooLargeError", 413)],
        *[("RateLimitError", 429), ("RateLimitError", 429)],
    ]
    assert all(int(outcome["retry after"]) > 0 for outcome in found[2:])


@pytest.mark.usefixtures("way")
def test_a_model_server_that_is_not_there(call: Caller) -> None:
    with running(f"http://127.0.0.1:{free_port()}") as gateway:
        found = [call(client, gateway.url, **ASK) for client in BOTH]

    assert names(found) == [("InternalServerError", 503), ("ServiceUnavailableError", 503)]
    assert all(int(outcome["retry after"]) > 0 for outcome in found)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("step", "errors"),
    [
        (RESET, [("InternalServerError", 502), ("InternalServerError", 502)]),
        (60.0, [("InternalServerError", 504), ("GatewayTimeoutError", 504)]),
        (
            response("401 Unauthorized", b'{"error":"Unauthorized"}'),
            [("AuthenticationError", 401), ("AuthenticationError", 401)],
        ),
    ],
    ids=["broken", "silent", "unauthorized"],
)
def test_a_model_server_that_fails(call: Caller, fake: FakeVllm, step: Step, errors: list[tuple[str, int]]) -> None:
    fake.queue([step], [step])
    fake.close_after_probes()
    with running(fake.url, first_token_timeout=0.5) as gateway:
        found = [call(client, gateway.url, **ASK | {"model": "demo"}, stream=True) for client in BOTH]

    assert names(found) == errors


MESSAGE = (
    b'{"type":"message_start","message":{"id":"m","type":"message","role":"assistant","content":[],"model":"demo"}}'
)
CREATED = b'{"type":"response.in_progress","sequence_number":0,"response":{"id":"r","object":"response","output":[]}}'


@pytest.mark.usefixtures("way")
def test_a_stream_that_breaks_off_is_an_error_and_never_a_clean_end(call: Caller, fake: FakeVllm) -> None:
    fake.queue(
        [STREAM_HEAD, *map(chunk, EVENTS[:2]), RESET],
        [STREAM_HEAD, chunk(b"event: message_start\ndata: " + MESSAGE + b"\n\n"), RESET],
        [STREAM_HEAD, chunk(b"event: response.in_progress\ndata: " + CREATED + b"\n\n"), RESET],
    )
    ask = {**ASK, "model": "demo", "stream": True}
    with running(fake.url) as gateway:
        chat = call("openai", gateway.url, **ask)
        message = call("anthropic", gateway.url, **ask)
        response = call("responses", gateway.url, model="demo", input="Hi")

    assert (chat["got"], chat["error"]) == (["", "It's"], "APIError")
    assert "model server" in chat["message"]
    # Its class is made of the stream's own status, 200.
    assert (message["got"], message["error"]) == (["message_start"], "APIStatusError")
    assert (response["got"], response["error"]) == (["response.in_progress", "error"], None)


@pytest.mark.usefixtures("way")
def test_a_client_tries_again_by_itself_what_is_said_to_be_over_soon(call: Caller, fake: FakeVllm) -> None:
    fake.queue([response("503 Service Unavailable", b"{}", "retry-after: 1")])
    with running(fake.url) as gateway:
        found = call("openai", gateway.url, retries=2, **ASK | {"model": "demo"})

    assert (found["got"], found["error"]) == (["It's."], None)
    assert len(fake.received) == 2


def test_a_gateway_that_is_not_there(call: Caller) -> None:
    found = [call(client, f"http://127.0.0.1:{free_port()}", **ASK) for client in BOTH]

    assert names(found) == [("APIConnectionError", None), ("APIConnectionError", None)]
