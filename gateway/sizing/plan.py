"""Computes whether a model fits on some GPUs: its weights, vLLM's overhead, and the KV cache that is left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gateway.sizing.architecture import BYTES, CHUNKED, RECURRENT, SLIDING, Architecture
from gateway.sizing.gpus import CURRENT, OLDEST_BFLOAT16, OLDEST_FP8, Generation
from gateway.sizing.kv_cache import Cache, cache_of, longest
from gateway.sizing.safetensors import Tensor
from gateway.sizing.weights import weights_of

GIB = 1024**3

# The overhead beside the weights, in GiB: fitted to public runs of vLLM 0.19 on H100.
_ACTIVATION = 0.4
_ACTIVATION_OF_EXPERTS = 0.4
# Three copies of the logits in float32 (bytes per logit), for all answers that vLLM samples at once.
_LOGITS = 12
_NOT_TORCH, _NOT_TORCH_WITH_NCCL = 0.25, 2.1
_GRAPHS = 1.0
_VOCAB_PADDING = 64
# The error of the likely figure, in GiB; models with vision take more memory.
_LESS, _MORE = 0.5, 2.0


class CannotPlan(Exception):
    """The plan cannot be computed; the text is a sentence that says why."""


@dataclass(frozen=True)
class Card:
    """The GPU of a plan; `memory` is in GiB as CUDA counts it, `generation` is None if only the memory is known."""

    name: str
    memory: float
    generation: Generation | None = None


@dataclass(frozen=True)
class Wanted:
    """The model to serve, with vLLM's own options; `dtype` and `kv_cache_dtype` may be `auto`."""

    model: Architecture
    tensors: Sequence[Tensor] = field(repr=False)
    max_model_len: int | None = None
    kv_cache_dtype: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    utilization: float = 0.92
    concurrency: int = 1

    @property
    def length(self) -> int:
        """Tokens of a request: its prompt and its answer."""
        return self.max_model_len or self.model.length


@dataclass(frozen=True)
class Split:
    """The model on `tp` GPUs; sizes are in bytes per GPU, and those left for the cache may be less than 0."""

    tp: int
    dtype: str
    total: int
    weights: int
    overhead: int
    cache: Cache
    low: int
    likely: int
    high: int
    concurrency: int
    longest: int

    @property
    def needed(self) -> int:
        """Bytes of cache for the wanted requests."""
        return (self.concurrency * self.cache.blocks + 1) * self.cache.block_bytes

    @property
    def missing(self) -> int:
        """Bytes that the likely figure lacks for the wanted requests; 0 if they fit."""
        return max(0, self.needed - self.likely)

    @property
    def fits(self) -> bool:
        """Whether the wanted requests fit into the likely figure."""
        return not self.missing

    @property
    def surely(self) -> bool:
        """Whether the wanted requests fit into the low figure."""
        return self.needed <= self.low


def splits(wanted: Wanted, card: Card, gpus: int) -> list[Split]:
    """The model on each valid number of GPUs up to `gpus`: the number divides its heads and its vocabulary."""
    return [split(wanted, card, tp) for tp in valid_sizes(wanted.model, gpus)]


def valid_sizes(model: Architecture, gpus: int) -> list[int]:
    """vLLM's valid tensor parallel sizes up to `gpus`: they divide heads, key-value heads and padded vocabulary."""
    vocab = -(-model.vocab // _VOCAB_PADDING) * _VOCAB_PADDING
    return [
        tp
        for tp in range(1, gpus + 1)
        if model.heads % tp == 0
        and vocab % tp == 0
        and (model.latent or model.kv_heads % tp == 0 or tp % model.kv_heads == 0)
    ]


def split(wanted: Wanted, card: Card, tp: int) -> Split:
    """The model on `tp` GPUs."""
    model = wanted.model
    dtype = dtype_of(wanted, card)
    weights = weights_of(model, wanted.tensors, tp, dtype, wanted.length, to_fp8=wanted.quantization == "fp8")
    seqs, batched = _defaults(card)
    activation = _ACTIVATION + _LOGITS * seqs * model.vocab / GIB + (_ACTIVATION_OF_EXPERTS if model.experts else 0)
    overhead = activation + (_NOT_TORCH if tp == 1 else _NOT_TORCH_WITH_NCCL) + _GRAPHS
    width = cache_width(wanted, dtype)
    total = int(card.memory * GIB)
    likely = int(wanted.utilization * total - weights - overhead * GIB)
    # Twice, because vLLM prepares one step while another runs.
    in_flight = 2 * batched
    return Split(
        tp=tp,
        dtype=dtype,
        total=total,
        weights=weights,
        overhead=int(overhead * GIB),
        cache=cache_of(model, tp, width, wanted.length, in_flight),
        low=likely - int(_MORE * GIB),
        likely=likely,
        high=likely + int(_LESS * GIB),
        concurrency=wanted.concurrency,
        longest=longest(model, tp, width, in_flight, likely, wanted.length),
    )


def dtype_of(wanted: Wanted, card: Card) -> str:
    """The dtype of the model's numbers: the wanted one, else the checkpoint's if the GPU supports it."""
    if wanted.dtype != "auto":
        return wanted.dtype
    generation = card.generation
    if generation and generation.dtype and (wanted.model.dtype == "bfloat16" or generation.dtype == "float32"):
        return generation.dtype
    return wanted.model.dtype


def cache_width(wanted: Wanted, dtype: str) -> int:
    """Bytes per number in the cache."""
    if wanted.kv_cache_dtype.startswith("fp8") or (wanted.kv_cache_dtype == "auto" and wanted.model.fp8_cache):
        return 1
    return BYTES[dtype]


def smallest(found: Iterable[Split]) -> Split | None:
    """The first split that fits, which has the fewest GPUs."""
    return next((one for one in found if one.fits), None)


def flags(wanted: Wanted, card: Card, chosen: Split) -> list[str]:
    """vLLM's options for the chosen split, without options that are vLLM's defaults."""
    told = ["--max-model-len", str(wanted.length), "--gpu-memory-utilization", f"{wanted.utilization:g}"]
    if chosen.tp > 1:
        told = ["--tensor-parallel-size", str(chosen.tp), *told]
    if wanted.dtype != "auto" or chosen.dtype != wanted.model.dtype:
        told += ["--dtype", chosen.dtype]
    if wanted.kv_cache_dtype != "auto":
        told += ["--kv-cache-dtype", wanted.kv_cache_dtype]
    if wanted.quantization:
        told += ["--quantization", wanted.quantization]
    if card.generation and card.generation.dtype == "float32":
        told.append("--enforce-eager")
    return told


def warnings(wanted: Wanted, card: Card) -> list[str]:
    """Sentences on features that do not run on the card, or that are not counted to the byte."""
    model, generation = wanted.model, card.generation
    told = []
    if generation:
        number = generation.number
        dtype = dtype_of(wanted, card)
        if dtype == "bfloat16" and generation.capability < OLDEST_BFLOAT16:
            told.append(f"{card.name} ({number}) has no bfloat16: take --dtype {generation.dtype or 'float16'}.")
        elif dtype != model.dtype and wanted.dtype == "auto":
            told.append(f"{card.name} ({number}) does not run {model.dtype}: this counts --dtype {dtype}.")
        eight = wanted.quantization == "fp8" or model.quantization in ("fp8", "compressed-tensors", "modelopt")
        if (eight or cache_width(wanted, dtype) == 1) and generation.capability < OLDEST_FP8:
            told.append(
                f"{card.name} ({number}) has no FP8 of its own, which begins with 8.9: FP8 weights are unpacked for "
                "each product, which saves memory alone, and an FP8 cache runs with some attention backends only."
            )
        if generation.vllm != CURRENT:
            runs = f"vLLM {generation.vllm} ({generation.image})" if generation.image else "no vLLM runs there"
            told.append(
                f"{card.name} ({number}) is too old for the vLLM that is counted here: {runs}; docs/older-gpus.md."
            )
    if recurrent := model.layers.get(RECURRENT, 0):
        told.append(
            f"{recurrent} of {model.depth} layers are recurrent: their states are not counted, and pad the cache's "
            "blocks; take the tokens as right to ±10 %."
        )
    if model.quantization == "mxfp4":
        told.append("MXFP4 weights are padded for the kernels of some GPUs: they may take up to 9 % more.")
    if model.uncounted:
        told.append(
            f"{', '.join(model.uncounted)} in config.json changes the cache; take the tokens as right to ±10 %."
        )
    if wanted.length > model.length:
        told.append(
            f"max-model-len {wanted.length:,} is above the model's {model.length:,}, which vLLM refuses unless "
            "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 is set."
        )
    return told


def check(wanted: Wanted) -> None:
    """Raise CannotPlan for options with which vLLM would not start."""
    if wanted.quantization and wanted.model.quantization:
        raise CannotPlan(
            f"--quantization {wanted.quantization} is for checkpoints in 16 bits, but this one is quantized already "
            f"({wanted.model.quantization}): leave it out."
        )
    if wanted.model.layers.get(SLIDING, 0) + wanted.model.layers.get(CHUNKED, 0) and wanted.model.window < 1:
        raise CannotPlan("config.json names layers with a window, but not how long it is.")


def _defaults(card: Card) -> tuple[int, int]:
    """The defaults of vLLM's server for max-num-seqs and max-num-batched-tokens, which depend on the GPU."""
    if card.memory >= 160:
        return 1024, 16384
    if card.memory >= 70 and "A100" not in card.name.upper():
        return 1024, 8192
    return 256, 2048
