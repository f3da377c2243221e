"""Rewrites a calibration dataset as nothing but its text; a script of its own, for a Python that has pandas.

    dataset.py SOURCE TARGET --samples N

SOURCE is .jsonl, .csv, .parquet, or a pandas DataFrame as .pkl or .pkl.gz, with the columns `question` and
`system_prompt`. TARGET is .jsonl, or .pkl for vLLM-Gaudi's scripts, which unpickle whatever they are given.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas

COLUMNS = ["question", "system_prompt"]
_SEED = 42

# NumPy 2 has moved its parts.
_CORE = "numpy.core" if numpy.__version__.startswith("1.") else "numpy._core"
# All that the pickle of a DataFrame of text, numbers and lists of them names, from pandas 1 to 3 and NumPy 1 to 2.
# Not what pyarrow's strings need: it takes offsets into memory from the file, and does not look where they lead.
_ALLOWED = {
    "builtins": {"slice", "bytearray"},
    "numpy": {"dtype", "ndarray"},
    f"{_CORE}.multiarray": {"_reconstruct", "scalar"},
    f"{_CORE}.numeric": {"_frombuffer"},
    "pandas": {"DataFrame", "Index", "RangeIndex", "StringDtype", "NA"},
    "pandas.arrays": {"StringArray"},
    "pandas._libs.arrays": {"__pyx_unpickle_NDArrayBacked"},
    "pandas._libs.internals": {"_unpickle_block"},
    "pandas._libs.missing": {"NA"},
    "pandas.core.arrays.string_": {"StringArray", "StringDtype", "StringArrayNumpySemantics"},
    "pandas.core.frame": {"DataFrame"},
    "pandas.core.indexes.base": {"Index", "_new_Index"},
    "pandas.core.indexes.range": {"RangeIndex"},
    "pandas.core.internals.managers": {"BlockManager"},
}
# Classes that pandas 2 no longer has.
_MOVED = {("pandas.core.indexes.numeric", name): ("pandas", "Index") for name in ("Int64Index", "Float64Index")}


class Wrong(Exception):
    """What is wrong with a dataset, in a sentence."""


class _Unpickler(pickle.Unpickler):
    """Takes a DataFrame's parts and nothing else: what a pickle names, it may call."""

    def find_class(self, module: str, name: str) -> Any:
        module, name = _MOVED.get((module, name), (module, name))
        module = re.sub(r"^numpy\._?core(?=\.)", _CORE, module)
        if name not in _ALLOWED.get(module, ()):
            raise Wrong(
                f"it asks for {module}.{name}, which a DataFrame of text does not need, and which could run code here: "
                "save it as .jsonl or .parquet where it was made"
            )
        return super().find_class(module, name)


def _pickle(path: Path) -> Any:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _Unpickler(file).load()
    except (Wrong, OSError):
        raise
    # Whatever bytes of another kind make of pandas' and NumPy's parts.
    except Exception as error:
        raise Wrong(f"pandas {pandas.__version__} makes no DataFrame of it ({type(error).__name__}: {error})") from None


def _jsonl(path: Path) -> Any:
    """By hand, as pandas' own reader takes text for dates and numbers."""
    with path.open(encoding="utf-8") as lines:
        return pandas.DataFrame([json.loads(line) for line in lines if line.strip()])


_READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": _jsonl,
    ".csv": lambda path: pandas.read_csv(path, dtype=str, keep_default_na=False),
    ".parquet": lambda path: pandas.read_parquet(path, columns=COLUMNS),
    ".pkl": _pickle,
    ".pkl.gz": _pickle,
}


def read(path: Path, samples: int) -> Any:
    """A DataFrame of `samples` rows at most, drawn as vLLM-Gaudi's scripts draw theirs. Raises Wrong."""
    kind = next((ending for ending in _READERS if path.name.endswith(ending)), None)
    if kind is None:
        raise Wrong(f"its name ends with none of {', '.join(_READERS)}")
    try:
        found = _READERS[kind](path)
    # pyarrow says of a missing column that there is no match for it.
    except (OSError, ValueError, EOFError) as error:
        raise Wrong(f"it cannot be read ({error})") from None
    if not isinstance(found, pandas.DataFrame):
        raise Wrong(f"it holds a {type(found).__name__}, not a DataFrame")
    missing = [column for column in COLUMNS if column not in found.columns]
    if missing:
        others = ", ".join(map(str, found.columns)) or "nothing"
        raise Wrong(f"it has no column {' and no column '.join(missing)}, only {others}")
    text = found[COLUMNS].astype(object)
    text = text.where(text.notna(), "")
    for column in COLUMNS:
        for row, value in enumerate(text[column]):
            if not isinstance(value, str):
                raise Wrong(f"{column} of row {row} is a {type(value).__name__}, not text")
    text = text[text["question"] != ""]
    if text.empty:
        raise Wrong("it has no row with a question")
    return text.sample(frac=1, random_state=_SEED).head(samples)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Rewrite a calibration dataset as nothing but its text.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    given = parser.parse_args()
    try:
        rows = read(given.source, given.samples)
    except Wrong as error:
        # Libraries' words may have lines of their own.
        reason = " ".join(str(error).split()).rstrip(".")
        sys.stderr.write(f"vllm-gateway: the dataset {given.source} cannot be used: {reason}.\n")
        return 1
    if given.target.suffix == ".pkl":
        # The newest protocol that every pandas for which there is a vLLM can read.
        rows.to_pickle(given.target, protocol=4)
    else:
        rows.to_json(given.target, orient="records", lines=True)
    sys.stdout.write(f"Calibrating with {len(rows)} questions of {given.source}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
