"""The list of NVIDIA's GPUs: their generations, the vLLM for each, and the memory that CUDA finds on a card."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

CURRENT = "current"
LATEST = "vllm/vllm-openai:latest"
# The current vLLM has no kernels for a lower capability.
OLDEST_CURRENT = (7, 5)
OLDEST_BFLOAT16 = (8, 0)
# With a lower capability FP8 weights are unpacked to 16 bits for each product (Marlin): smaller, not faster.
OLDEST_FP8 = (8, 9)


@dataclass(frozen=True)
class Gpu:
    """A card, or a series of cards if its name has `xx`.

    `memory` is in GiB as CUDA counts it; None if it differs within the series. CUDA finds less than the box says:
    1 to 2 % less, and 6 to 9 % with error correction.
    """

    name: str
    memory: float | None = None


@dataclass(frozen=True)
class Generation:
    """The GPUs of one compute capability.

    `dtype` is None if none has to be set, `image` is None if no vLLM runs there.
    """

    capability: tuple[int, int]
    architecture: str
    year: int
    gpus: tuple[Gpu, ...]
    vllm: str = CURRENT
    image: str | None = LATEST
    types: str = "bfloat16, float16, fp8"
    dtype: str | None = None
    note: str = ""

    @property
    def number(self) -> str:
        """The capability as NVIDIA writes it: `8.9`."""
        return "{}.{}".format(*self.capability)


_OLD = "docs/older-gpus.md has how."

# Ordered from the newest to the oldest.
GENERATIONS = (
    Generation((12, 1), "Blackwell", 2025, (Gpu("GB10", 119.6),), types="bfloat16, float16, fp8, nvfp4"),
    Generation(
        (12, 0),
        "Blackwell",
        2025,
        (
            Gpu("RTX 5090", 31.3), Gpu("RTX 5080", 15.4), Gpu("RTX 50xx"), Gpu("RTX PRO 6000", 94.9),
            Gpu("RTX PRO 5000", 47.3), Gpu("RTX PRO 4500", 31.3), Gpu("RTX PRO 4000", 23.4),
        ),
        types="bfloat16, float16, fp8, nvfp4",
    ),
    Generation((11, 0), "Blackwell", 2025, (Gpu("Jetson Thor", 122.8),), note="10.1 before CUDA 13."),
    Generation((10, 3), "Blackwell", 2025, (Gpu("B300"), Gpu("GB300")), types="bfloat16, float16, fp8, nvfp4"),
    Generation(
        (10, 0), "Blackwell", 2024, (Gpu("B200", 178.3), Gpu("B100"), Gpu("GB200", 184.0)),
        types="bfloat16, float16, fp8, nvfp4",
    ),
    Generation(
        (9, 0),
        "Hopper",
        2022,
        (Gpu("H100", 79.19), Gpu("H200", 139.8), Gpu("H800", 79.19), Gpu("H20", 95.0), Gpu("GH200", 94.5)),
    ),
    Generation(
        (8, 9),
        "Ada",
        2022,
        (
            Gpu("L4", 22.0), Gpu("L40", 44.3), Gpu("L40S", 44.3), Gpu("RTX 4090", 23.5), Gpu("RTX 4080", 15.6),
            Gpu("RTX 40xx"), Gpu("RTX 6000 Ada", 47.4),
        ),
    ),
    Generation((8, 7), "Ampere", 2022, (Gpu("Jetson Orin"),), types="bfloat16, float16", note="For arm64."),
    Generation(
        (8, 6),
        "Ampere",
        2020,
        (
            Gpu("A10", 22.0), Gpu("A10G", 22.0), Gpu("A16", 14.5), Gpu("A40", 44.3), Gpu("A2", 14.5),
            Gpu("RTX 3090", 23.58), Gpu("RTX 30xx"), Gpu("RTX A6000", 47.4), Gpu("RTX A5000", 23.5),
            Gpu("RTX A4000", 15.6),
        ),
        types="bfloat16, float16; fp8 weights alone",
    ),
    Generation(
        (8, 0),
        "Ampere",
        2020,
        (Gpu("A100-40GB", 39.38), Gpu("A100-80GB", 79.15), Gpu("A800", 79.15), Gpu("A30", 23.5)),
        types="bfloat16, float16; fp8 weights alone",
    ),
    Generation(
        (7, 5),
        "Turing",
        2018,
        (
            Gpu("T4", 14.56), Gpu("RTX 2080 Ti", 10.7), Gpu("RTX 20xx"), Gpu("GTX 16xx"), Gpu("Titan RTX", 23.6),
            Gpu("Quadro RTX"),
        ),
        types="float16",
        dtype="float16",
        note="No bfloat16 and no FlashAttention 2.",
    ),
    Generation((7, 2), "Volta", 2018, (Gpu("Jetson Xavier"),), "none", None, "", note="No vLLM was ever built for it."),
    Generation(
        (7, 0),
        "Volta",
        2017,
        (Gpu("V100-16GB", 15.77), Gpu("V100-32GB", 31.7), Gpu("Titan V", 11.7)),
        "0.19 is the last",
        "vllm/vllm-openai:v0.19.1",
        "float16",
        "float16",
        f"CUDA 13, which vLLM is built with since 0.20, has no Volta. {_OLD}",
    ),
    Generation(
        (6, 1),
        "Pascal",
        2016,
        (Gpu("P40", 23.8), Gpu("P4", 7.4), Gpu("GTX 1080 Ti", 10.9), Gpu("GTX 10xx"), Gpu("Titan Xp", 11.9)),
        "0.10.0, a community's build",
        "sasha0552/vllm:v0.10.0",
        "float32",
        "float32",
        f"float16 runs at a small part of float32's speed. {_OLD}",
    ),
    Generation(
        (6, 0),
        "Pascal",
        2016,
        (Gpu("P100", 15.9), Gpu("GP100", 15.9)),
        "0.10.0, a community's build",
        "sasha0552/vllm:v0.10.0",
        "float16",
        "float16",
        _OLD,
    ),
    Generation(
        (5, 2), "Maxwell", 2014, (Gpu("M40"), Gpu("M60"), Gpu("GTX 9xx"), Gpu("Titan X")), "none", None, "",
        note="No vLLM was ever built for it, nor for what is older.",
    ),
)  # fmt: skip

_CAPABILITY = re.compile(r"(?:sm_?(?=\d{2,3}a?$)|(?=\d+\.))(\d{1,2})\.?(\d)a?", re.IGNORECASE)
_MAKER = re.compile(r"nvidia|geforce|tesla|graphics|[\s_-]")


class UnknownGpu(Exception):
    """No GPU of the list has this name or capability; the text is a sentence."""


def of_capability(capability: tuple[int, int]) -> Generation | None:
    """The generation of a compute capability."""
    return next((one for one in GENERATIONS if one.capability == capability), None)


def find(wanted: str) -> list[tuple[Generation, Gpu | None]]:
    """The matches of a capability (`8.9`, `sm_89`; with None as the GPU) or a name (`L4`, `NVIDIA A100`), at least one.

    A name that begins other names (`A100`) matches all of them. Raises UnknownGpu.
    """
    if number := _CAPABILITY.fullmatch(wanted.strip()):
        generation = of_capability((int(number[1]), int(number[2])))
        if generation is None:
            known = ", ".join(one.number for one in GENERATIONS)
            raise UnknownGpu(f"No GPU of the list has the compute capability {wanted}: those known are {known}.")
        return [(generation, None)]
    every = [(generation, gpu) for generation in GENERATIONS for gpu in generation.gpus]
    name = _plain(wanted)
    exact = [(generation, gpu) for generation, gpu in every if _plain(gpu.name) == name]
    series = [(generation, gpu) for generation, gpu in every if _is_of_series(name, _plain(gpu.name))]
    begun = [(generation, gpu) for generation, gpu in every if _plain(gpu.name).startswith(name) and len(name) > 2]
    if found := exact or series or begun:
        return list(found)
    near = difflib.get_close_matches(wanted.strip().upper(), [gpu.name for _, gpu in every], n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    raise UnknownGpu(
        f"Unknown GPU {wanted!r}: {meant}`vllm-gateway gpus` lists them; a compute capability, as 8.9, is one, too."
    )


def _is_of_series(name: str, known: str) -> bool:
    return "xx" in known and bool(re.fullmatch(known.replace("xx", r"\d\d") + "(ti|super|tisuper)?", name))


def _plain(name: str) -> str:
    return _MAKER.sub("", name.lower())
