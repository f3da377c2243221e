"""Reads InferenceServices, as JSON, and writes what KServe's own models do not have of them, a line each.

Run by tests/heavy/models/described.py with a Python of its own, which has the SDK.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import kserve

# The repository has a folder of that name, in which mypy would look for it.
_PACKAGE = "kubernetes"
client = importlib.import_module(f"{_PACKAGE}.client")
_PLAIN = {"str": str, "int": int, "bool": bool, "float": float}


def problems(value: Any, kind: str, at: str) -> Iterator[str]:
    """What a value has that its kind has not, by the names that the SDK gives to kinds."""
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        if not isinstance(value, list):
            yield f"{at}: {value!r} is no list"
            return
        for number, one in enumerate(value):
            yield from problems(one, found[1], f"{at}[{number}]")
    elif found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        for name, one in value.items():
            yield from problems(one, found[1], f"{at}.{name}")
    elif kind in _PLAIN:
        if type(value) is not _PLAIN[kind]:
            yield f"{at}: {value!r} is no {kind}"
    elif hasattr(kserve, kind):
        yield from _of_kserve(value, getattr(kserve, kind), at)
    else:
        yield from _of_kubernetes(value, getattr(client, kind), at)


def _of_kserve(value: dict[str, Any], model: Any, at: str) -> Iterator[str]:
    names = {shown: name for name, shown in model.attribute_map.items()}
    for name, one in value.items():
        if name in names:
            yield from problems(one, model.openapi_types[names[name]], f"{at}.{name}")
        else:
            yield f"{at}.{name} is not known to {model.__name__}"
    # The model itself asks for what must be there.
    model(**{names[name]: one for name, one in value.items() if name in names})


def _of_kubernetes(value: Any, model: Any, at: str) -> Iterator[str]:
    try:
        read = model.from_dict(value)
    except ValueError as error:
        yield f"{at}: {error}"
        return
    yield from _differences(value, read.model_dump(mode="json", by_alias=True, exclude_none=True), at)


def _differences(given: Any, read: Any, at: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(read, dict):
        for name in given.keys() | read.keys():
            yield from _differences(given.get(name), read.get(name), f"{at}.{name}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from _differences(one, other, f"{at}[{number}]")
    elif given != read or type(given) is not type(read):
        yield f"{at}: {given!r} is read as {read!r}"


def main() -> None:
    for service in json.load(sys.stdin):
        for line in problems(service, "V1beta1InferenceService", ""):
            print(line)


if __name__ == "__main__":
    main()
