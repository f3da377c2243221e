"""Turns environment variables into vLLM's command line; pure functions that need only Python.

For `up`, and for the containers of model servers, where it is mounted beside any vLLM that the image has.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# vLLM's own options, and the variables for each in order of precedence, known from the systems that this replaces.
# GPU_MEM_ULTIIZATION is spelled so in vllm-app's documentation.
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
    "--distributed-executor-backend": ("VLLM_DISTRIBUTED_EXECUTOR_BACKEND",),
    "--nnodes": ("VLLM_NNODES",),
    "--node-rank": ("VLLM_NODE_RANK",),
    "--master-addr": ("VLLM_MASTER_ADDR",),
    "--shutdown-timeout": ("VLLM_SHUTDOWN_TIMEOUT",),
    "--chat-template": ("VLLM_CHAT_TEMPLATE",),
    "--config": ("VLLM_CONFIG",),
    "--quantization": ("QUANTIZATION",),
}
_FLAGS = {"--enforce-eager": "VLLM_EAGER", "--enable-expert-parallel": "VLLM_ENABLE_EXPERT_PARALLEL"}
_YES, _NO = {"1", "true", "yes", "on"}, {"", "0", "false", "no", "off"}
_OURS = [name for names in _OPTIONS.values() for name in names] + [*_FLAGS.values(), "VLLM_APP_CONFIG"]
# Not for vLLM, which warns of each variable with its own prefix that it does not know.
NOT_VLLMS = frozenset(name for name in _OURS if name.startswith("VLLM_"))
# vLLM may run a model's own code, which must find no secret to call the gateway, or another server as the gateway.
# A deny-list, because vLLM and its libraries read more variables than anybody could list.
_GATEWAYS_OWN = re.compile(
    r"GATEWAY_.*|LLM_VLLM_(API_KEY|CLIENT_ID|CLIENT_SECRET|TOKEN_URL)(_FILE)?|(HF|HUGGING_FACE_HUB)_TOKEN_FILE"
    r"|OTEL_.*HEADERS"
)

_SECRET = re.compile("key|token|secret|password", re.IGNORECASE)
# An option for a number of tokens is no secret.
_COUNT = re.compile(r"-*(max|min|num)[\w-]*[_-]tokens", re.IGNORECASE)
# vLLM's secret options, listed because its parser also accepts the beginning of a name.
_SECRET_OPTIONS = ("--api-key", "--encryption-keyfile", "--hf-token", "--ssl-keyfile-password")
_OPTION = re.compile(r"(--?(?!\.?\d)[\w.+-]*)(=?)(.*)", re.DOTALL)
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_HIDDEN = "…"


class OptionError(Exception):
    """An option is wrong; the text is a sentence that says why."""


def options(environ: Mapping[str, str]) -> list[str]:
    """vLLM's options for these variables; an empty one counts as unset.

    Raises OptionError, also if EXTRA_ARGS cannot be split.
    """
    found: list[str] = []
    _number(environ, "VLLM_SHUTDOWN_TIMEOUT", 0)
    headless = _is_headless(environ)
    for option, names in _OPTIONS.items():
        if given := _given(names, environ):
            found += [option, environ[given[0]]]
    found += [flag for flag, name in _FLAGS.items() if is_on(environ, name)]
    # Of several nodes only the first has an API; without --headless the others would wait for an API of their own.
    found += ["--headless"] if headless else []
    extra = environ.get("EXTRA_ARGS", "")
    try:
        # Last, so that the user's options override ours.
        return found + shlex.split(extra)
    except ValueError as error:
        raise OptionError(f"EXTRA_ARGS cannot be split as a shell would ({error}).") from None


def _is_headless(environ: Mapping[str, str]) -> bool:
    """Whether this is one of several nodes, and not the first. Raises OptionError if the nodes cannot form a group.

    vLLM would report that too, but only after a minute of imports, and in terms of its own options.
    """
    nodes, rank = _number(environ, "VLLM_NNODES", 1), _number(environ, "VLLM_NODE_RANK", 0)
    if rank >= nodes:
        raise OptionError(
            f"VLLM_NODE_RANK must be less than VLLM_NNODES, from 0 to {nodes - 1}, but it is {rank}: "
            "count nodes from 0."
        )
    if nodes > 1 and not environ.get("VLLM_MASTER_ADDR"):
        raise OptionError(
            f"VLLM_NNODES is {nodes}, but VLLM_MASTER_ADDR is not set: give all nodes the address of the first one."
        )
    # Sizes in EXTRA_ARGS or in a file override these variables, and only vLLM reads them.
    if "parallel-size" in environ.get("EXTRA_ARGS", "").replace("_", "-") or environ.get("VLLM_CONFIG"):
        return rank > 0
    tensors = next(iter(_given(_OPTIONS["--tensor-parallel-size"], environ)), "VLLM_TP_SIZE")
    tp, pp = _number(environ, tensors, 1), _number(environ, "VLLM_PP_SIZE", 1)
    if tp * pp % nodes:
        raise OptionError(
            f"{tensors} ({tp}) times VLLM_PP_SIZE ({pp}) must be a multiple of VLLM_NNODES, but {tp * pp} devices "
            f"cannot be parted over {nodes} nodes: each node gets as many as the next."
        )
    return rank > 0


def _number(environ: Mapping[str, str], name: str, least: int) -> int:
    """A whole number, `least` if it is unset. Raises OptionError."""
    value = environ.get(name) or str(least)
    if not (value.isascii() and value.isdecimal()) or int(value) < least:
        raise OptionError(f"{name} must be a whole number, {least} or more, but it is {value!r}.")
    return int(value)


def differing(environ: Mapping[str, str]) -> list[str]:
    """One sentence for each variable that is overridden by a variable of the same meaning with another value."""
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
    """Whether a variable is true. Raises OptionError for a word that is neither true nor false."""
    word = environ.get(name, "").lower()
    if word not in _YES | _NO:
        raise OptionError(f"{name} must be true or false, but it is {word!r}.")
    return word in _YES


def fp8(device: str, *, prepared: bool) -> list[str]:
    """The options for FP8 on a device (cpu, hpu or cuda); `prepared` says that the checkpoint is in FP8 already.

    The CPU cannot quantize while it loads. Gaudi uses the scales that QUANT_CONFIG names.
    """
    if device == "hpu":
        return ["--quantization", "inc", "--kv-cache-dtype", "fp8_inc"]
    if device == "cuda":
        return ([] if prepared else ["--quantization", "fp8"]) + ["--kv-cache-dtype", "fp8"]
    return [] if prepared else ["--kv-cache-dtype", "fp8_e5m2"]


def vllm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """vLLM's environment: without variables that are empty or not for vLLM, and with secrets under vLLM's names."""
    found = {
        name: value
        for name, value in environ.items()
        if value and name not in NOT_VLLMS and not _GATEWAYS_OWN.fullmatch(name)
    }
    if key := environ.get("LLM_VLLM_API_KEY"):
        found["VLLM_API_KEY"] = key
    if token := environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        found["HF_TOKEN"] = token
    return found


def served_names(argv: Sequence[str]) -> list[str]:
    """The names by which a vLLM of this command line lists its model; empty if an option file may set other names."""
    given: dict[str, list[str]] = {}
    values: list[str] = []
    for word in argv:
        option = _OPTION.fullmatch(word)
        if option is None:
            values.append(word)
            continue
        name, equals, value = option.groups()
        # vLLM's parser treats an underscore as a dash, and uses the last of two values.
        values = given[name.replace("_", "-")] = [value] if equals else []
    if names := given.get("--served-model-name"):
        return names
    return [] if "--config" in given else given.get("--model", [])


def shown(argv: Sequence[str]) -> str:
    """A command line in shell syntax, for a log, with possible secrets hidden.

    Hidden are the values of an option whose name contains key, token, secret or password. So are those of an option
    that may be short for such an option of vLLM, of such names in JSON, and the user and password of a URL. The options
    of our own variables are shown.
    """
    words, hides = [], False
    for word in argv:
        option = _OPTION.fullmatch(word)
        if option is None:
            words.append(_HIDDEN if hides else shlex.quote(_without_secrets(word)))
            continue
        name, equals, value = option.groups()
        hides = _is_secret(name)
        if value:
            value = _HIDDEN if hides else shlex.quote(_without_secrets(value))
        words.append(f"{name}{equals}{value}")
    return " ".join(words)


def _is_secret(option: str) -> bool:
    name = option.replace("_", "-").lower()
    if name in _OPTIONS:
        return False
    return _names_secret(name) or (len(name) > 2 and any(known.startswith(name) for known in _SECRET_OPTIONS))


def _names_secret(name: str) -> bool:
    return bool(_SECRET.search(name)) and not _COUNT.fullmatch(name)


def _without_secrets(value: str) -> str:
    if value.lstrip()[:1] in ("{", "["):
        try:
            value = json.dumps(_redacted(json.loads(value)), ensure_ascii=False)
        except (ValueError, RecursionError):
            if _SECRET.search(value):
                return _HIDDEN
    return _PASSWORD.sub(_HIDDEN, value)


def _redacted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _HIDDEN if _names_secret(name) else _redacted(one) for name, one in value.items()}
    return [_redacted(one) for one in value] if isinstance(value, list) else value
