"""Parses the header of a safetensors file, which lists its tensors, and the index, which lists a model's files."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

# The longest header that the format allows, in bytes.
_LONGEST = 100_000_000
_LENGTH = struct.Struct("<Q")
PREFIX = _LENGTH.size

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("F4", "F4_E2M1"), 4),
}
_MOST_DIMENSIONS, _LARGEST_DIMENSION = 16, 1 << 40
# Estimate for an index: bytes per tensor in a header beside the tensor's name, for its type, shape and offsets.
_OF_A_TENSOR = 140


class BadCheckpoint(Exception):
    """A checkpoint's files are wrong; the text is a sentence that says why."""


class Tensor(NamedTuple):
    """A tensor of a checkpoint; `dtype` is the format's own name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """The count of its numbers."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Its bytes, as stored."""
        return -(-self.numbers * _BITS[self.dtype] // 8)


def header_length(prefix: bytes, file: str) -> int:
    """Bytes of the header, from the file's first eight bytes. Raises BadCheckpoint."""
    if len(prefix) < PREFIX:
        raise BadCheckpoint(f"{file} is no safetensors file: it has {len(prefix)} bytes. Fetch it again.")
    (length,) = _LENGTH.unpack_from(prefix)
    if not 2 <= length <= _LONGEST:
        raise BadCheckpoint(
            f"{file} is no safetensors file: its header would have {length} bytes, and the format allows {_LONGEST}."
        )
    return int(length)


def read_header(header: bytes, file: str) -> list[Tensor]:
    """The tensors of a file. Raises BadCheckpoint."""
    try:
        told = orjson.loads(header)
        tensors = [
            Tensor(name, one["dtype"], tuple(one["shape"])) for name, one in told.items() if name != "__metadata__"
        ]
        sound = all(
            len(tensor.shape) <= _MOST_DIMENSIONS
            and all(type(number) is int and 0 <= number <= _LARGEST_DIMENSION for number in tensor.shape)
            for tensor in tensors
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise BadCheckpoint(f"{file} is no safetensors file: its header is not the JSON that it should be.")
    for tensor in tensors:
        if str(tensor.dtype) not in _BITS:
            raise BadCheckpoint(f"{file} has a tensor of the type {tensor.dtype!r}, whose size is not known here.")
    return tensors


def files_of_index(index: bytes) -> dict[str, int]:
    """The files that an index names, sorted, each with an upper estimate of its header's bytes.

    Raises BadCheckpoint.
    """
    try:
        names: Mapping[str, Any] = orjson.loads(index)["weight_map"]
        guessed: dict[str, int] = {}
        for tensor, file in names.items():
            guessed[file] = guessed.get(file, 1024) + len(tensor.encode()) + _OF_A_TENSOR
    except (ValueError, LookupError, TypeError, AttributeError):
        guessed = {}
    if not guessed or not all(isinstance(file, str) and is_plain(file) for file in guessed):
        raise BadCheckpoint("model.safetensors.index.json has no weight_map of tensors and their files.")
    return dict(sorted(guessed.items()))


def is_plain(file: str) -> bool:
    """Whether the name is of a safetensors file in the same folder."""
    return file.endswith(".safetensors") and "/" not in file and "\\" not in file
