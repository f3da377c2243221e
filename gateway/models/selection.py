"""Selects a model's files by patterns and by the format of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from huggingface_hub.utils import filter_repo_objects

from gateway.models import ModelError

# The formats that a user can choose, and the file name endings of their weights.
FORMATS = {
    "safetensors": (".safetensors",),
    "bin": (".bin",),
    "pt": (".pt", ".pth"),
    "gguf": (".gguf",),
}
# The endings of weights for other frameworks, which a user cannot choose.
_OTHERS = (".ckpt", ".h5", ".keras", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".safetensors.gz", ".tflite")
_INDEX = ".index.json"
_MOST_SHOWN = 6


class RemoteFile(NamedTuple):
    """A file of a hub's model: its path on the hub, its size in bytes and its hash."""

    path: str
    size: int
    oid: str


class Wanted(NamedTuple):
    """The selection of a model's files; without patterns and format it is all files."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    format: str | None = None


def check_path(path: str) -> None:
    """Check a file's path, which the hub chooses. Raises ModelError for a path outside of the model's folder."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise ModelError(f"The hub names a file {path!r}, which is no path within a model: nothing of it is fetched.")


def select(files: Iterable[RemoteFile], wanted: Wanted, model: str) -> list[RemoteFile]:
    """The wanted files, sorted by path. Raises ModelError if there are none."""
    found = sorted(files)
    if not found:
        raise ModelError(f"{model} has no files.")
    patterns = {"allow_patterns": list(wanted.include) or None, "ignore_patterns": list(wanted.exclude) or None}
    matching = list(filter_repo_objects(found, key=lambda file: file.path, **patterns))
    if not matching:
        given = [f"--include {one!r}" for one in wanted.include] + [f"--exclude {one!r}" for one in wanted.exclude]
        raise ModelError(f"No file of {model} matches {' '.join(given)}: it has {_listed(found)}.")
    if wanted.format is None:
        return matching
    chosen = [file for file in matching if _format_of(file.path) in (None, wanted.format)]
    if not any(_is_weights(file.path) for file in chosen):
        formats = sorted({_format_of(file.path) or "" for file in matching if _is_weights(file.path)} - {""})
        has = f"its weights are {' and '.join(formats)}" if formats else f"it has {_listed(matching)}"
        raise ModelError(f"{model} has no weights as {wanted.format}: {has}.")
    return chosen


def _format_of(path: str) -> str | None:
    """The format of a file of weights or of their index; None for a file that belongs to any format."""
    name = PurePosixPath(path).name.lower()
    if name.startswith("tokenizer"):
        return None
    name = name.removesuffix(_INDEX)
    for known, endings in FORMATS.items():
        if name.endswith(endings):
            return known
    return "another format" if name.endswith(_OTHERS) else None


def _is_weights(path: str) -> bool:
    return _format_of(path) is not None and not path.endswith(_INDEX)


def _listed(files: Sequence[RemoteFile]) -> str:
    names = ", ".join(file.path for file in files[:_MOST_SHOWN])
    return names if len(files) <= _MOST_SHOWN else f"{names} and {len(files) - _MOST_SHOWN} more"
