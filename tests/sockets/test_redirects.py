"""An upstream that sends its callers elsewhere: no client follows it, nor learns where the upstream is."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.fake_vllm import STREAM_HEAD, FakeVllm, completion, response, stream
from tests.support.gateway_process import running

pytestmark = pytest.mark.usefixtures("way")

CHAT = "/v1/chat/completions"
OPENAI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
ELSEWHERE = "10.9.8.7"
URL = f"http://{ELSEWHERE}:8008{CHAT}"

CALLS: dict[str, dict[str, Any]] = {
    "whole": {"url": CHAT, "json": OPENAI},
    "stream": {"url": CHAT, "json": {**OPENAI, "stream": True}},
    "simplified": {"url": CHAT, "json": {"messages": {"user": "Hi"}, "streaming": False}},
    "simplified stream": {"url": CHAT, "json": {"messages": {"user": "Hi"}}},
    "upload": {"url": "/v1/audio/transcriptions", "files": {"file": b"sound"}},
    "messages": {"url": "/v1/messages", "json": OPENAI},
    "ask": {"url": "/api/v1/ask", "json": {"question": "Hi"}},
}


@pytest.mark.parametrize("status", [300, 301, 302, 303, 305, 307, 308])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_redirect_is_a_502_that_names_the_setting(fake: FakeVllm, call: dict[str, Any], status: int) -> None:
    fake.close_after_probes()
    fake.queue([response(f"{status} Elsewhere", URL.encode(), f"location: {URL}", kind="text/html")])
    with running(fake.url) as gateway, gateway.client() as client:
        got = client.post(**call)
        (line,) = gateway.log(1)
        after = client.post(CHAT, json=OPENAI)

    error = got.json()["error"]
    assert (got.status_code, error["code"], line["outcome"]) == (502, "upstream_redirects", "upstream_error")
    assert f"answers {status}, a redirect" in error["message"]
    assert "GATEWAY_UPSTREAMS" in error["message"]
    assert "location" not in got.headers
    assert ELSEWHERE not in f"{got.headers}{got.text}"
    assert after.status_code == 200


def test_a_redirect_of_what_is_read_is_one_too(fake: FakeVllm) -> None:
    with running(fake.url) as gateway, gateway.client() as client:
        for path in ("/version", "/v1/responses/resp_1"):
            fake.queue([response("302 Found", b"", f"location: {URL}")])
            got = client.get(path)
            assert (got.status_code, got.json()["error"]["code"]) == (502, "upstream_redirects")
            assert "location" not in got.headers


def test_what_has_not_changed_is_no_redirect(fake: FakeVllm) -> None:
    fake.queue([b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\n\r\n'])
    with running(fake.url) as gateway, gateway.client() as client:
        got = client.get("/version", headers={"if-none-match": '"a"'})
    assert (got.status_code, got.headers["etag"]) == (304, '"a"')


HEADERS = [
    *(f"Location: {URL}", f"Content-Location: {URL}", f"Refresh: 0; url={URL}", f"Link: <{URL}>; rel=next"),
    *(f'Alt-Svc: h2="{ELSEWHERE}:443"', f"Via: 1.1 {ELSEWHERE}", f"Forwarded: host={ELSEWHERE}"),
    *(f"Set-Cookie: a=b; Domain={ELSEWHERE}", f'WWW-Authenticate: Bearer realm="{ELSEWHERE}"'),
    *(f"X-Forwarded-Host: {ELSEWHERE}", f"X-Forwarded-Server: {ELSEWHERE}", f"X-Served-By: {ELSEWHERE}"),
    *(
        f"X-Backend-Server: {ELSEWHERE}",
        f"X-Upstream-Addr: {ELSEWHERE}",
        f"X-Envoy-Decorator-Operation: {ELSEWHERE}:80/*",
    ),
    *(f"Server: {ELSEWHERE}", "Retry-After: 3", "X-Kept: 1"),
]


def test_no_header_of_an_answer_tells_where_the_upstream_is(fake: FakeVllm) -> None:
    head = STREAM_HEAD.replace(b"\r\n\r\n", ("\r\n" + "\r\n".join(HEADERS) + "\r\n\r\n").encode())
    early = f"HTTP/1.1 103 Early Hints\r\nlink: <{URL}>\r\n\r\n".encode()
    with running(fake.url) as gateway, gateway.client() as client:
        for status in ("200 OK", "201 Created", "401 Unauthorized", "404 Not Found", "500 Internal Server Error"):
            fake.queue([early + response(status, completion(), *HEADERS)])
            got = client.post(CHAT, json=OPENAI)
            assert str(got.status_code) == status[:3]
            assert ELSEWHERE not in str(got.headers)
            assert (got.headers["retry-after"], got.headers["x-kept"]) == ("3", "1")
        fake.queue([head, *stream([b"data: [DONE]\n\n"])[1:]])
        got = client.post(CHAT, json={**OPENAI, "stream": True})
        assert (got.status_code, got.headers["x-kept"]) == (200, "1")
        assert ELSEWHERE not in str(got.headers)
        fake.queue([response("200 OK", completion(), *HEADERS)])
        assert ELSEWHERE not in str(client.post(CHAT, json={"messages": "Hi", "streaming": False}).headers)


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_one_that_redirects_its_probes_is_down_and_why_is_said(fake: FakeVllm, path: str) -> None:
    fake.probe_answers[path] = response("301 Moved Permanently", b"", f"location: https://{ELSEWHERE}{path}")
    with running(fake.url) as gateway, gateway.client() as client:
        told = client.get("/v1/health_check")
    (upstream,) = told.json()["upstreams"]
    assert (told.status_code, upstream["state"]) == (503, "down")
    assert f"its {path} answers 301, a redirect, which is not followed: GATEWAY_UPSTREAMS" in upstream["why"]
    assert ELSEWHERE not in told.text
    assert all(probe.target in ("/health", "/v1/models") for probe in fake.probed)
