"""The command `gpus`: shows which vLLM runs on which GPU, and the GPUs of this machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import orjson

from gateway.sizing.gpus import GENERATIONS as EVERY
from gateway.sizing.gpus import Generation, Gpu, find, of_capability

# Seconds after which a hanging driver counts as one that does not answer.
_PATIENCE = 20


@dataclass(frozen=True)
class Here:
    """A GPU of this machine; `memory` is in GiB. Both it and `capability` are None if the driver reports none."""

    name: str
    capability: tuple[int, int] | None
    memory: float | None


class NoAnswer(Exception):
    """There is a driver, but it does not report its GPUs; the text is a sentence that says why."""


def gpus(wanted: str | None, echo: Callable[[str], None], warn: Callable[[str], None], *, as_json: bool) -> int:
    """Show all GPUs and this machine's, or only the GPUs of a name or a capability.

    Returns the exit status. Raises UnknownGpu.
    """
    found: list[tuple[Generation, Gpu | None]] = [(one, None) for one in EVERY] if wanted is None else find(wanted)
    generations = list(dict.fromkeys(generation for generation, _ in found))
    here: list[Here] = []
    if wanted is None:
        try:
            here = on_this_machine()
        except NoAnswer as error:
            warn(str(error))
    if as_json:
        echo(orjson.dumps(_as_json(generations, here)).decode())
        return 0
    if wanted is None:
        for line in _table(generations):
            echo(line)
    else:
        for generation in generations:
            named = [gpu for one, gpu in found if one is generation and gpu is not None]
            echo("\n".join(_about(generation, named or list(generation.gpus))))
    for one in here:
        echo(_told(one))
    return 0


def on_this_machine(nvidia_smi: str | None = None) -> list[Here]:
    """The GPUs that nvidia-smi lists, which needs no CUDA; empty without nvidia-smi. Raises NoAnswer."""
    command = nvidia_smi or shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = [command, "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoAnswer(f"nvidia-smi does not answer ({type(error).__name__}): see that NVIDIA's driver runs.") from None
    if done.returncode:
        said = " ".join((done.stdout or done.stderr).split()) or f"status {done.returncode}"
        raise NoAnswer(f"nvidia-smi shows no GPU ({said}): see that NVIDIA's driver runs.")
    return [_here(line) for line in done.stdout.splitlines() if line.strip()]


def _here(line: str) -> Here:
    name, capability, memory = ([part.strip() for part in line.rsplit(",", 2)] + ["", ""])[:3]
    major, _, minor = capability.partition(".")
    number = (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
    # A GPU that shares the machine's memory reports no memory of its own.
    return Here(name, number, int(memory) / 1024 if memory.isdecimal() else None)


def _table(generations: list[Generation]) -> Iterator[str]:
    rows = [("CC", "ARCHITECTURE", "VLLM", "TYPES", "GPUS")]
    for one in generations:
        names = ", ".join(gpu.name for gpu in one.gpus)
        rows.append((one.number, f"{one.architecture} {one.year}", one.vllm, one.types or "-", names))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        yield "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]))


def _about(generation: Generation, named: list[Gpu]) -> Iterator[str]:
    cards = ", ".join(f"{gpu.name} ({gpu.memory:g} GiB)" if gpu.memory else gpu.name for gpu in named)
    sm = generation.number.replace(".", "")
    yield f"{generation.number}  sm_{sm}, {generation.architecture}, {generation.year}: {cards}"
    yield f"  vLLM    {generation.vllm}"
    if generation.image:
        yield f"  image   {generation.image}"
    if generation.types:
        yield f"  types   {generation.types}"
    if generation.dtype:
        yield f"  option  --dtype {generation.dtype}"
    if generation.note:
        yield f"  note    {generation.note}"


def _told(here: Here) -> str:
    memory = f", {here.memory:.1f} GiB" if here.memory else ""
    if here.capability is None:
        return f"This machine: {here.name}{memory}; its driver tells no compute capability."
    number = "{}.{}".format(*here.capability)
    generation = of_capability(here.capability)
    runs = f"vLLM: {generation.vllm}" if generation else "in no list of this command"
    return f"This machine: {here.name}{memory}, compute capability {number}; {runs}."


def _as_json(generations: list[Generation], here: list[Here]) -> dict[str, object]:
    return {
        "generations": [
            {
                "capability": one.number,
                "architecture": one.architecture,
                "year": one.year,
                "gpus": [{"name": gpu.name, "memory_gib": gpu.memory} for gpu in one.gpus],
                "vllm": one.vllm,
                "image": one.image,
                "types": one.types,
                "dtype": one.dtype,
                "note": one.note,
            }
            for one in generations
        ],
        "here": [
            {
                "name": one.name,
                "capability": "{}.{}".format(*one.capability) if one.capability else None,
                "memory_gib": one.memory and round(one.memory, 2),
            }
            for one in here
        ],
    }
