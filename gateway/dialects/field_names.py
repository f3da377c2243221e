"""The fields of a chat call, and the field that a misspelt name was meant for."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable
from typing import Final

from gateway.wire.errors import BadRequest

# The fields of vLLM 0.32's chat call, and `return_weight_versions` of 0.33. vLLM silently ignores any other field.
VLLM_FIELDS: Final = frozenset(
    [
        "add_generation_prompt",
        "add_special_tokens",
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "chat_template",
        "chat_template_kwargs",
        "continue_final_message",
        "documents",
        "ec_transfer_params",
        "echo",
        "frequency_penalty",
        "ignore_eos",
        "include_reasoning",
        "include_stop_str_in_output",
        "kv_transfer_params",
        "length_penalty",
        "logit_bias",
        "logprob_token_ids",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "media_io_kwargs",
        "messages",
        "min_p",
        "min_tokens",
        "mm_payload",
        "mm_processor_kwargs",
        "model",
        "n",
        "parallel_tool_calls",
        "presence_penalty",
        "priority",
        "prompt_logprobs",
        "reasoning_effort",
        "repetition_detection",
        "repetition_penalty",
        "request_id",
        "response_format",
        "return_mm_kwargs",
        "return_prompt_text",
        "return_token_ids",
        "return_token_offsets",
        "return_tokens_as_token_ids",
        "return_weight_versions",
        "routed_experts_prompt_start",
        "seed",
        "session_id",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_interval",
        "stream_options",
        "structured_outputs",
        "temperature",
        "thinking_token_budget",
        "tool_choice",
        "tools",
        "top_k",
        "top_logprobs",
        "top_p",
        "truncate_prompt_tokens",
        "truncation_side",
        "use_beam_search",
        "user",
        "vllm_xargs",
        "watermarking",
    ]
)
OWN_FIELDS: Final = frozenset(
    [
        "data",
        "input_guardrail_params",
        "max_new_tokens",
        "output_guardrail_params",
        "query",
        "stream_style",
        "streaming",
    ]
)

# Shorter fields are near too many other names. Of a body, at most `_LOOKS` unknown names are checked.
_SHORTEST: Final = 6
_LOOKS: Final = 8


def refuse_misspelt(names: Iterable[str]) -> None:
    """Raises BadRequest for a name that differs from a field by one character, or only by case, `_` and `-`."""
    unknown = (name for name in names if name not in VLLM_FIELDS and len(name) < 64)
    for name in itertools.islice(unknown, _LOOKS):
        if meant := _near(name):
            raise BadRequest(f"{name} is not a field: did you mean {meant}?", param=name)


def _near(name: str) -> str | None:
    plain = _plain(name)
    for variant in _variants(plain):
        field = _fields().get(variant)
        if field is not None and _differ_by_one(plain, _plain(field)):
            return field
    return None


def _differ_by_one(one: str, other: str) -> bool:
    """Whether the names are equal, or differ by one inserted, deleted or replaced character or by their order."""
    if len(one) == len(other):
        return sum(map(operator.ne, one, other)) < 2 or sorted(one) == sorted(other)
    return one in _variants(other) or other in _variants(one)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _variants(name: str) -> set[str]:
    """The name, and the name without each of its characters: two similar names share a variant."""
    return {name, *(name[:at] + name[at + 1 :] for at in range(len(name)))}


@functools.cache
def _fields() -> dict[str, str]:
    return {
        variant: field
        for field in sorted(VLLM_FIELDS | OWN_FIELDS)
        if len(field) >= _SHORTEST
        for variant in _variants(_plain(field))
    }
