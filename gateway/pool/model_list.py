"""OpenAI's list of models: removes paths on a server's disk and merges the lists of several servers."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import orjson

from gateway.dialects.reader import Alias

# A hub's NAME or ORG/NAME, with the suffix by which vLLM selects a quantized file. Any other root is the path of the
# model on the server.
_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?(?::[\w.-]+)?")


def without_paths(content: bytes) -> bytes:
    """The list with each `root` that is a path replaced by the model's id; content that is no list is unchanged."""
    try:
        found = orjson.loads(content)
        changed = [_hide_path(entry) for entry in found["data"]]
    except (ValueError, LookupError, TypeError, AttributeError):
        return content
    return orjson.dumps(found) if any(changed) else content


def union(lists: Iterable[tuple[bytes, Container[str]]], aliases: Mapping[str, Alias]) -> dict[str, dict[str, Any]]:
    """The entries of these lists by their ids, each once and without paths, and entries for their `aliases`.

    Each list comes with the ids that count of it.
    """
    found: dict[str, dict[str, Any]] = {}
    for content, counted in lists:
        for entry in orjson.loads(without_paths(content))["data"]:
            if entry["id"] in counted:
                found.setdefault(entry["id"], entry)
    served = [(name, alias) for name, alias in aliases.items() if name != "*" and alias.is_served(found)]
    others = {name: alias.first(found) for name, alias in served if name not in found}
    return found | {name: {**found[model], "id": name, "root": model} for name, model in others.items()}


def _hide_path(entry: dict[str, Any]) -> bool:
    root = entry.get("root")
    if not isinstance(root, str) or root == entry["id"] or _HUB_ID.fullmatch(root):
        return False
    entry["root"] = entry["id"]
    return True
