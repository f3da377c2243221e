"""Lists of models: what is changed in one, and how several become one."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from gateway.pool.model_list import union, without_paths
from tests.support.recorders import aliases_of

# As vLLM 0.32 writes it.
VLLMS = (
    b'{"object":"list","data":[{"id":"demo","object":"model","created":1795215800,"owned_by":"vllm",'
    b'"root":"/models/demo","parent":null,"max_model_len":1024,"permission":[{"id":"modelperm-8b3aa0e87866d594",'
    b'"object":"model_permission","created":1795215800,"allow_create_engine":false,"organization":"*","group":null}]}]}'
)


def listed(*entries: dict[str, Any]) -> bytes:
    return orjson.dumps({"object": "list", "data": entries})


def test_nothing_is_changed_but_a_root_that_is_a_path() -> None:
    assert without_paths(VLLMS) == VLLMS.replace(b"/models/demo", b"demo")


@pytest.mark.parametrize(
    "root",
    ["/m", "./m", "../m", "~/m", "m/", "a/b/c", "C:\\m", "s3://bucket/m", "file:///m", "/mnt/a b", "..", ".hidden", ""],
)
def test_what_tells_where_a_model_lies_is_its_id(root: str) -> None:
    assert orjson.loads(without_paths(listed({"id": "m", "root": root})))["data"] == [{"id": "m", "root": "m"}]


@pytest.mark.parametrize("root", ["Org/Name-7B.v1", "Name", "Org/Name:Q4_K_M", "m", None, 5])
def test_a_hubs_name_stays(root: object) -> None:
    content = b" " + listed({"id": "m", "root": root}, {"id": "n"})
    assert without_paths(content) is content


@pytest.mark.parametrize(
    "content",
    [b"", b"no", b"[]", b"5", b'{"data":5}', b'{"data":{"a":1}}', b'{"data":["a"]}', b'{"data":[{"root":"/a"}]}'],
)
def test_what_is_no_list_stays(content: bytes) -> None:
    assert without_paths(content) == content


def test_several_are_one_in_their_order_each_model_once() -> None:
    first = listed({"id": "a", "root": "/a", "created": 1}, {"id": "b"})
    second = listed({"id": "b", "created": 2}, {"id": "c", "created": 3})
    assert list(union([(first, "ab"), (second, "bc")], {}).values()) == [
        {"id": "a", "root": "a", "created": 1},
        {"id": "b"},
        {"id": "c", "created": 3},
    ]


def test_another_name_is_a_model_whose_root_is_the_one_that_it_means() -> None:
    aliases = aliases_of({"fast": "a", "*": "a", "b": "a", "gone": "x", "some": "x,b"})
    found = union([(listed({"id": "a", "root": "/a", "max_model_len": 5}, {"id": "b"}, {"id": "c"}), "ab")], aliases)
    assert found == {
        "a": {"id": "a", "root": "a", "max_model_len": 5},
        "b": {"id": "b"},
        "fast": {"id": "fast", "root": "a", "max_model_len": 5},
        "some": {"id": "some", "root": "b"},
    }
