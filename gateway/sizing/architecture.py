"""Reads the fields of a model's config.json that decide how much memory it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]

FULL = "full"
SLIDING = "sliding"
CHUNKED = "chunked"
RECURRENT = "recurrent"

BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}

# The effect of these fields on the size of the cache is not counted.
_UNCOUNTED = ("index_topk", "global_head_dim", "num_global_key_value_heads", "num_kv_shared_layers", "compress_ratios")

_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "length": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx"),
    "experts": ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"),
}
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config", "language_model_config")
_KINDS = {
    "full_attention": FULL,
    "attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    # Zamba's hybrid layers have both attention and Mamba.
    "hybrid": FULL,
}
# If config.json has no pattern: every Nth layer of these families has full attention.
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "llama4": 4, "llama4_text": 4}
# With these types of RoPE scaling the length in config.json is already the scaled length.
_UNSCALED = ("default", "su", "longrope", "llama3", "mrope", "proportional")

_MOST_LAYERS, _LARGEST, _LARGEST_FACTOR = 10_000, 1_000_000_000, 1_000_000


class BadConfig(Exception):
    """A field of config.json is missing or wrong; the text is a sentence that says which."""


@dataclass(frozen=True)
class Architecture:
    """The language part of a model. `layers` counts them by kind; `latent` is the width of MLA's cache, else 0."""

    layers: Mapping[str, int]
    heads: int
    kv_heads: int
    head_dim: int
    latent: int
    window: int
    vocab: int
    length: int
    rotary: int
    dtype: str
    experts: bool
    tied: bool
    quantization: str | None
    fp8_cache: bool
    uncounted: tuple[str, ...]

    @property
    def depth(self) -> int:
        """The number of layers of all kinds."""
        return sum(self.layers.values())


def read_architecture(config: object) -> Architecture:
    """Read a parsed config.json. Raises BadConfig."""
    if not isinstance(config, Mapping):
        raise BadConfig(f"config.json must be an object, but it is a {type(config).__name__}.")
    whole: Json = config
    text = next((whole[name] for name in _LANGUAGE_PARTS if isinstance(whole.get(name), Mapping)), whole)
    given = {**{name: whole[name] for name in ("vocab_size", "tie_word_embeddings") if name in whole}, **text}
    depth, heads = _number(given, "layers"), _number(given, "heads")
    hidden = _number(given, "hidden")
    head_dim = _at(given, "head_dim") or hidden // heads
    latent = _at(given, "kv_lora_rank") and _at(given, "kv_lora_rank") + _at(given, "qk_rope_head_dim")
    window = _at(given, "sliding_window") if given.get("use_sliding_window", True) else 0
    chunk = _at(given, "attention_chunk_size")
    layers = Counter(_kinds(given, depth, window, chunk))
    if not layers.keys() - {RECURRENT}:
        raise BadConfig("Each layer of the model is recurrent: it has no KV cache, which is what is counted here.")
    partial = _rope(given).get("partial_rotary_factor", given.get("partial_rotary_factor"))
    length = _length(given)
    quantization = whole.get("quantization_config") or given.get("quantization_config") or {}
    if not isinstance(quantization, Mapping):
        raise BadConfig("quantization_config of config.json must be an object.")
    return Architecture(
        layers=layers,
        heads=heads,
        kv_heads=_number(given, "kv_heads", default=1 if given.get("multi_query") else heads),
        head_dim=head_dim,
        latent=latent,
        window=chunk if layers[CHUNKED] else window,
        vocab=_required(given, "vocab_size"),
        length=length,
        rotary=_at(given, "qk_rope_head_dim") or int(head_dim * _factor(partial)),
        dtype=_dtype(whole, given),
        experts=_number(given, "experts", default=1) > 1,
        tied=bool(given.get("tie_word_embeddings", _ties(given))),
        quantization=str(quantization["quant_method"]) if "quant_method" in quantization else None,
        fp8_cache=bool(quantization.get("kv_cache_scheme")) or "FP8" in str(quantization.get("kv_cache_quant_algo")),
        uncounted=tuple(name for name in _UNCOUNTED if given.get(name)),
    )


def _kinds(given: Json, depth: int, window: int, chunk: int) -> list[str]:
    told = given.get("layer_types") or given.get("layers_block_type") or given.get("block_types")
    if isinstance(told, list) and told and all(isinstance(kind, str) for kind in told):
        kinds = [_KINDS.get(kind, RECURRENT) for kind in told]
        kinds = (kinds * (depth // len(kinds) + 1))[:depth]  # either a repeated pattern, or one kind per layer
        return [FULL if kind == SLIDING and not window else kind for kind in kinds]
    if isinstance(pattern := given.get("hybrid_override_pattern"), str):
        # Nemotron-H: Mamba layers, attention layers, and layers with neither.
        return [RECURRENT if kind == "M" else FULL for kind in pattern if kind in "M*"]
    if isinstance(attending := given.get("attn_layer_indices"), list):
        return [FULL if layer in attending else RECURRENT for layer in range(depth)]
    if period := _at(given, "attn_layer_period"):
        offset = _at(given, "attn_layer_offset")
        return [FULL if layer % period == offset else RECURRENT for layer in range(depth)]
    if interval := _at(given, "full_attention_interval"):
        return [RECURRENT if (layer + 1) % interval else FULL for layer in range(depth)]
    if "mamba" in str(given.get("model_type")):
        return [RECURRENT] * depth
    local = CHUNKED if chunk else SLIDING if window else FULL
    every = _at(given, "sliding_window_pattern") or _PATTERNS.get(str(given.get("model_type")), 0)
    if every:
        return [local if (layer + 1) % every else FULL for layer in range(depth)]
    return [local if layer >= _at(given, "max_window_layers") else FULL for layer in range(depth)]


def _length(given: Json) -> int:
    """The longest context, as vLLM derives it without --max-model-len."""
    length = _number(given, "length")
    rope = _rope(given)
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    factor = _factor(rope.get("factor"))
    if kind in _UNSCALED or "gemma3" in str(given.get("model_type")):
        return length
    before = _at(rope, "original_max_position_embeddings") if kind == "yarn" else length
    return int((before or length) * factor)


def _rope(given: Json) -> Json:
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    return rope if isinstance(rope, Mapping) else {}


def _factor(found: object) -> float:
    """A positive factor of a plausible size; 1 if there is none."""
    return found if isinstance(found, int | float) and 0 < found < _LARGEST_FACTOR else 1


def _dtype(whole: Json, given: Json) -> str:
    name = str(next((part[key] for part in (given, whole) for key in ("dtype", "torch_dtype") if part.get(key)), ""))
    # vLLM serves a float32 checkpoint in bfloat16, unless --dtype says otherwise.
    return name if name in ("bfloat16", "float16") else "bfloat16"


def _ties(given: Json) -> bool:
    # For these families a missing tie_word_embeddings means true in Transformers, and their own files leave it out.
    return str(given.get("model_type")).startswith(("gemma", "cohere"))


def _number(given: Json, of: str, default: int | None = None) -> int:
    names = _NAMES[of]
    for name in names:
        if given.get(name) is not None:
            return _required(given, name)
    if default is None:
        raise BadConfig(f"config.json has no {names[0]}: it is not that of a language model, or of an unknown kind.")
    return default


def _required(given: Json, name: str) -> int:
    found = given.get(name)
    most = _MOST_LAYERS if name in _NAMES["layers"] else _LARGEST
    if type(found) is not int or not 1 <= found <= most:
        shown = "it is missing" if found is None else f"it is {str(found)[:40]!r}"
        raise BadConfig(f"{name} of config.json must be a whole number from 1 to {most:,}, but {shown}.")
    return found


def _at(given: Json, name: str) -> int:
    """An optional number, 0 if it is missing. Raises BadConfig for any other value."""
    return _required(given, name) if given.get(name) else 0
