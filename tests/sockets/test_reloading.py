"""Files that the settings name, replaced while the gateway serves: by rename, as editors and certbot do it."""

from __future__ import annotations

import hashlib
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway import reloading
from gateway.config.load import load
from gateway.config.secrets import Secrets
from gateway.config.settings import Settings
from tests.support import gateway_process
from tests.support.fake_vllm import EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, chunk
from tests.support.gateway_process import Gateway, running, running_as
from tests.support.paths import AUTHORITY
from tests.support.token_server import CLIENT, SECRET, TokenServer, asked_by

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
OPENAI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
CERTIFICATES = AUTHORITY.parent
KEYS = ["sk-4f7d0c9a2b6e81d35a", "sk-9e01b7c64f2a83d5c7"]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "_EVERY", 0.02)


def replace(file: Path, text: str) -> None:
    other = file.with_name(f"{file.name}~")
    other.write_text(text)
    os.replace(other, file)


def comes(ready: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.01)


def line(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()}\n"


def test_a_revoked_key_is_refused_and_a_new_one_taken(
    fake: FakeVllm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file, hold = tmp_path / "keys", Hold()
    fake.queue([STREAM_HEAD, chunk(EVENTS[0]), hold, *map(chunk, EVENTS[1:]), STREAM_END])
    replace(file, line("one", KEYS[0]))
    with running(fake.url, api_keys_file=str(file)) as gateway, gateway.client() as client:

        def status(key: str) -> int:
            return client.post(CHAT, json=OPENAI, headers={"authorization": f"Bearer {key}"}).status_code

        bearer = {"authorization": f"Bearer {KEYS[0]}"}
        with (
            gateway.client() as other,
            other.stream("POST", CHAT, json={**OPENAI, "stream": True}, headers=bearer) as got,
        ):
            assert hold.reached.wait(10)
            replace(file, line("two", KEYS[1]))
            comes(lambda: status(KEYS[0]) == 401)
            assert status(KEYS[1]) == 200
            hold.release()
            assert got.read().endswith(EVENTS[-1])
        replace(file, line("two", KEYS[0]))
        comes(lambda: status(KEYS[0]) == 200)
    told = [record.getMessage() for record in caplog.records if "keys read again" in record.getMessage()]
    assert told == ["keys read again: 1; new: two; gone: one", "keys read again: 1; changed: two"]


def test_a_renewed_certificate_is_shown_and_its_end_told(
    fake: FakeVllm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "tls.pem"
    replace(file, (CERTIFICATES / "good.pem").read_text())
    with running(fake.url, tls_cert_file=str(file)) as gateway:
        first = ssl.get_server_certificate(("127.0.0.1", gateway.port))
        with gateway.client() as client:
            assert "gateway_certificate_end_timestamp_seconds 4.7335104e+09" in client.get("/metrics").text
            replace(file, (CERTIFICATES / "expired.pem").read_text())
            comes(lambda: ssl.get_server_certificate(("127.0.0.1", gateway.port)) != first)
            assert "gateway_certificate_end_timestamp_seconds 1.6094592e+09" in client.get("/metrics").text
            replace(file, "nonsense")
            comes(lambda: "the certificate stays as it is: GATEWAY_TLS_CERT_FILE" in caplog.text)
            assert client.get("/health").status_code == 200
    assert "certificate read again, good until 2021-01-01 00:00:00 UTC" in caplog.text


def loaded(monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[Settings, Secrets]:
    for name, value in environment.items():
        monkeypatch.setenv(f"GATEWAY_{name}", value)
    settings, secrets, _ = load()
    settings.shortcut, settings.drain_timeout = gateway_process.SHORTCUT, 2
    return settings, secrets


def test_what_upstreams_are_shown_is_what_the_files_hold(
    fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    replace(file, "sk-first")
    given = loaded(monkeypatch, UPSTREAM_API_KEY_FILE=str(file), UPSTREAMS=fake.url)
    with running_as(*given) as gateway, gateway.client() as client:

        def shown() -> str | None:
            assert client.post(CHAT, json=OPENAI).status_code == 200
            return fake.received[-1].header("authorization")

        assert shown() == "Bearer sk-first"
        replace(file, "sk-second\n")
        comes(lambda: shown() == "Bearer sk-second")
        replace(file, "two words")
        time.sleep(0.2)
        assert shown() == "Bearer sk-second"


def test_who_we_are_to_the_token_server_is_what_the_file_holds(
    fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "secret"
    replace(file, "wrong")
    with TokenServer() as tokens:
        given = loaded(
            monkeypatch,
            UPSTREAM_CLIENT_SECRET_FILE=str(file),
            UPSTREAM_TOKEN_URL=f"{tokens.url}/token",
            UPSTREAM_CLIENT_ID=CLIENT,
            UPSTREAMS=fake.url,
        )
        with running_as(*given):
            comes(lambda: [asked_by(one)[1:] for one in tokens.received] == [(CLIENT, "wrong")])
            replace(file, SECRET)
            comes(lambda: asked_by(tokens.received[-1])[1:] == (CLIENT, SECRET))


def test_whom_to_trust_is_what_the_file_holds(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    replace(file, (CERTIFICATES / "other.pem").read_text())

    def state(gateway: Gateway) -> str:
        with gateway.client() as client:
            found: str = client.get("/v1/health_check").json()["upstreams"][0]["state"]
            return found

    with (
        FakeVllm(certificate=CERTIFICATES / "good.pem") as fake,
        running(fake.url, upstream_ca_file=str(file), probe_interval=0.1) as gateway,
    ):
        assert state(gateway) == "down"
        replace(file, AUTHORITY.read_text())
        comes(lambda: state(gateway) == "serving")
        replace(file, (CERTIFICATES / "other.pem").read_text())
        comes(lambda: state(gateway) == "down")
