"""From environment variables to vLLM's command line; pure functions, with nothing but Python's own.

For `up`, and for the containers of model servers, where this is mounted beside whatever vLLM the image has.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

# vLLM's own options, and the names for each that people know from the systems that this replaces, the one that wins
# first. vllm-app's documentation has GPU_MEM_ULTIIZATION.
_OPTIONS = {
    "--revision": ("LLM_VLLM_MODEL_REVISION",),
    "--served-model-name": ("SERVED_MODEL_NAME",),
    "--dtype": ("VLLM_DTYPE",),
    "--max-model-len": ("VLLM_MAX_MODEL_LEN", "MAX_TOKENS"),
    "--max-num-seqs": ("VLLM_MAX_NUM_SEQS", "MAX_CONCURRENT_REQUESTS"),
    "--max-num-batched-tokens": ("MAX_CONCURRENT_TOKENS",),
    "--block-size": ("VLLM_BLOCK_SIZE",),
    "--gpu-memory-utilization": ("GPU_MEMORY_UTILIZATION", "GPU_MEM_UTILIZATION", "GPU_MEM_ULTIIZATION"),
    "--tensor-parallel-size": ("VLLM_TP_SIZE", "NUM_GPU"),
    "--pipeline-parallel-size": ("VLLM_PP_SIZE",),
    "--chat-template": ("VLLM_CHAT_TEMPLATE",),
    "--config": ("VLLM_CONFIG",),
    "--quantization": ("QUANTIZATION",),
}
_FLAGS = {"--enforce-eager": "VLLM_EAGER", "--enable-expert-parallel": "VLLM_ENABLE_EXPERT_PARALLEL"}
_YES, _NO = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}
_OURS = [name for names in _OPTIONS.values() for name in names] + [*_FLAGS.values(), "VLLM_APP_CONFIG"]
# vLLM warns of each variable of its own prefix that it does not know.
NOT_VLLMS = frozenset(name for name in _OURS if name.startswith("VLLM_"))


class OptionError(Exception):
    """What cannot be started, in a sentence."""


def options(environ: Mapping[str, str]) -> list[str]:
    """vLLM's options for these variables, of which an empty one is none. Raises OptionError, for odd EXTRA_ARGS too."""
    found: list[str] = []
    for option, names in _OPTIONS.items():
        if given := _given(names, environ):
            found += [option, environ[given[0]]]
    found += [flag for flag, name in _FLAGS.items() if is_on(environ, name)]
    extra = environ.get("EXTRA_ARGS", "")
    try:
        # Last, so that the person's word is the one that counts.
        return found + shlex.split(extra)
    except ValueError as error:
        raise OptionError(f"EXTRA_ARGS cannot be split as a shell would ({error}).") from None


def differing(environ: Mapping[str, str]) -> list[str]:
    """A sentence for each variable that does not count, as one of the same meaning has another value."""
    given = [_given(names, environ) for names in _OPTIONS.values()]
    return [
        f"{names[0]} and {other} are both set and differ: {names[0]} is used."
        for names in given
        for other in names[1:]
        if environ[other] != environ[names[0]]
    ]


def _given(names: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    return [name for name in names if environ.get(name)]


def is_on(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable says yes. Raises OptionError for another word than those for yes and no."""
    word = environ.get(name, "").lower()
    if word not in _YES | _NO:
        raise OptionError(f"{name} must be true or false, but it is {word!r}.")
    return word in _YES


def fp8(device: str, *, prepared: bool) -> list[str]:
    """What runs a model in FP8 on a device (cpu, hpu or cuda); `prepared` says that its checkpoint is in FP8 already.

    The CPU has no way to quantize while it loads. Gaudi goes by the scales that QUANT_CONFIG leads to.
    """
    if device == "hpu":
        return ["--quantization", "inc", "--kv-cache-dtype", "fp8_inc"]
    if device == "cuda":
        return ([] if prepared else ["--quantization", "fp8"]) + ["--kv-cache-dtype", "fp8"]
    return [] if prepared else ["--kv-cache-dtype", "fp8_e5m2"]


def vllm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """vLLM's environment: without what is empty or not for it, and with the keys under the names that it reads."""
    found = {name: value for name, value in environ.items() if value and name not in NOT_VLLMS}
    if key := environ.get("LLM_VLLM_API_KEY"):
        found["VLLM_API_KEY"] = key
    if token := environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        found["HF_TOKEN"] = token
    return found
