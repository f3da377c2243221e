"""The error tree: what each error answers, in OpenAI's envelope and at the end of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.settings import Settings, names_of
from gateway.wire.errors import (
    RETRIED,
    BadRequest,
    Draining,
    ForeignMedia,
    ForeignPage,
    GatewayError,
    HeadTimeout,
    HeadTooLarge,
    MethodNotAllowed,
    Misdirected,
    ModelNotFound,
    NoneReady,
    NoSuchResponse,
    NotFound,
    NotServed,
    RateLimited,
    Rejected,
    RequestTimeout,
    Shortage,
    TooLarge,
    TooMany,
    Unauthorized,
    UnsupportedEncoding,
    UnsupportedType,
    UpstreamBroken,
    UpstreamCompressed,
    UpstreamError,
    UpstreamRedirects,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnreachable,
    UrlTooLong,
)
from gateway.wire.sse import Decoder
from tests.support.paths import ROOT

TABLE: list[tuple[GatewayError, int, str, str, str]] = [
    (GatewayError("x"), 500, "server_error", "internal_error", "done"),
    (BadRequest("x"), 400, "invalid_request_error", "bad_request", "done"),
    (ForeignMedia("x"), 400, "invalid_request_error", "bad_request", "done"),
    (Rejected("x"), 400, "invalid_request_error", "bad_request", "done"),
    (Unauthorized("x"), 401, "authentication_error", "invalid_api_key", "refused"),
    (ForeignPage("x"), 403, "permission_error", "foreign_page", "refused"),
    (NotFound("x"), 404, "not_found_error", "path_not_found", "done"),
    (NoSuchResponse("x"), 404, "invalid_request_error", "response_not_found", "done"),
    (NotServed("x"), 404, "not_found_error", "path_not_served", "done"),
    (ModelNotFound("x"), 404, "invalid_request_error", "model_not_found", "done"),
    (MethodNotAllowed("x"), 405, "invalid_request_error", "method_not_allowed", "done"),
    (RequestTimeout("x"), 408, "invalid_request_error", "body_timeout", "timeout:body"),
    (HeadTimeout("x"), 408, "invalid_request_error", "head_timeout", "timeout:head"),
    (TooLarge("x"), 413, "invalid_request_error", "request_too_large", "done"),
    (UrlTooLong("x"), 414, "invalid_request_error", "url_too_long", "done"),
    (UnsupportedType("x"), 415, "invalid_request_error", "unsupported_media_type", "done"),
    (Misdirected("x"), 421, "invalid_request_error", "misdirected_request", "refused"),
    (HeadTooLarge("x"), 431, "invalid_request_error", "head_too_large", "done"),
    (RateLimited("x", retry_after=3), 429, "rate_limit_error", "rate_limit_exceeded", "refused"),
    (UnsupportedEncoding("x"), 415, "invalid_request_error", "unsupported_content_encoding", "done"),
    (TooMany("x"), 429, "rate_limit_error", "too_many_requests", "refused"),
    (Shortage("x"), 503, "server_error", "gateway_shortage", "refused"),
    (Draining("x"), 503, "server_error", "draining", "drained"),
    (UpstreamError("x"), 502, "server_error", "internal_error", "upstream_error"),
    (UpstreamUnreachable("x"), 502, "server_error", "upstream_unreachable", "upstream_error"),
    (UpstreamBroken("x"), 502, "server_error", "upstream_broken", "upstream_error"),
    (UpstreamCompressed(b"gzip"), 502, "server_error", "upstream_compressed", "upstream_error"),
    (UpstreamRedirects(307), 502, "server_error", "upstream_redirects", "upstream_error"),
    (UpstreamRefused(400, b"{}"), 400, "server_error", "upstream_refused", "upstream_error"),
    (UpstreamUnauthorized(), 502, "server_error", "upstream_unauthorized", "upstream_error"),
    (NoneReady("x"), 503, "server_error", "no_upstream_ready", "upstream_error"),
    (UpstreamTimeout("connect", 5), 504, "server_error", "connect_timeout", "timeout:connect"),
    (UpstreamTimeout("first_token", 300), 504, "server_error", "first_token_timeout", "timeout:first_token"),
    (UpstreamTimeout("idle", 60), 504, "server_error", "idle_timeout", "timeout:idle"),
    (UpstreamTimeout("total", 1800), 504, "server_error", "total_timeout", "timeout:total"),
]


def tree(root: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == "gateway.wire.errors":
            yield from tree(kind)


@pytest.mark.parametrize(("error", "status", "kind", "code", "outcome"), TABLE, ids=[row[3] for row in TABLE])
def test_each_error_has_its_status_type_code_and_outcome(
    error: GatewayError, status: int, kind: str, code: str, outcome: str
) -> None:
    assert (error.status, error.type, error.code, error.outcome) == (status, kind, code, outcome)
    assert json.loads(error.envelope("id-1"))["error"]["type"] == kind


def test_an_error_says_whether_to_call_again_as_the_documents_do() -> None:
    rows = ["| Status | `code` | `x-should-retry` |", "|--:|---|---|"]
    # But for a class that has no errors of its own, and those in vLLM's words.
    shown = [error for error, *_ in TABLE if type(error) not in (UpstreamError, UpstreamRefused, NoSuchResponse)]
    told = {error.code: (error.status, str(error.code in RETRIED).lower()) for error in shown}
    rows += [f"| {status} | `{code}` | {retry} |" for code, (status, retry) in sorted(told.items(), key=_by_status)]
    made = "\n".join(rows)
    assert made in (ROOT / "docs/api.md").read_text(), f"put this into docs/api.md:\n{made}"
    assert told.keys() > RETRIED
    for error in shown:
        retries = [value for name, value in error.answer_headers if name == b"x-should-retry"]
        assert retries == [told[error.code][1].encode()]
    assert NoSuchResponse("x").answer_headers == ()


def _by_status(item: tuple[str, tuple[int, str]]) -> tuple[int, str]:
    return item[1][0], item[0]


@pytest.mark.parametrize("which", ["first_token", "idle", "total"])
def test_no_client_calls_again_after_a_limit_in_which_the_model_worked(
    which: Literal["first_token", "idle", "total"],
) -> None:
    assert (b"x-should-retry", b"false") in UpstreamTimeout(which, 5).answer_headers
    assert (b"x-should-retry", b"true") in UpstreamTimeout("connect", 5).answer_headers


def test_every_error_of_the_tree_stands_in_the_table() -> None:
    assert {type(row[0]) for row in TABLE} == set(tree(GatewayError))


def test_the_envelope_is_openais_with_the_request_id_inside() -> None:
    assert json.loads(BadRequest("top_p is wrong.", param="top_p").envelope("id-1")) == {
        "error": {
            "message": "top_p is wrong.",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "bad_request",
            "request_id": "id-1",
        }
    }


@given(st.text(), st.none() | st.text())
def test_an_error_in_a_stream_is_its_envelope_and_then_the_end(message: str, param: str | None) -> None:
    error = BadRequest(message, param=param)
    assert Decoder(limit=10_000).feed(error.event("id-1")) == [error.envelope("id-1"), b"[DONE]"]
    assert json.loads(error.envelope("id-1"))["error"]["message"] == message


@pytest.mark.parametrize("which", ["connect", "first_token", "idle", "total"])
def test_a_timeout_says_how_long_it_waited_and_which_setting_says_so(
    which: Literal["connect", "first_token", "idle", "total"],
) -> None:
    error = UpstreamTimeout(which, 2.5)
    (name,) = names_of(f"{which}_timeout", Settings)
    assert error.message.endswith(f"within 2.5 s ({name}).")
    assert str(error) == error.message


def test_no_upstream_ready_asks_to_come_back_soon() -> None:
    assert (b"retry-after", b"2") in NoneReady("x").headers


def test_a_body_that_stopped_closes_its_connection() -> None:
    assert (b"connection", b"close") in RequestTimeout("x").headers
