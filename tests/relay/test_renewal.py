"""What an exchange does when an upstream refuses what it is shown, scripted."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.relay.upload import HELD
from gateway.upstream.credentials import FixedKey
from gateway.wire.errors import NoneReady
from gateway.wire.heads import answer_head
from tests.relay.test_exchange import JSON, OPENAI_STREAM, OPENAI_WHOLE, sent_off, whole_answer
from tests.support.fake_vllm import completion
from tests.support.recorders import TRANSCRIPTIONS, Conversation, CredentialsRecorder


def refused(body: object = OPENAI_WHOLE, **settings: Any) -> tuple[Conversation, CredentialsRecorder]:
    """A conversation whose upstream has answered 401."""
    shown = CredentialsRecorder()
    talk = sent_off(body, credentials=shown, **settings)
    talk.head(401, JSON)
    return talk, shown


@pytest.mark.parametrize("body", [OPENAI_WHOLE, OPENAI_STREAM, {"messages": "Hi.", "streaming": False}])
def test_a_refused_token_is_renewed_and_the_request_sent_once_more(body: object) -> None:
    talk, shown = refused(body)
    assert (shown.refused, talk.client.status) == (["Bearer one"], 0)
    assert len(talk.transport.asked) == 1
    talk.exchange.upstream_body(b"Unauthorized")
    talk.exchange.upstream_end()
    shown.tell()
    assert talk.transport.asked == [(talk.upstreams[0], False)] * 2
    talk.connect(reused=True)
    first, second = talk.connections
    assert (first.given_back, first.request_body) == ("discarded", second.request_body)
    assert dict(first.request_headers)[b"authorization"] == b"Bearer one"
    assert dict(second.request_headers)[b"authorization"] == b"Bearer two"
    talk.exchange.upstream_answer(*whole_answer(body))
    assert (talk.client.status, talk.exchange.outcome) == (200, "done")
    assert talk.upstreams[0].broken_in_a_row == 0
    talk.assert_settled()


def test_a_refusal_in_one_read_is_one_too() -> None:
    shown = CredentialsRecorder()
    talk = sent_off(OPENAI_WHOLE, credentials=shown)
    talk.exchange.upstream_answer(answer_head(401, JSON)[0], b"Unauthorized")
    assert (shown.refused, talk.client.status) == (["Bearer one"], 0)
    shown.tell()
    talk.connect()
    talk.exchange.upstream_answer(answer_head(200, JSON)[0], completion())
    assert talk.client.status == 200
    talk.assert_settled()


def test_what_is_refused_twice_is_a_502_and_held_against_the_upstream() -> None:
    talk, shown = refused()
    shown.tell()
    talk.connect()
    talk.head(401, JSON)
    assert (talk.client.status, talk.client.error["code"]) == (502, "upstream_unauthorized")
    assert talk.client.header(b"www-authenticate") is None
    assert (shown.refused, talk.upstreams[0].broken_in_a_row) == (["Bearer one"], 1)
    assert talk.connections[1].given_back == "discarded"
    talk.assert_settled()


def test_where_there_is_no_new_token_the_client_is_told_why() -> None:
    talk, shown = refused()
    shown.tell(NoneReady("There is none."))
    assert (talk.client.status, talk.client.error["message"]) == (503, "There is none.")
    assert talk.client.header(b"retry-after") == b"2"
    talk.assert_settled()


def test_a_fixed_keys_401_is_the_upstreams_own() -> None:
    talk = sent_off(OPENAI_WHOLE, credentials=FixedKey("k"))
    talk.head(401, JSON)
    talk.exchange.upstream_body(b"Unauthorized")
    talk.exchange.upstream_end()
    assert (talk.client.status, talk.client.content) == (401, b"Unauthorized")
    assert len(talk.transport.asked) == 1
    talk.assert_settled()


def test_without_a_token_nothing_is_asked_of_an_upstream() -> None:
    talk = Conversation(credentials=CredentialsRecorder(None))
    talk.begin()
    assert (talk.client.status, talk.client.error["code"]) == (503, "no_upstream_ready")
    assert "no token" in talk.client.error["message"]
    assert talk.client.header(b"retry-after") == b"2"
    assert talk.transport.asked == []
    talk.assert_settled()


@pytest.mark.parametrize("upload", [False, True])
def test_a_token_that_runs_out_while_the_upstream_is_dialled_is_not_sent(upload: bool) -> None:
    shown = CredentialsRecorder()
    if upload:
        headers = ((b"content-type", b"multipart/form-data; boundary=b"),)
        talk = Conversation(route=TRANSCRIPTIONS, headers=headers, credentials=shown)
        talk.begin()
        talk.exchange.request_body(b"x" * (HELD + 1))
    else:
        talk = Conversation(credentials=shown)
        talk.ask(OPENAI_WHOLE)
    shown.value = None
    connection = talk.connect()
    assert (connection.sent, connection.given_back) == (b"", "released")
    assert talk.client.status == 503
    talk.assert_settled()


def test_who_leaves_while_a_token_is_awaited_leaves_nothing() -> None:
    talk, shown = refused()
    talk.leave()
    talk.assert_settled()
    shown.tell()
    assert len(talk.transport.asked) == 1


@pytest.mark.parametrize(
    ("body", "seconds", "code"), [(OPENAI_STREAM, 32, "first_token_timeout"), (OPENAI_WHOLE, 103, "total_timeout")]
)
def test_limits_hold_while_a_token_is_awaited(body: object, seconds: float, code: str) -> None:
    talk, shown = refused(body)
    talk.clock.advance(seconds - 1)
    assert talk.client.status == 0
    talk.clock.advance(1.125)
    assert talk.client.error["code"] == code
    shown.tell()
    talk.assert_settled()


def test_the_end_of_the_drain_is_the_end_of_the_waiting_for_a_token() -> None:
    talk, shown = refused()
    talk.path.drain.ends_at = talk.clock.now
    talk.clock.advance(0.125)
    assert (talk.client.status, talk.client.error["code"]) == (503, "draining")
    shown.tell()
    talk.assert_settled()


@pytest.mark.parametrize("all_came", [False, True])
def test_an_upload_is_not_sent_again_but_has_the_token_renewed(all_came: bool) -> None:
    shown = CredentialsRecorder()
    headers = ((b"content-type", b"multipart/form-data; boundary=b"),)
    talk = Conversation(route=TRANSCRIPTIONS, headers=headers, credentials=shown)
    talk.begin()
    talk.exchange.request_body(b"x" * (HELD + 1))
    talk.connect()
    if all_came:
        talk.exchange.request_end()
    talk.head(401, JSON)
    assert (talk.client.status, talk.client.error["code"]) == (503, "no_upstream_ready")
    assert "send the request again" in talk.client.error["message"]
    assert (shown.refused, talk.upstreams[0].broken_in_a_row) == (["Bearer one"], 0)
    shown.tell()
    assert len(talk.transport.asked) == 1
    talk.assert_settled()
