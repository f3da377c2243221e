"""Tokens for the upstreams, on sockets and on both ways in: the first, the next ones, and what is said without any."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import orjson
import pytest

from gateway.upstream import credentials
from tests.support import gateway_process
from tests.support.fake_vllm import EVENTS, UNTOLD, Hold, completion, response
from tests.support.gateway_process import Gateway, running
from tests.support.paths import CERTIFICATES
from tests.support.ports import free_port
from tests.support.token_server import CLIENT, REFUSED, SECRET, GuardedVllm, TokenServer, asked_by

CHAT = "/v1/chat/completions"
WHOLE = {"model": "demo", "messages": [{"role": "user", "content": "Hi."}]}
STREAM = {**WHOLE, "stream": True}
CALLS = {
    "whole": (WHOLE, completion()),
    "streamed": (STREAM, b"".join(EVENTS)),
    "simplified": ({"messages": "Hi.", "stream_style": "openai"}, b"".join(UNTOLD)),
}

pytestmark = pytest.mark.usefixtures("way")


@pytest.fixture
def tokens() -> Iterator[TokenServer]:
    with TokenServer() as server:
        yield server


@pytest.fixture
def guarded() -> Iterator[GuardedVllm]:
    """A vLLM that takes the first token."""
    with GuardedVllm("token-1") as server:
        yield server


def soon(ready: Callable[[], bool]) -> None:
    """Ask until it is so."""
    until = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < until, "it never came about"


@contextmanager
def serving(guarded: GuardedVllm, tokens: TokenServer, **settings: float) -> Iterator[Gateway]:
    """A gateway that has its first token, however slow the machine: of itself it waits a second for it at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credentials, "_EAGER", 10)
        with running(guarded.url, **{"probe_interval": 60, **tokens.settings, **settings}) as gateway:
            yield gateway


@pytest.mark.parametrize("call", CALLS)
def test_calls_and_probes_show_the_token_and_no_client_does(
    tokens: TokenServer, guarded: GuardedVllm, call: str
) -> None:
    body, content = CALLS[call]
    with running(guarded.url, **tokens.settings) as gateway, gateway.client() as client:
        state = client.get("/v1/health_check").json()["upstreams"][0]["state"]
        answer = client.post(CHAT, json=body, headers={"authorization": "Bearer theirs"})

    assert (state, answer.status_code, answer.content) == ("serving", 200, content)
    assert [value for name, value in guarded.received[0].headers if name == "authorization"] == ["Bearer token-1"]
    assert {probe.header("authorization") for probe in guarded.probed} == {"Bearer token-1"}
    (asked,) = tokens.received
    assert asked_by(asked) == ("basic", CLIENT, SECRET)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_whose_token_is_refused_gets_its_answer_with_a_new_one(
    tokens: TokenServer, guarded: GuardedVllm, call: str
) -> None:
    body, content = CALLS[call]
    with serving(guarded, tokens) as gateway, gateway.client() as client:
        guarded.accepted = {"token-2"}
        answer = client.post(CHAT, json=body)
        (line,) = gateway.log(1)

    assert (answer.status_code, answer.content) == (200, content)
    assert (line["status"], line["outcome"]) == (200, "done")
    assert [len(guarded.refused), len(guarded.received), len(tokens.received)] == [1, 1, 2]
    assert guarded.refused[0].body == guarded.received[0].body


def test_many_calls_whose_token_is_refused_ask_for_one_new_one(tokens: TokenServer, guarded: GuardedVllm) -> None:
    hold = Hold()
    with serving(guarded, tokens) as gateway, gateway.client() as client:
        guarded.accepted = {"token-2"}
        tokens.queue([hold, tokens.token()])
        with ThreadPoolExecutor(20) as many:
            calls = [many.submit(client.post, CHAT, json=(WHOLE, STREAM)[number % 2]) for number in range(20)]
            guarded.wait(lambda: len(guarded.refused) == 20)
            hold.release()
            answers = [call.result() for call in calls]

    assert {(answer.status_code, answer.content) for answer in answers} == {
        (200, CALLS["whole"][1]),
        (200, CALLS["streamed"][1]),
    }
    assert len(tokens.received) == 2


def test_a_probe_has_a_refused_token_renewed(tokens: TokenServer, guarded: GuardedVllm) -> None:
    with serving(guarded, tokens, probe_interval=0.1) as gateway, gateway.client() as client:
        guarded.accepted = {"token-2"}
        soon(lambda: len(tokens.received) == 2)
        assert gateway.becomes(200)
        assert client.post(CHAT, json=WHOLE).status_code == 200

    assert (guarded.refused, len(tokens.received)) == ([], 2)


def test_an_upstream_that_refuses_every_token_is_a_502_and_does_no_harm_to_the_token_server(
    tokens: TokenServer, guarded: GuardedVllm
) -> None:
    with serving(guarded, tokens) as gateway, gateway.client() as client:
        guarded.accepted = set()
        answers = [client.post(CHAT, json=WHOLE) for _ in range(30)]
        advice = "GATEWAY_UPSTREAM_TOKEN_URL is to give tokens that it takes"
        soon(lambda: advice in client.get("/v1/health_check").text)
        state = client.get("/v1/health_check")

    assert {(one.status_code, one.json()["error"]["code"]) for one in answers} == {(502, "upstream_unauthorized")}
    assert "www-authenticate" not in answers[0].headers
    assert len(guarded.refused) == 31  # the first of them went out once more
    assert len(tokens.received) == 2
    assert state.status_code == 503
    assert advice in state.json()["upstreams"][0]["why"]


def test_without_a_token_calls_are_503_until_there_is_one(
    monkeypatch: pytest.MonkeyPatch, guarded: GuardedVllm
) -> None:
    monkeypatch.setattr(credentials, "_BACKOFF", (0.1, 0.1))
    tokens = TokenServer(free_port())
    with running(guarded.url, **tokens.settings) as gateway, gateway.client() as client:
        refused = client.post(CHAT, json=WHOLE)
        simplified = client.post(CHAT, json={"messages": "Hi."})
        state = client.get("/v1/health_check")
        ping = client.get("/ping")
        with tokens:
            soon(lambda: client.get("/v1/health_check").status_code == 200)
            answer = client.post(CHAT, json=WHOLE)

    for one in (refused, simplified):
        assert (one.status_code, one.json()["error"]["code"]) == (503, "no_upstream_ready")
        assert one.headers["retry-after"] == "2"
        assert "The gateway has no token for the model server yet" in one.json()["error"]["message"]
    (upstream,) = state.json()["upstreams"]
    assert (state.status_code, ping.status_code, upstream["state"]) == (503, 503, "down")
    assert upstream["why"].startswith("there is no token for it: the token server cannot be reached")
    assert answer.status_code == 200
    assert guarded.refused == []


def test_a_token_server_that_says_nothing_holds_up_no_start(tokens: TokenServer, guarded: GuardedVllm) -> None:
    hold = Hold()
    tokens.queue([hold, tokens.token()])
    with running(guarded.url, **tokens.settings) as gateway, gateway.client() as client:
        assert client.get("/health").status_code == 200
        assert client.post(CHAT, json=WHOLE).status_code == 503
        hold.release()
        soon(lambda: client.get("/v1/health_check").status_code == 200)
        assert client.post(CHAT, json=WHOLE).status_code == 200


def test_a_call_that_waits_for_a_token_is_told_when_none_comes(tokens: TokenServer, guarded: GuardedVllm) -> None:
    with serving(guarded, tokens) as gateway, gateway.client() as client:
        guarded.accepted = {"token-2"}
        tokens.queue([response("500 Internal Server Error", b"")])
        answer = client.post(CHAT, json=WHOLE)
        (line,) = gateway.log(1)

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert "there is no new one yet" in answer.json()["error"]["message"]
    assert line["outcome"] == "upstream_error"


def test_who_leaves_while_a_token_is_awaited_leaves_no_trace(tokens: TokenServer, guarded: GuardedVllm) -> None:
    hold = Hold()
    with serving(guarded, tokens) as gateway, gateway.client() as client:
        guarded.accepted = {"token-2"}
        tokens.queue([hold, tokens.token()])
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=WHOLE, timeout=0.3)
        (line,) = gateway.log(1)
        hold.release()
        assert client.post(CHAT, json=WHOLE).status_code == 200
        counted = client.get("/metrics").text

    assert (line["status"], line["outcome"]) == (499, "client_left")
    assert "gateway_in_flight 0.0" in counted
    assert f'gateway_upstream_in_flight{{upstream="{guarded.url}"}} 0.0' in counted
    assert len(guarded.received) == 1


def test_the_end_of_the_gateway_does_not_wait_for_a_token(tokens: TokenServer, guarded: GuardedVllm) -> None:
    hold = Hold()
    with serving(guarded, tokens, drain_timeout=0.2) as gateway, gateway.client() as client:
        guarded.accepted = {"token-2"}
        tokens.queue([hold])
        with ThreadPoolExecutor(1) as one:
            call = one.submit(client.post, CHAT, json=WHOLE)
            guarded.wait(lambda: len(guarded.refused) == 1)
            gateway.signal()
            answer = call.result()

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_an_upload_whose_token_is_refused_is_to_be_sent_again(tokens: TokenServer, guarded: GuardedVllm) -> None:
    path, file = "/v1/audio/transcriptions", {"file": b"sound" * 1000}
    with serving(guarded, tokens) as gateway, gateway.client() as client:
        guarded.accepted = {"token-2"}
        refused = client.post(path, files=file)
        tokens.wait_for_request(2)
        soon(lambda: client.post(path, files=file).status_code == 200)

    assert (refused.status_code, refused.headers["retry-after"]) == (503, "2")
    assert "send the request again" in refused.json()["error"]["message"]
    assert len(tokens.received) == 2


def test_a_fixed_keys_refusal_goes_to_the_client(guarded: GuardedVllm) -> None:
    with running(guarded.url, upstream_api_key="wrong") as gateway, gateway.client() as client:
        answer = client.post(CHAT, json=WHOLE)
        why = client.get("/v1/health_check").json()["upstreams"][0]["why"]

    assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
    assert why == "its /health answers 401: set GATEWAY_UPSTREAM_API_KEY to its key"


@pytest.mark.parametrize(("authority", "trusted"), [("authority", True), ("other", False)])
def test_the_token_server_is_who_its_certificate_says(authority: str, trusted: bool, guarded: GuardedVllm) -> None:
    with TokenServer(certificate=CERTIFICATES / "good.pem") as tokens:
        settings = {**tokens.settings, "upstream_ca_file": str(CERTIFICATES / f"{authority}.pem")}
        with running(guarded.url, **settings) as gateway, gateway.client() as client:
            assert client.post(CHAT, json=WHOLE).status_code == (200 if trusted else 503)
            why = client.get("/v1/health_check").json()["upstreams"][0]["why"]
    assert ("its certificate is not valid" in why) is not trusted
    assert bool(tokens.received) is trusted


def test_neither_secret_nor_token_stands_in_the_log_or_in_an_error(tokens: TokenServer, guarded: GuardedVllm) -> None:
    secret, port = "S3cretS3cret", free_port()
    environment = {
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "GATEWAY_UPSTREAMS": guarded.url,
        "GATEWAY_LOG_LEVEL": "DEBUG",
        "GATEWAY_SHORTCUT": str(gateway_process.SHORTCUT),
        "LLM_VLLM_TOKEN_URL": f"{tokens.url}/token",
        "LLM_VLLM_CLIENT_ID": CLIENT,
        "LLM_VLLM_CLIENT_SECRET": secret,
    }
    echo = response("401 Unauthorized", orjson.dumps({"error": secret, "error_description": f"not {secret}"}))
    tokens.queue(
        [tokens.token()],
        [response("200 OK", b'{"access_token":"token-9 token-9"}')],
        *[[echo]] * 2,
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        try:
            assert process.stdout is not None
            while "listening on" not in said:
                said += process.stdout.readline()
            soon(lambda: client.get("/v1/health_check").status_code == 200)
            guarded.accepted = set()
            for _ in range(3):
                said += client.post(CHAT, json=WHOLE).text
            tokens.wait_for_request(4)
            said += client.post(CHAT, json=WHOLE).text + client.get("/v1/health_check").text
            said += client.get("/metrics").text
        finally:
            process.terminate()
            said += process.communicate()[0]
    checked = subprocess.run(
        [sys.executable, "-m", "gateway", "check"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    said += checked.stdout + checked.stderr

    assert "GATEWAY_UPSTREAM_CLIENT_SECRET = (set, hidden)" in said
    assert "the token server answers 401" in said
    assert "an upstream refuses the gateway's token" in said
    assert secret not in said
    assert "token-" not in said
    assert REFUSED not in said.encode()
