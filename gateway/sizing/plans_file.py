"""Reads a platform's resource plans from a YAML file: only a list of mappings of plain values, and no other YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from gateway.sizing.gpus import UnknownGpu, find
from gateway.sizing.plan import Card

_FORM = "a plan is `- name: N`, and below it, indented, gpu: NAME, count: N and, if not the card's own, memory: 24GiB"
_LINE = re.compile(r"(?P<begin>- | *)(?P<key>[a-z]+):\s+(?P<value>\S.*)")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:GiB|GB|G)?", re.IGNORECASE)
_MOST = 1024


class BadPlans(Exception):
    """The file or the name of a GPU is wrong; the text is a sentence that says why."""


class Offer(NamedTuple):
    """An available plan: a number of GPUs of one kind."""

    name: str
    card: Card
    gpus: int


def read_plans(file: Path) -> list[Offer]:
    """The file's plans, in the file's order. Raises BadPlans."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BadPlans(f"The plans {file} cannot be read: {why}.") from None
    plans: list[dict[str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        said = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if said in ("", "---"):
            continue
        found = _LINE.fullmatch(said)
        if found and found["begin"] == "- ":
            plans.append({})
        if not found or not plans or (found["begin"] == "") or found["key"] in plans[-1]:
            raise BadPlans(f"{file}, line {number}: {_FORM}.")
        plans[-1][found["key"]] = found["value"].strip("\"'")
    if not plans:
        raise BadPlans(f"{file} has no plan: {_FORM}.")
    return [_offer(plan, file) for plan in plans]


def card_of(wanted: str, memory: str | None = None) -> Card:
    """The GPU with this name, this memory (`24GiB`), or both. Raises BadPlans."""
    size = gib_of(memory) if memory is not None else None
    if size is None and (alone := gib_of(wanted)):
        return Card("any GPU", alone)
    try:
        found = find(wanted)
    except UnknownGpu as error:
        raise BadPlans(f"{error} Or give its memory, as 24GiB.") from None
    named = [(generation, gpu) for generation, gpu in found if gpu]
    if not named or (size is None and len(named) > 1):
        names = ", ".join(gpu.name for _, gpu in named) or ", ".join(gpu.name for gpu in found[0][0].gpus)
        raise BadPlans(f"{wanted} means more than one GPU: name one of {names}.")
    generation, gpu = named[0]
    size = size or gpu.memory
    if size is None:
        raise BadPlans(f"{wanted} has cards of several sizes: give the memory, as 24GiB, in place of the name.")
    return Card(gpu.name if len(named) == 1 else wanted, size, generation)


def gib_of(memory: str) -> float | None:
    """`24GiB` as 24.0; None for a text that is no size. GB means GiB, as on a card's box."""
    found = _MEMORY.fullmatch(memory.strip())
    return float(found[1]) or None if found and not memory.strip().replace(".", "").isdecimal() else None


def _offer(plan: dict[str, str], file: Path) -> Offer:
    name = plan.get("name", "")
    if plan.keys() - {"name", "gpu", "count", "memory"} or not {"name", "gpu", "count"} <= plan.keys():
        raise BadPlans(f"{file}, the plan {name or '?'}: {_FORM}.")
    count = int(plan["count"]) if plan["count"].isdecimal() else 0
    if not 1 <= count <= _MOST:
        raise BadPlans(f"{file}, the plan {name}: count must be a number from 1 to {_MOST}, not {plan['count']!r}.")
    memory = plan.get("memory")
    if memory is not None and gib_of(memory) is None:
        raise BadPlans(f"{file}, the plan {name}: memory must be as 24GiB, not {memory!r}.")
    try:
        return Offer(name, card_of(plan["gpu"], memory), count)
    except BadPlans as error:
        raise BadPlans(f"{file}, the plan {name}: {error}") from None
