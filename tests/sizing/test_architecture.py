"""What a config.json says of a model's memory, in the words of its many families."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sizing.architecture import CHUNKED, FULL, RECURRENT, SLIDING, BadConfig, read_architecture
from gateway.sizing.kv_cache import cache_of
from gateway.sizing.weights import weights_of
from tests.support.checkpoints import LLAMA_8B, llama

LAYERS = "of config.json must be a whole number from 1 to 10,000"
NUMBER = "of config.json must be a whole number from 1 to 1,000,000,000"
NAMES = [
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "vocab_size",
    "max_position_embeddings", "model_type", "dtype", "layer_types", "sliding_window", "use_sliding_window",
    "max_window_layers", "sliding_window_pattern", "attention_chunk_size", "rope_scaling", "rope_parameters",
    "rope_type", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor", "kv_lora_rank",
    "qk_rope_head_dim",
    "quantization_config", "quant_method", "kv_cache_scheme", "text_config", "tie_word_embeddings", "num_experts",
    "hybrid_override_pattern", "attn_layer_indices", "attn_layer_period", "attn_layer_offset",
    "full_attention_interval", "block_types", "layers_block_type",
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, {FULL: 32}),
        ({"sliding_window": 4096}, {SLIDING: 32}),
        ({"sliding_window": None}, {FULL: 32}),
        # Qwen2's files have a window that is not used.
        ({"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 8}, {FULL: 32}),
        ({"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 8}, {FULL: 8, SLIDING: 24}),
        ({"model_type": "gemma2", "sliding_window": 4096}, {FULL: 16, SLIDING: 16}),
        ({"model_type": "gemma3_text", "sliding_window": 512}, {FULL: 5, SLIDING: 27}),
        ({"model_type": "cohere2", "sliding_window": 4096, "sliding_window_pattern": 4}, {FULL: 8, SLIDING: 24}),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, {FULL: 8, CHUNKED: 24}),
        ({"layer_types": ["full_attention", "sliding_attention"] * 16, "sliding_window": 128}, {FULL: 16, SLIDING: 16}),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, {FULL: 8, RECURRENT: 24}),
        ({"full_attention_interval": 4}, {FULL: 8, RECURRENT: 24}),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, {FULL: 4, RECURRENT: 28}),
        ({"attn_layer_indices": [9, 18, 27]}, {FULL: 3, RECURRENT: 29}),
        ({"hybrid_override_pattern": "M-M-M*-"}, {FULL: 1, RECURRENT: 3}),
        ({"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"]}, {FULL: 8, RECURRENT: 24}),
    ],
)
def test_layers_are_counted_by_kind(fields: dict[str, Any], layers: dict[str, int]) -> None:
    assert {kind: count for kind, count in read_architecture(llama(**fields)).layers.items() if count} == layers


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 131072),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 262144),
        ({"rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 524288),
        ({"rope_scaling": None}, 131072),
    ],
)
def test_the_length_is_what_vllm_derives(fields: dict[str, Any], length: int) -> None:
    assert read_architecture(llama(**fields)).length == length


def test_the_language_part_of_a_model_that_sees_is_what_counts() -> None:
    model = read_architecture({"model_type": "gemma3", "vision_config": {"hidden_size": 1}, "text_config": LLAMA_8B})
    assert model == read_architecture(LLAMA_8B)


def test_older_names_of_the_same_are_read() -> None:
    falcon = {"n_layer": 2, "n_head": 4, "multi_query": True, "n_embd": 256, "vocab_size": 100, "n_positions": 2048}
    model = read_architecture({**falcon, "torch_dtype": "float16"})
    assert (model.depth, model.heads, model.kv_heads, model.head_dim) == (2, 4, 1, 64)
    assert (model.length, model.dtype) == (2048, "float16")


def test_numbers_are_served_in_16_bits_unless_the_checkpoint_has_them_so() -> None:
    assert read_architecture(llama(dtype="float32")).dtype == "bfloat16"
    assert read_architecture(llama(dtype="float16")).dtype == "float16"


def test_a_cache_that_the_checkpoint_wants_in_fp8_is_told() -> None:
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    model = read_architecture(llama(quantization_config=scheme))
    assert (model.quantization, model.fp8_cache) == ("compressed-tensors", True)
    assert not read_architecture(llama(quantization_config={"quant_method": "fp8"})).fp8_cache


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ([], "config.json must be an object, but it is a list."),
        (None, "config.json must be an object, but it is a NoneType."),
        ({}, "config.json has no num_hidden_layers: it is not that of a language model, or of an unknown kind."),
        (llama(num_hidden_layers="many"), f"num_hidden_layers {LAYERS}, but it is 'many'."),
        (
            llama(num_hidden_layers=10**12),
            "num_hidden_layers of config.json must be a whole number from 1 to 10,000, but",
        ),
        (
            llama(num_hidden_layers=0),
            "num_hidden_layers of config.json must be a whole number from 1 to 10,000, but it is '0'.",
        ),
        (
            llama(vocab_size=None),
            "vocab_size of config.json must be a whole number from 1 to 1,000,000,000, but it is missing.",
        ),
        (
            llama(sliding_window=[1]),
            "sliding_window of config.json must be a whole number from 1 to 1,000,000,000, but it is '[1]'.",
        ),
        (llama(model_type="mamba2"), "Each layer of the model is recurrent"),
        (llama(quantization_config=[1]), "quantization_config of config.json must be an object."),
    ],
)
def test_a_config_that_is_none_is_told(config: object, sentence: str) -> None:
    with pytest.raises(BadConfig) as caught:
        read_architecture(config)
    assert str(caught.value).startswith(sentence)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(NAMES), ANY, max_size=6))
def test_any_config_is_read_or_refused(fields: dict[str, Any]) -> None:
    with contextlib.suppress(BadConfig):
        model = read_architecture(llama(**fields))
        cache = cache_of(model, 1, 2, model.length, 8192)
        assert cache.tokens(1 << 40) >= 0
        assert weights_of(model, [], 1, model.dtype, model.length) >= 0
