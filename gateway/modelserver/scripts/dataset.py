"""Rewrites a calibration dataset as plain text; a separate script, for a Python that has pandas.

    dataset.py SOURCE TARGET --samples N

SOURCE is .jsonl, .csv, .parquet, or a pandas DataFrame as .pkl or .pkl.gz, with the columns `question` and
`system_prompt`. TARGET is .jsonl, or .pkl for vLLM-Gaudi's scripts, which unpickle any file without checks.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import pickle
import random
import re
import resource
import sys
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas

COLUMNS = ["question", "system_prompt"]
_SEED = 42
# The memory limit for reading a file, whatever size it unpacks to.
_MOST_MEMORY = 8 << 30


class DatasetError(Exception):
    """A dataset is wrong; the text is a clause that says why."""


class _Named:
    """A placeholder for each object that a pickle names: it only records, and nothing is called, imported or made.

    The real parts of NumPy and pandas are unsafe, harmless as they look. Their reconstruction trusts sizes, offsets and
    flags from the file, so a file can read and write the memory of the process.
    """

    __slots__ = ("given", "state")
    called = ""
    given: tuple[Any, ...]
    state: Any

    def __new__(cls, *given: Any) -> _Named:
        made = super().__new__(cls)
        made.given, made.state = given, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python: the C one allocates as many objects as the file claims to have."""

    def find_class(self, module: str, name: str) -> Any:
        called = f"{module}.{name}"
        if not re.fullmatch(r"(numpy|pandas)(\.\w+)*|builtins\.(slice|bytearray)", called):
            raise DatasetError(
                f"it asks for {called}, which a DataFrame of text does not need, and which could run code here: "
                "save it as .jsonl or .parquet where it was made"
            )
        return type(name, (_Named,), {"__slots__": (), "called": called})


def _is(one: Any, *names: str) -> bool:
    return isinstance(one, _Named) and one.called.rpartition(".")[2] in names


def _whole(one: Any) -> list[Any]:
    """The elements of an array, a string array or an index, in C order. Raises DatasetError."""
    if _is(one, "_new_Index"):
        return _whole(one.given[1]["data"])
    if _is(one, "_reconstruct") and isinstance(one.state[4], list):
        return one.state[4]
    if _is(one, "__pyx_unpickle_NDArrayBacked"):
        parts = one.state or one.given[2]
        return _whole(next(part for part in parts if _is(part, "_reconstruct")))
    raise DatasetError("its parts are not those of a DataFrame of text")


def _places(one: Any) -> Iterable[int]:
    """The numbers of the columns that a block holds: a slice, or an array of 64-bit integers."""
    if _is(one, "slice"):
        return range(*one.given)
    data = one.state[4] if _is(one, "_reconstruct") else one.given[0]
    return array("q", bytes(data.given[0] if _is(data, "bytearray") else data))


def _columns(frame: Any) -> dict[str, list[Any]]:
    """The two wanted columns, from the placeholders of an unpickled DataFrame. Raises DatasetError."""
    if not _is(frame, "DataFrame"):
        raise DatasetError(f"it holds a {type(frame).__name__}, not a DataFrame")
    blocks, (names, *_) = frame.state["_mgr"].given
    names, found = _whole(names), {}
    _check_columns(names)
    for block in blocks:
        values, places, *_ = block.given
        for number, place in enumerate(places := list(_places(places))):
            if names[place] in COLUMNS:
                whole = _whole(values)
                length = len(whole) // len(places)
                found[names[place]] = whole[number * length : (number + 1) * length]
    return found


def _pickle(path: Path) -> Any:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        columns = _columns(_Unpickler(file).load())
    # A missing value is NaN, None or pandas' NA.
    return [
        {name: "" if value is None or value != value or _is(value, "NA") else value for name, value in row.items()}
        for row in (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    ]


def _jsonl(path: Path) -> Any:
    with path.open(encoding="utf-8-sig") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _csv(path: Path) -> Any:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        rows = list(reader)
        _check_columns(reader.fieldnames or [])
    for row in rows:
        # Allow empty extra fields: spreadsheets end each line with a comma.
        if any(row.pop(None, [])):
            raise DatasetError(f"a row has more fields than the first line has names: {row['question'][:40]!r}…")
    return rows


def _parquet(path: Path) -> Any:
    return pandas.read_parquet(path, columns=COLUMNS).astype(object).to_dict("records")


_READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".pkl": _pickle,
    ".pkl.gz": _pickle,
}


def _check_columns(names: Iterable[Any]) -> None:
    missing = [column for column in COLUMNS if column not in names]
    if missing:
        others = ", ".join(map(str, names)) or "nothing"
        raise DatasetError(f"it has no column {' and no column '.join(missing)}, only {others}")


def read(path: Path, samples: int) -> list[dict[str, str]]:
    """At most `samples` rows, the same at each call. Raises DatasetError."""
    kind = next((ending for ending in _READERS if path.name.lower().endswith(ending)), None)
    if kind is None:
        raise DatasetError(f"its name ends with none of {', '.join(_READERS)}")
    try:
        found = [_checked(row, number) for number, row in enumerate(_READERS[kind](path))]
    except DatasetError:
        raise
    # The readers raise any exception for a file that is not of their kind.
    except Exception as error:
        raise DatasetError(f"it cannot be read ({type(error).__name__}: {error})") from None
    rows = [row for row in found if row["question"]]
    if not rows:
        raise DatasetError("it has no row with a question")
    return random.Random(_SEED).sample(rows, min(samples, len(rows)))


def _checked(row: Any, number: int) -> dict[str, str]:
    if not isinstance(row, dict):
        raise DatasetError(f"row {number} is a {type(row).__name__}, not an object")
    _check_columns(row)
    text = {name: "" if row[name] is None else row[name] for name in COLUMNS}
    for name, value in text.items():
        if not isinstance(value, str):
            raise DatasetError(f"{name} of row {number} is a {type(value).__name__}, not text")
    return text


def _bound_memory() -> None:
    """Limit the memory beyond the libraries' share, which is large on a machine with many cores."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = taken + _MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> int:
    """Run the script; returns the exit status."""
    parser = argparse.ArgumentParser(description="Rewrite a calibration dataset as nothing but its text.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    given = parser.parse_args()
    _bound_memory()
    try:
        rows = read(given.source, given.samples)
        if given.target.suffix == ".pkl":
            # The newest protocol that every pandas with a matching vLLM can read.
            pandas.DataFrame(rows, dtype=object).to_pickle(given.target, protocol=4)
        else:
            given.target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except (DatasetError, OSError) as error:
        # An error text of a library may have several lines.
        reason = " ".join(str(error).split()).rstrip(".")
        sys.stderr.write(f"vllm-gateway: the dataset {given.source} cannot be used: {reason}.\n")
        return 1
    sys.stdout.write(f"Calibrating with {len(rows)} questions of {given.source}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
