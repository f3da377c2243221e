"""Pages of other origins: none may call unless it is named, on both ways in."""

from __future__ import annotations

import httpx
import pytest

from tests.support.fake_vllm import FakeVllm, response
from tests.support.gateway_process import free_port, running

CHAT = "/v1/chat/completions"
APP, EVIL = "https://app.example.com", "https://evil.example.com"
CALL = {"messages": {"user": "hi"}, "streaming": False}
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
SECRET = "sk-4f7d0c9a2b6e81d35a"


def allowed(answer: httpx.Response) -> str | None:
    value: str | None = answer.headers.get("access-control-allow-origin")
    return value


def test_no_page_of_another_origin_may_call(fake: FakeVllm, way: None) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        assert client.options(CHAT, headers={"origin": APP, **ASKS}).status_code == 405
        # As vLLM does, which lets every page read.
        fake.queue([response("200 OK", b"{}", "access-control-allow-origin: *", "access-control-expose-headers: a")])
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
        answer = client.post(CHAT, json=body, headers={"origin": APP})
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert fake.received[-1].header("origin") is None


@pytest.mark.parametrize("kind", ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_no_page_calls_as_its_browser_lets_it_unasked(fake: FakeVllm, way: None, path: str, kind: str | None) -> None:
    content = b'{"messages":{"user":"hi"},"streaming":false}'
    with running(fake.url) as gateway, gateway.client() as client:
        for origin in (EVIL, "null"):
            headers = {"origin": origin, **({"content-type": kind} if kind else {})}
            answer = client.post(path, content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert not fake.received
        assert client.get("/v1/models", headers={"origin": EVIL}).status_code == 200
        # Who is no page may say what it likes, as curl does.
        assert client.post(path, content=content, headers={"content-type": kind} if kind else {}).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_pages_that_are_named_may(fake: FakeVllm, way: None, streams: bool) -> None:
    named = f"{APP},http://localhost:3000"
    with running(fake.url, cors_origins=named, api_keys=SECRET) as gateway, gateway.client() as client:
        asked = client.options(CHAT, headers={"origin": APP, **ASKS})
        assert (asked.status_code, allowed(asked)) == (200, APP)
        assert "authorization" in asked.headers["access-control-allow-headers"]
        key = {"x-api-key": SECRET}
        for headers in (key, {**key, "origin": APP}, key):  # one without takes the shortcut before and after
            answer = client.post(CHAT, json={**CALL, "streaming": streams}, headers=headers)
            assert (answer.status_code, allowed(answer)) == (200, headers.get("origin"))
        assert allowed(client.post(CHAT, json=CALL, headers={"origin": APP})) == APP  # and read why it may not
        refused = client.options(CHAT, headers={"origin": EVIL, **ASKS})
        assert (refused.status_code, allowed(refused)) == (400, None)
        assert allowed(client.post(CHAT, json=CALL, headers={**key, "origin": EVIL})) is None


def test_all_may_where_that_is_said(fake: FakeVllm, way: None) -> None:
    with running(fake.url, cors_origins="*") as gateway, gateway.client() as client:
        assert allowed(client.post(CHAT, json=CALL, headers={"origin": EVIL})) == "*"


def preflight(path: str = CHAT, host: bytes = b"host: a\r\n", version: str = "1.1", more: bytes = b"") -> bytes:
    asks = f"origin: {APP}\r\naccess-control-request-method: POST\r\nconnection: close\r\n"
    return f"OPTIONS {path} HTTP/{version}\r\n".encode() + host + asks.encode() + more + b"\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (preflight(), b"200"),
        (preflight(host=b""), b"400"),
        (preflight(host=b"host: a\r\nhost: b\r\n"), b"400"),
        (preflight(version="2.0"), b"400"),
        (preflight(path="/%2e"), b"404"),
        (preflight(path="/" + "a" * 9000), b"414"),
        (preflight(more=b"x: y\r\n" * 100), b"431"),
    ],
)
def test_what_a_browser_asks_first_is_a_request_like_others(
    fake: FakeVllm, way: None, sent: bytes, status: bytes
) -> None:
    with running(fake.url, cors_origins=APP) as gateway:
        with gateway.connect() as connection:
            connection.sendall(sent)
            got = b""
            while piece := connection.recv(65536):
                got += piece
        assert got.startswith(b"HTTP/1.1 " + status)
        assert f"access-control-allow-origin: {APP}\r\n".encode() in got
        assert got.count(b"\r\nx-request-id: ") == 1
        (line,) = gateway.log(1)
        assert (line["method"], line["status"]) == ("OPTIONS", int(status))


@pytest.mark.parametrize("named", [APP, "*"])
def test_no_page_reads_metrics_on_a_port_of_their_own(fake: FakeVllm, way: None, named: str) -> None:
    port = free_port()
    with running(fake.url, cors_origins=named, metrics_port=port) as gateway, gateway.client() as client:
        own = gateway.url.replace(str(gateway.port), str(port))
        told = client.get(f"{own}/metrics", headers={"origin": APP})
        assert (told.status_code, allowed(told)) == (200, None)
        for path, status in (("/metrics", 405), (CHAT, 404)):
            asked = client.options(f"{own}{path}", headers={"origin": APP, **ASKS})
            assert (asked.status_code, allowed(asked)) == (status, None)
