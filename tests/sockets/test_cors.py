"""Pages of other origins: none may call unless it is named, on both ways in."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.support.fake_vllm import FakeVllm, response
from tests.support.gateway_process import running
from tests.support.ports import free_port

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


# What a browser says of a page of another origin; of an image or a link, it names no origin.
FOREIGN: list[dict[str, str]] = [
    {"origin": EVIL},
    {"origin": "null"},
    {"origin": EVIL, "sec-fetch-site": "cross-site"},
    {"origin": EVIL, "sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("kind", ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", None])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_no_page_calls_as_its_browser_lets_it_unasked(fake: FakeVllm, way: None, path: str, kind: str | None) -> None:
    content = b'{"messages":{"user":"hi"},"streaming":false}'
    typed = {"content-type": kind} if kind else {}
    with running(fake.url) as gateway, gateway.client() as client:
        for page in FOREIGN:
            answer = client.post(path, content=content, headers={**page, **typed})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_page")
            assert "GATEWAY_CORS_ORIGINS" in answer.json()["error"]["message"]
        assert not fake.received
        # Who is no page may say what it likes, as curl does.
        assert client.post(path, content=content, headers=typed).status_code == 200


@pytest.mark.parametrize("page", FOREIGN)
def test_no_page_ends_a_response_or_asks_without_a_body(fake: FakeVllm, way: None, page: dict[str, str]) -> None:
    with running(fake.url, api_keys=SECRET) as gateway, gateway.client() as client:
        for method, path in (
            ("POST", "/v1/responses/resp_a/cancel"),
            ("GET", "/v1/responses/resp_a"),
            ("GET", "/v1/models"),
            ("GET", "/version"),
            ("GET", "/v1/status/stream"),
            ("HEAD", "/metrics"),
            ("GET", "/nowhere"),
        ):
            assert client.request(method, path, headers=page).status_code == 403, path
        upload = client.post("/v1/audio/transcriptions", files={"file": b"RIFF"}, headers={**page, "x-api-key": SECRET})
        assert upload.status_code == 403
        assert not fake.received
        # Platforms ask from wherever they are, and links lead to the page.
        for path in ("/health", "/v1/health_check", "/ping", "/"):
            assert client.get(path, headers=page).status_code == 200, path


def test_our_own_page_and_no_page_may_call(fake: FakeVllm, way: None) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        own = f"127.0.0.1:{gateway.port}"
        proxied = {"origin": "https://gateway.example.com", "sec-fetch-site": "same-origin"}  # which changes Host
        for page in (
            {},
            {"origin": f"http://{own}"},
            {"origin": f"https://{own}"},  # a proxy in front speaks TLS
            {"origin": f"http://{own}", "sec-fetch-site": "same-origin"},
            {"sec-fetch-site": "same-origin"},
            {"sec-fetch-site": "same-site"},
            {"sec-fetch-site": "none"},
            proxied,
        ):
            assert client.get("/version", headers=page).status_code == 200, page
            assert client.post("/v1/responses/resp_a/cancel", headers=page).status_code == 200, page


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
        # What needs no asking is as good as what does.
        page = {**key, "origin": APP, "sec-fetch-site": "cross-site"}
        client.post("/v1/responses", json={"model": "demo", "input": "Hi"}, headers=key)
        own = json.loads(fake.received[-1].body)["request_id"]
        assert client.post(f"/v1/responses/{own}/cancel", headers=page).status_code == 200
        assert client.post(f"/v1/responses/{own}/cancel", headers={**page, "origin": EVIL}).status_code == 403


def test_a_page_that_is_named_may_call_into_a_private_network(fake: FakeVllm, way: None) -> None:
    private = {"access-control-request-private-network": "true"}
    for named, origin, status in ((APP, APP, 200), (APP, EVIL, 400), ("*", EVIL, 400)):
        with running(fake.url, cors_origins=named) as gateway, gateway.client() as client:
            asked = client.options(CHAT, headers={"origin": origin, **ASKS, **private})
            assert asked.status_code == status
            assert asked.headers.get("access-control-allow-private-network") == ("true" if status == 200 else None)
            unasked = client.options(CHAT, headers={"origin": APP, **ASKS})
            assert "access-control-allow-private-network" not in unasked.headers


def test_what_a_page_may_not_is_said_as_all_else_is(fake: FakeVllm, way: None) -> None:
    with running(fake.url, cors_origins=APP) as gateway, gateway.client() as client:
        for origin, method, what in ((EVIL, "POST", "origin"), (APP, "DELETE", "method")):
            asked = client.options(CHAT, headers={"origin": origin, "access-control-request-method": method})
            error = asked.json()["error"]
            assert (asked.status_code, asked.headers["content-type"]) == (400, "application/json")
            assert error["message"].startswith(f"Disallowed CORS {what}: GATEWAY_CORS_ORIGINS")
            assert error["request_id"] == asked.headers["x-request-id"]
            assert allowed(asked) == (APP if origin == APP else None)


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
