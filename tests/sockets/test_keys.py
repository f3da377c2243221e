"""Keys: who may call, how often, and what those see who may not; on both ways in."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.keys import BadKeys, Key, Keys, from_lines, from_secrets
from gateway.config.environment import SettingsError
from gateway.config.load import load
from tests.sockets.test_routes import OLDER
from tests.support.fake_vllm import FakeVllm, Hold, Step, completion, response
from tests.support.gateway_process import Gateway, running
from tests.support.paths import CERTIFICATES
from tests.support.ports import free_port

CHAT = "/v1/chat/completions"
SECRET = "sk-4f7d0c9a2b6e81d35a"
OTHER = "sk-other-1234567890abc"
CALL = {"messages": {"user": "hi"}, "streaming": False}
OPEN = ["/", "/health", "/ping", "/v1/health_check"]
CLOSED = ["/metrics", "/v1/status", "/v1/statistics", "/openapi.json", "/v1/models", "/version"]


def soon(ready: Callable[[], bool]) -> None:
    """Ask until it is so."""
    until = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.01)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@pytest.fixture
def guarded(fake: FakeVllm, way: None) -> Iterator[Gateway]:
    with running(fake.url, api_keys=f"{SECRET},{OTHER}") as gateway:
        yield gateway


@pytest.fixture
def client(guarded: Gateway) -> Iterator[httpx.Client]:
    with guarded.client() as client:
        yield client


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {SECRET}"},
        {"authorization": f"bearer  {SECRET}"},
        {"x-api-key": SECRET},
        {"api-key": SECRET},
        {"x-api-key": SECRET, "authorization": f"Bearer {OTHER}"},
        {"x-api-key": SECRET, "api-key": OTHER},
    ],
)
def test_who_brings_a_key_may_call_and_the_key_goes_no_further(
    client: httpx.Client, fake: FakeVllm, guarded: Gateway, headers: dict[str, str]
) -> None:
    for _ in range(3):  # the shortcut knows a head again
        assert client.post(CHAT, json=CALL, headers=headers).status_code == 200
    for path in CLOSED:
        assert client.get(path, headers=headers).status_code == 200
    for received in fake.received:
        assert not [value for name, value in received.headers if SECRET in value or OTHER in value], received.headers
    lines = guarded.log(3)
    assert SECRET not in str(lines)
    assert {line["key"] for line in lines} <= {"key-1", "key-2"}


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "A key is needed"),
        ({"authorization": ""}, "A key is needed"),
        ({"authorization": "Bearer"}, "A key is needed"),
        ({"authorization": f"Basic {SECRET}"}, "A key is needed"),
        ({"x-api-key": ""}, "A key is needed"),
        ({"api-key": ""}, "A key is needed"),
        ({"api-key": f"{SECRET}x"}, "none of this gateway's"),
        ({"api-key": SECRET, "x-api-key": "nonsense"}, "none of this gateway's"),
        ({"authorization": f"Bearer {SECRET}x"}, "none of this gateway's"),
        ({"authorization": f"Bearer {SECRET[:-1]}"}, "none of this gateway's"),
        ({"authorization": f"Bearer {SECRET.upper()}"}, "none of this gateway's"),
        ({"authorization": f"Bearer {SECRET},{OTHER}"}, "none of this gateway's"),
        ({"x-api-key": digest(SECRET)}, "none of this gateway's"),
        ({"authorization": "Bearer nonsense", "x-api-key": SECRET}, "none of this gateway's"),
    ],
)
def test_who_brings_none_may_not(client: httpx.Client, fake: FakeVllm, headers: dict[str, str], said: str) -> None:
    for path in [CHAT, "/v1/embeddings", "/v1/audio/transcriptions", *OLDER]:
        got = client.post(path, json=CALL, headers=headers)
        assert (got.status_code, got.headers["www-authenticate"]) == (401, "Bearer"), path
        assert said in got.json()["error"]["message"]
        assert got.json()["error"]["code"] == "invalid_api_key"
        assert SECRET not in got.text
    for path in CLOSED:
        assert client.get(path, headers=headers).status_code == 401, path
    assert fake.received == []


def test_a_key_twice_is_none(guarded: Gateway) -> None:
    line = f"authorization: Bearer {SECRET}\r\n"
    with guarded.connect() as connection:
        connection.sendall(f"GET /v1/models HTTP/1.1\r\nhost: a\r\n{line}{line}\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 401"


def test_anthropics_clients_are_refused_in_their_words(client: httpx.Client) -> None:
    got = client.post("/v1/messages", json={})
    assert (got.status_code, got.json()["type"], got.json()["error"]["type"]) == (401, "error", "authentication_error")


def test_the_next_call_on_a_connection_brings_a_key_of_its_own(guarded: Gateway) -> None:
    body = b'{"messages":{"user":"hi"},"streaming":false}'
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n".encode()
    key = f"authorization: Bearer {SECRET}\r\n".encode()
    with guarded.connect() as connection, connection.makefile("rb") as answers:
        for more, status in ((key, b"200"), (b"", b"401"), (key, b"200"), (key, b"200"), (b"", b"401")):
            connection.sendall(head + more + b"\r\n" + body)
            assert answers.readline().split()[1] == status
            length = 0
            while (line := answers.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            answers.read(length)


def test_probes_are_open_and_name_no_upstream(client: httpx.Client, fake: FakeVllm) -> None:
    for path in OPEN:
        got = client.get(path)
        assert got.status_code == 200
        assert str(fake.port) not in got.text
    assert client.get("/v1/health_check").json()["upstreams"][0]["state"] == "serving"
    got = client.get("/v1/health_check", headers={"x-api-key": OTHER})
    assert got.json()["upstreams"][0]["url"] == fake.url


def test_without_keys_all_is_open(fake: FakeVllm, way: None) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        for path in (*OPEN, *CLOSED):
            assert client.get(path).status_code == 200
        assert client.post(CHAT, json=CALL, headers={"authorization": "Bearer nonsense"}).status_code == 200


@pytest.mark.parametrize("certificate", ["other", "expired"])
def test_no_error_and_no_probe_tells_where_an_upstream_is(certificate: str, way: None) -> None:
    file = CERTIFICATES / f"{certificate}.pem"
    with FakeVllm(certificate=file) as fake:
        settings = {"api_keys": SECRET, "upstream_ca_file": str(CERTIFICATES / "authority.pem")}
        with running(fake.url, **settings) as gateway, gateway.client() as client:
            for told in (client.get("/v1/health_check"), client.post(CHAT, json=CALL, headers={"x-api-key": SECRET})):
                assert told.status_code == 503
                assert "127.0.0.1" not in told.text
                assert str(fake.port) not in told.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_nor_do_those_of_one_that_is_not_there(host: str, way: None) -> None:
    port = free_port()
    with running(f"http://{host}:{port}", api_keys=SECRET) as gateway, gateway.client() as client:
        for told in (client.get("/v1/health_check"), client.post(CHAT, json=CALL, headers={"x-api-key": SECRET})):
            assert told.status_code == 503
            assert host not in told.text
            assert str(port) not in told.text


def test_a_refusal_reads_no_body(client: httpx.Client, fake: FakeVllm) -> None:
    assert client.post(CHAT, content=b"no JSON").status_code == 401
    assert client.post(CHAT, content=b"", headers={"content-encoding": "gzip"}).status_code == 401


def test_a_key_has_its_requests_a_minute(fake: FakeVllm, way: None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"few {digest(SECRET)} 3\nmany {digest(OTHER)}\n")
    with running(fake.url, api_keys_file=str(file)) as gateway, gateway.client() as client:
        few, many = {"x-api-key": SECRET}, {"x-api-key": OTHER}
        for left in (2, 1, 0):
            got = client.post(CHAT, json={**CALL, "streaming": left == 1}, headers=few)
            assert got.status_code == 200
            assert got.headers["x-ratelimit-limit-requests"] == "3"
            assert got.headers["x-ratelimit-remaining-requests"] == str(left)
            assert got.headers["x-ratelimit-reset-requests"].endswith("s")
        got = client.post(CHAT, json=CALL, headers=few)
        assert (got.status_code, got.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 15 <= int(got.headers["retry-after"]) <= 20
        assert got.headers["x-ratelimit-remaining-requests"] == "0"
        assert got.json()["error"]["message"].startswith("The key few has made its 3 requests of this minute")
        for _ in range(5):
            got = client.post(CHAT, json=CALL, headers=many)
            assert got.status_code == 200
            assert not [name for name in got.headers if "ratelimit" in name]
        fake.queue([response("400 Bad Request", b"{}")])
        assert client.post(CHAT, json=CALL, headers=many).status_code == 400


def test_the_file_is_read_again(fake: FakeVllm, tmp_path: Path) -> None:
    file, port = tmp_path / "keys", free_port()
    file.write_text(f"one {digest(SECRET)}\n")
    environment = {"GATEWAY_PORT": str(port), "GATEWAY_HOST": "127.0.0.1", "GATEWAY_UPSTREAMS": fake.url}
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve"],
        env={**os.environ, **environment, "GATEWAY_API_KEYS_FILE": str(file)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "Uvicorn running" in line or "listening" in line:
                    break
            transport_ready(client)
            assert status(client, SECRET) == 200
            for content, said, first, second in (
                (f"two {digest(OTHER)}\n", "keys read again: 1", 401, 200),
                ("nonsense\n", "the keys stay as they are", 401, 200),
                (f"one {digest(SECRET)}\ntwo {digest(OTHER)}\n", "keys read again: 2", 200, 200),
            ):
                file.write_text(content)
                process.send_signal(signal.SIGHUP)
                while said not in process.stdout.readline():
                    pass
                assert (status(client, SECRET), status(client, OTHER)) == (first, second)
        finally:
            process.terminate()
    assert process.returncode == 0


def transport_ready(client: httpx.Client) -> None:
    """Wait until it listens and has looked at its upstream."""
    while True:
        try:
            if client.get("/v1/health_check").status_code == 200:
                return
        except httpx.ConnectError:
            continue


def status(client: httpx.Client, secret: str) -> int:
    return client.get("/v1/models", headers={"x-api-key": secret}).status_code


def test_names_that_stay_are_counted_on() -> None:
    keys = Keys(from_lines(f"few {digest(SECRET)} 2\n"))
    before = keys.find(bytes.fromhex(digest(SECRET)))
    assert before is not None
    assert [before.take(0.0), before.take(0.0)] == [0.0, 0.0]
    keys.replace(from_lines(f"few {digest(OTHER)} 2\nnew {digest(SECRET)} 2\n"))
    few, new = keys.find(bytes.fromhex(digest(OTHER))), keys.find(bytes.fromhex(digest(SECRET)))
    assert few is not None
    assert new is not None
    assert few.take(0.0) > 0
    assert new.take(0.0) == 0


@given(st.integers(1, 50), st.lists(st.floats(0, 40), max_size=200))
def test_no_minute_has_more_than_a_minutes_requests_twice_over(a_minute: int, gaps: list[float]) -> None:
    key, now, taken = Key("k", a_minute), 0.0, []
    for gap in gaps:
        now += gap
        wait = key.take(now)
        left, reset = key.left(now)
        assert 0 <= left <= a_minute
        assert 0 <= reset <= 60 + 1e-6
        if wait:
            assert left == 0
            assert math.isclose(key.take(now + wait + 1e-3), 0.0)
            now += wait + 1e-3
        taken.append(now)
    for at, start in enumerate(taken):
        within = [one for one in taken[at:] if one < start + 60]
        assert len(within) <= 2 * a_minute


@pytest.mark.parametrize(
    ("secrets", "said"),
    [
        (["short"], "key 1 is weak"),
        ([SECRET, "a" * 40], "key 2 is weak"),
        (["with a space in it, and long"], "printable ASCII characters without spaces"),
        ([SECRET, SECRET], "key 2 stands there twice"),
    ],
)
def test_weak_keys_are_refused_and_not_shown(secrets: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadKeys, match=said):
        from_secrets(secrets)
    monkeypatch.setenv("GATEWAY_API_KEYS", ",".join(secrets))
    if " " not in secrets[0]:
        with pytest.raises(SettingsError, match=said) as raised:
            load()
        assert not [secret for secret in secrets if secret in str(raised.value)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has no key"),
        ("# nothing\n\n", "it has no key"),
        ("name", "line 1 must be NAME SHA256"),
        (f"# a\nname {digest('a')} 0", "line 2 must be"),
        (f"name {digest('a')} many", "line 1 must be"),
        (f"na/me {digest('a')}", "line 1 must be"),
        (f"name {digest('a')[:-1]}", "line 1 must be"),
        (f"name {digest('')}", "line 1 has the SHA-256 of nothing"),
        (f"a {digest('a')}\nb {digest('a')}", "line 2 has a name or a key that another line has"),
        (f"a {digest('a')}\na {digest('b')}", "line 2 has a name or a key that another line has"),
        (b"\xff", "it is not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_wrong_stops_the_start(
    text: str | bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    monkeypatch.setenv("GATEWAY_API_KEYS_FILE", str(file))
    with pytest.raises(SettingsError) as raised:
        load()
    assert said in str(raised.value)
    assert str(raised.value).startswith(f"GATEWAY_API_KEYS_FILE '{file}' ")


def test_a_file_may_have_notes_and_upper_case() -> None:
    found = from_lines(f"# keys\n  a  {digest('a').upper()}   60 # for tests\n\nb\t{digest('b')}\n")
    assert [(key.name, key.a_minute) for key in found.values()] == [("a", 60), ("b", None)]


def test_a_line_may_bound_what_runs_and_what_waits() -> None:
    text = f"a {digest('a')} 60 in-flight=2 waiting=3\nb {digest('b')} waiting=4\nc {digest('c')}\n"
    a, b, c = from_lines(text, max_in_flight=9).values()
    assert (a.a_minute, a.max_in_flight, a.max_waiting) == (60, 2, 3)
    assert (b.a_minute, b.max_in_flight, b.max_waiting) == (None, 9, 4)
    assert (c.a_minute, c.max_in_flight, c.max_waiting) == (None, 9, None)
    assert from_lines(f"a {digest('a')} tokens=9 models=x,y\n").popitem()[1].models == frozenset("xy")
    wrong = ("in-flight=0", "in-flight=x", "waiting=", "tokens", "tokens=-1", "other=3", "waiting=1 waiting=2")
    for word in (*wrong, "models=", "models=a,", "models=a models=b"):
        with pytest.raises(BadKeys, match="line 1 must be NAME SHA256"):
            from_lines(f"a {digest('a')} {word}\n")


@pytest.mark.usefixtures("way")
def test_a_key_is_for_the_models_of_its_line(fake: FakeVllm, tmp_path: Path) -> None:
    secret = "few-4f7d0c9a2b6e81d35a"
    (tmp_path / "keys").write_text(f"few {digest(secret)} models=demo,other\n")
    with running(fake.url, api_keys_file=tmp_path / "keys") as gateway, gateway.client() as client:
        client.headers["x-api-key"] = secret
        messages = [{"role": "user", "content": "Hi."}]
        assert client.post(CHAT, json={"model": "demo", "messages": messages}).status_code == 200
        assert client.post(CHAT, json={"messages": {"user": "Hi."}, "streaming": False}).status_code == 200
        assert client.get("/v1/models").status_code == 200
        refused = client.post(CHAT, json={"model": "third", "messages": messages})
        unsaid = client.post(CHAT, json={"messages": messages})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "path_not_served")
    assert refused.json()["error"]["message"] == "The key few is not for the model 'third'; it is for demo, other."
    assert unsaid.json()["error"]["message"] == (
        "The key few is not for a call that does not say of which model; it is for demo, other."
    )


@pytest.mark.usefixtures("way")
def test_a_key_may_be_for_another_name_of_a_model(fake: FakeVllm, tmp_path: Path) -> None:
    secret = "few-4f7d0c9a2b6e81d35a"
    (tmp_path / "keys").write_text(f"few {digest(secret)} models=fast\n")
    settings = {"api_keys_file": tmp_path / "keys", "model_aliases": "fast=demo,slow=demo"}
    with running(fake.url, **settings) as gateway, gateway.client() as client:
        client.headers["x-api-key"] = secret
        told = []
        for model in ("fast", "slow", "demo"):
            for call in ({"messages": [{"role": "user", "content": "Hi."}]}, {"messages": {"user": "Hi."}}):
                told.append(client.post(CHAT, json={"model": model, **call}).status_code)
    assert told == [200, 200, 404, 404, 404, 404]


@pytest.mark.usefixtures("way")
def test_a_key_has_its_tokens_of_a_minute(fake: FakeVllm, tmp_path: Path) -> None:
    secret = "few-4f7d0c9a2b6e81d35a"
    (tmp_path / "keys").write_text(f"few {digest(secret)} tokens=2000\n")
    hold = Hold()
    fake.queue([hold, response("200 OK", completion())])
    with (
        running(fake.url, api_keys_file=tmp_path / "keys") as gateway,
        gateway.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        client.headers["x-api-key"] = secret
        call = {"model": "demo", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 1000, "n": 2}
        first = pool.submit(client.post, CHAT, json=call)
        fake.wait_for_request()
        refused = client.post(CHAT, json=call)
        hold.release()
        answered = first.result(20)
        again = client.post(CHAT, json=call)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert "has used its 2000 tokens of this minute: try again in " in refused.json()["error"]["message"]
    assert 30 <= int(refused.headers["retry-after"]) <= 57
    assert refused.headers["x-ratelimit-limit-tokens"] == "2000"
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    assert float(refused.headers["x-ratelimit-reset-tokens"][:-1]) > 30
    assert answered.status_code == again.status_code == 200


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("asked", [-(10**12), 0, 9 * 10**18, True, 1.5])
def test_whatever_number_is_asked_for_a_key_keeps_its_tokens(fake: FakeVllm, tmp_path: Path, asked: float) -> None:
    secret = "few-4f7d0c9a2b6e81d35a"
    (tmp_path / "keys").write_text(f"few {digest(secret)} tokens=60000\n")
    with running(fake.url, api_keys_file=tmp_path / "keys") as gateway, gateway.client() as client:
        client.headers["x-api-key"] = secret
        call = {"model": "demo", "messages": [{"role": "user", "content": "Hi."}], "n": 128}
        fake.queue([response("400 Bad Request", b"{}")])
        client.post(CHAT, json={**call, "max_tokens": asked})
        fake.clear()
        for _ in range(3):
            answered = client.post(CHAT, json={**call, "max_tokens": 1})
            assert answered.status_code == 200


@pytest.mark.usefixtures("way")
def test_a_key_that_takes_all_room_makes_another_wait_one_turn(fake: FakeVllm, tmp_path: Path) -> None:
    many, few = "many-4f7d0c9a2b6e81d35a", "few-4f7d0c9a2b6e81d35a"
    (tmp_path / "keys").write_text(f"many {digest(many)}\nfew {digest(few)} waiting=2\n")
    holds = [Hold() for _ in range(9)]
    scripts: list[list[Step]] = [[hold, response("200 OK", b"{}")] for hold in holds]
    fake.queue(*scripts)
    limits = {"max_in_flight": 2, "max_queue": 4, "api_keys_file": tmp_path / "keys"}

    with running(fake.url, **limits) as gateway, gateway.client() as client, ThreadPoolExecutor(12) as pool:

        def ask(key: str) -> int:
            body = {"model": "demo", "messages": [], "user": key.partition("-")[0]}
            got: httpx.Response = client.post(CHAT, json=body, headers={"authorization": f"Bearer {key}"})
            return got.status_code

        first = [pool.submit(ask, many) for _ in range(6)]
        fake.wait_for_request(2)
        soon(lambda: "gateway_waiting 4.0" in client.get("/metrics", headers={"x-api-key": many}).text)
        other = pool.submit(ask, few)
        soon(lambda: sum(one.done() for one in first) == 1)  # the newest gave way
        holds[0].release()
        holds[1].release()
        assert b'"few"' in fake.wait_for_request(3).body + fake.wait_for_request(4).body
        for hold in holds:
            hold.release()
        assert other.result(20) == 200
        assert sorted(one.result(20) for one in first) == [200] * 5 + [429]
