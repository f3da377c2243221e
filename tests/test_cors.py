"""Pages of other origins: none may call unless it is named, on both ways in."""

from __future__ import annotations

import httpx
import pytest

from tests.fake_vllm import FakeVllm, response
from tests.gateway_process import running

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
