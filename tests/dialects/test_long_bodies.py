"""A body is read by what it says and not by how long it is, though most of a long one is not looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.dialects.json_body import LONG_BODY
from gateway.dialects.reader import BodyReader
from gateway.wire.errors import GatewayError
from tests.support.paths import ROOT
from tests.support.recorders import Conversation, body_limits

RELEASES = sorted((ROOT / "tests/sockets/corpus").glob("erag-*.jsonl"))
MORE: list[dict[str, Any]] = [
    {"messages": {"user": "Hi"}, "max_new_tokens": "100"},
    {"messages": {"user": "Hi"}, "stream": "true"},
    {"messages": {"user": "Hi"}, "max_new_tokens": 5, "max_tokens": "7"},
    {"messages": {"user": "Hi"}, "n": "2"},
    {"messages": {"user": "Hi"}, "model": 5},
    {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": "7"},
    {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": 1},
    {"model": "", "messages": [{"role": "user", "content": "Hi"}], "n": 200},
    {"messages": 5, "max_tokens": "7"},
    {},
]


def said(reader: BodyReader, content: bytes) -> tuple[object, ...]:
    """What a chat call's body is taken for, or how it is refused."""
    try:
        sent, form, model, streaming, translation, hides_usage, *_ = reader.read("chat", content)
    except GatewayError as error:
        return type(error), error.status, error.message, error.param
    call = orjson.loads(sent if translation is None else translation.to_call(reader.select_model(translation)))
    return call, form, model, streaming, hides_usage


@pytest.mark.parametrize("compat", [None, "erag-1.4", "erag-2.0", "erag-2.1"])
@pytest.mark.parametrize("file", [None, *RELEASES], ids=lambda file: file.stem if file else "more")
def test_a_long_body_is_taken_as_a_short_one(file: Path | None, compat: str | None) -> None:
    rows = MORE if file is None else [orjson.loads(line).get("request") for line in file.read_bytes().splitlines()]
    for settings in ({}, {"body_limits": body_limits(max_new_tokens=9)}, {"model_aliases": {"*": "demo"}}):
        reader = Conversation(compat=compat, **settings).path.reader
        for row in rows:
            if isinstance(row, dict):
                short = orjson.dumps(row)
                padded = short[:-1] + b" " * LONG_BODY + b"}"
                assert said(reader, padded) == said(reader, short), row
