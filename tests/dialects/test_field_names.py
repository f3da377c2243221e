"""Names that are near to a field's are told apart from those that are just others."""

from __future__ import annotations

import pytest

from gateway.dialects.field_names import OWN_FIELDS, VLLM_FIELDS, refuse_misspelt
from gateway.wire.errors import BadRequest

MEANT = {
    "max_new_token": "max_new_tokens",
    "max_token": "max_tokens",
    "maxTokens": "max_tokens",
    "max-new-tokens": "max_new_tokens",
    "temprature": "temperature",
    "Temperature": "temperature",
    "tempearture": "temperature",
    "repetition_penalti": "repetition_penalty",
    "streamm": "stream",
    "message": "messages",
}


@pytest.mark.parametrize(("name", "meant"), MEANT.items())
def test_a_name_that_is_nearly_a_fields_is_refused_with_it(name: str, meant: str) -> None:
    with pytest.raises(BadRequest) as raised:
        refuse_misspelt(["seed", name])
    assert raised.value.message == f"{name} is not a field: did you mean {meant}?"
    assert raised.value.param == name


@pytest.mark.parametrize("name", ["top_n", "history_id", "language", "session", "x", "xmessage", "a" * 5000, ""])
def test_a_name_that_is_another_goes_on(name: str) -> None:
    refuse_misspelt([name])


def test_no_field_is_taken_for_another() -> None:
    refuse_misspelt(VLLM_FIELDS)
    assert not VLLM_FIELDS & OWN_FIELDS
