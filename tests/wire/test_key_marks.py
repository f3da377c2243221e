"""The marks of a key: an id says whose it is to who knows the key, and nothing to anybody else."""

from __future__ import annotations

import hashlib
import re

import orjson
import pytest

from gateway.wire.errors import NoSuchResponse
from gateway.wire.heads import new_request_id
from gateway.wire.key_marks import KeyMarks, check_owner
from gateway.wire.routes import RESPONSE_ID, ROUTES

MINE, THEIRS = (hashlib.sha256(secret).digest() for secret in (b"mine", b"theirs"))


def response_id(digest: bytes, call_id: str | None = None) -> str:
    return KeyMarks(digest, call_id or new_request_id(), salts=False).fields({})["request_id"]


def salt(digest: bytes, **body: object) -> str:
    return KeyMarks(digest, None, salts=True).fields(body)["cache_salt"]


def is_owner(digest: bytes, found: str) -> bool:
    try:
        check_owner(digest, found)
    except NoSuchResponse:
        return False
    return True


def test_an_id_is_one_that_a_path_may_have_and_is_its_keys_own() -> None:
    mine, theirs = response_id(MINE), response_id(THEIRS)
    assert RESPONSE_ID.fullmatch(mine)
    assert (is_owner(MINE, mine), is_owner(MINE, theirs)) == (True, False)
    assert (is_owner(THEIRS, mine), is_owner(THEIRS, theirs)) == (False, True)


def test_of_one_call_each_key_makes_another_id() -> None:
    call_id = new_request_id()
    assert response_id(MINE, call_id)[:37] == response_id(THEIRS, call_id)[:37] == f"resp_{call_id}"
    assert response_id(MINE, call_id) != response_id(THEIRS, call_id)


def test_an_id_that_was_changed_in_any_place_is_nobodys() -> None:
    mine = response_id(MINE)
    for at, letter in enumerate(mine):
        changed = mine[:at] + ("0" if letter != "0" else "1") + mine[at + 1 :]
        assert not is_owner(MINE, changed)


@pytest.mark.parametrize("other", ["", "resp_", "resp_af7e241bc05f866d", "x" * 69, "resp_" + "é" * 64, "resp_\n"])
def test_an_id_that_no_gateway_made_is_nobodys(other: str) -> None:
    assert not is_owner(MINE, other)
    assert not is_owner(MINE, response_id(MINE) + "\n")


@pytest.mark.parametrize("previous", [None, 5, ["resp_x"]])
def test_what_is_no_id_is_for_vllm_to_judge(previous: object) -> None:
    fields = KeyMarks(MINE, new_request_id(), salts=False).fields({"previous_response_id": previous})
    assert list(fields) == ["request_id"]


def test_what_goes_on_with_another_keys_response_is_refused_as_vllm_refuses() -> None:
    theirs = response_id(THEIRS)
    with pytest.raises(NoSuchResponse) as raised:
        KeyMarks(MINE, new_request_id(), salts=True).fields({"previous_response_id": theirs})
    assert (raised.value.status, orjson.loads(raised.value.envelope("id", "responses"))) == (
        404,
        {
            "error": {
                "message": f"Response with id '{theirs}' not found.",
                "type": "invalid_request_error",
                "param": "response_id",
                "code": 404,
            }
        },
    )


def test_a_salt_is_its_keys_own_and_one_that_vllm_takes() -> None:
    assert salt(MINE) == salt(MINE) != salt(THEIRS)
    # At most 128 characters, none of "@", "/", "\" or NUL; 256 bits, as vLLM advises.
    assert re.fullmatch("[0-9a-f]{64}", salt(MINE))


def test_a_callers_own_salt_makes_another_of_each_key() -> None:
    salts = [salt(digest, cache_salt=own) for digest in (MINE, THEIRS) for own in ("", "a", "b")]
    assert len(set(salts)) == 6
    assert salt(MINE, cache_salt=None) == salt(MINE, cache_salt=5) == salt(MINE)
    # No id tells a salt, nor the other way round.
    assert response_id(MINE, "0" * 32)[-32:] != salt(MINE, cache_salt="0" * 32)[:32]


def test_what_has_a_prompt_has_a_salt() -> None:
    without = {route.path for route in ROUTES if route.method == "POST" and not route.caches_prefixes}
    assert without == {
        "/v1/responses/{response_id}/cancel",
        "/v1/messages/count_tokens",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/tokenize",
        "/detokenize",
    }
    assert not any(route.caches_prefixes for route in ROUTES if route.method == "GET")
