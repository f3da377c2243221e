"""Turns vllm-app's config.json into vLLM's model and options; needs only Python, as it is mounted with vllm_args.

    {"model_path": "./models/NAME", "cuda_graph_mode": "piecewise", "cuda_graph_capture_sizes": [1, 2, 4],
     "max_tokens": 2048, "temperature": 0.5, "top_p": 0.85, "top_k": 25, "repetition_penalty": 1.1,
     "keep_first_token": false}

Each key may be missing. The last key made the text of each answer's first token empty, and is ignored.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gateway.modelserver.vllm_args import OptionError

_MODES = ("piecewise", "full", "full_decode_only", "full_and_piecewise")
_GRAPHS = {"cuda_graph_mode": "cudagraph_mode", "cuda_graph_capture_sizes": "cudagraph_capture_sizes"}
# The defaults of a call that sets no value; only the last is a limit, which vLLM applies to every call.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
}


def _is_whole(value: object, least: int) -> bool:
    # In Python True is an int.
    return type(value) is int and value >= least


def _is_number(value: object) -> bool:
    # Python's JSON parser accepts NaN and infinities.
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


# Checked here, because vLLM would refuse every call with a wrong value.
_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model_path": ("a folder or a hub's ORG/NAME", lambda value: isinstance(value, str) and value.isprintable()),
    "cuda_graph_mode": (f"one of {', '.join(_MODES)}", lambda value: value in _MODES),
    "cuda_graph_capture_sizes": (
        "a list of whole numbers, each 1 or more",
        lambda value: isinstance(value, list) and all(_is_whole(size, 1) for size in value),
    ),
    "keep_first_token": ("true or false", lambda value: isinstance(value, bool)),
    "max_tokens": ("a whole number, 1 or more", lambda value: _is_whole(value, 1)),
    "temperature": ("a number from 0 to 2", lambda value: _is_number(value) and 0 <= value <= 2),
    "top_p": ("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1),
    "top_k": ("a whole number, -1 or more", lambda value: _is_whole(value, -1)),
    "repetition_penalty": ("a number above 0", lambda value: _is_number(value) and value > 0),
}


class App(NamedTuple):
    """The model, if the file names one, and vLLM's options."""

    model: str | None
    options: list[str]


def read(file: str | Path | None) -> App:
    """Read the file that VLLM_APP_CONFIG names; no file is an empty App. Raises OptionError, naming file and key."""
    if not file:
        return App(None, [])
    where = f"{file} (VLLM_APP_CONFIG)"
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OptionError(f"{where} cannot be read ({error.strerror}): name vllm-app's config.json.") from None
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{where} is no JSON ({error}): correct it.") from None
    try:
        return from_config(config, Path(file).absolute().parent)
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from None


def from_config(config: object, folder: Path) -> App:
    """Read a parsed config; its paths are relative to `folder`. Raises OptionError, which names key and value."""
    if not isinstance(config, dict):
        raise OptionError("it must be an object of vllm-app's keys.")
    for key in config:
        _check_key(key)
    # As with variables, an empty value counts as unset.
    given = {key: value for key, value in config.items() if value not in (None, "", [])}
    for key, value in given.items():
        allowed, is_right = _KEYS[key]
        if not is_right(value):
            raise OptionError(f"{key} must be {allowed}, but it is {json.dumps(value)}.")
    model = given.get("model_path")
    options = _option("--compilation-config", _GRAPHS, given) + _option(
        "--override-generation-config", _SAMPLING, given
    )
    return App(_from_path(model, folder) if model else None, options)


def _check_key(key: str) -> None:
    if key not in _KEYS:
        near = difflib.get_close_matches(key, _KEYS, n=1)
        advice = f"did you mean {near[0]}?" if near else "remove it, or name vllm-app's own file."
        raise OptionError(f"{key} is not a key of vllm-app's: {advice}")


def _from_path(path: str, folder: Path) -> str:
    """The folder if it is one, else the path unchanged, as a hub's name."""
    found = folder / path
    return str(found) if path.startswith((".", "/")) or found.is_dir() else path


def _option(option: str, names: dict[str, str], given: dict[str, Any]) -> list[str]:
    """vLLM's option as JSON, with the given keys under vLLM's names."""
    found = {name: given[key] for key, name in names.items() if key in given}
    if "cudagraph_mode" in found:
        found["cudagraph_mode"] = found["cudagraph_mode"].upper()
    return [option, json.dumps(found)] if found else []
