"""Calibration datasets: what is read of them, and what is refused, the hostile above all."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.heavy.fp8.conftest import DATASETS, SCRIPTS, Kit

ROWS = {("What is a bell?", "You are kind."), ("Why?", ""), ("Ünïcode 漢字", "")}


@pytest.mark.parametrize(
    "name", ["pandas-1.5.pkl", "pandas-2.3-string.pkl", "pandas-3.1-no-pyarrow.pkl", "questions.parquet"]
)
def test_a_dataset_of_any_pandas_is_read(kit: Kit, tmp_path: Path, name: str) -> None:
    said, rows = kit.read(DATASETS / name, tmp_path)
    assert said == f"Calibrating with 3 questions of {DATASETS / name}.\n"
    assert rows == ROWS


def test_a_dataset_of_plain_text_or_packed_is_read(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"question": "What is a bell?", "system_prompt": "You are kind.", "id": 1}\n'
        '{"question": "Why?", "system_prompt": null}\n'
        '{"question": "\\u00dcn\\u00efcode 漢字", "system_prompt": ""}\n'
        '{"question": "", "system_prompt": "left out"}\n',
        encoding="utf-8",
    )
    (tmp_path / "a.csv").write_text(
        "system_prompt,question\nYou are kind.,What is a bell?\n,Why?\n,Ünïcode 漢字\n", encoding="utf-8"
    )
    (tmp_path / "a.pkl.gz").write_bytes(gzip.compress((DATASETS / "pandas-1.5.pkl").read_bytes()))
    for name in ("a.jsonl", "a.csv", "a.pkl.gz"):
        assert kit.read(tmp_path / name, tmp_path)[1] == ROWS, name


def test_a_spreadsheets_habits_are_no_matter(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "A.CSV").write_text("\ufeffquestion,system_prompt\nWhat is a bell?,You are kind.,\n", encoding="utf-8")
    assert kit.read(tmp_path / "A.CSV", tmp_path)[1] == {("What is a bell?", "You are kind.")}


def test_numbers_and_dates_in_text_stay_text(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,system_prompt\n007,2026-01-01\nNA,1e5\n")
    (tmp_path / "a.jsonl").write_text('{"question": "007", "system_prompt": "2026-01-01"}\n')
    assert kit.read(tmp_path / "a.csv", tmp_path)[1] == {("007", "2026-01-01"), ("NA", "1e5")}
    assert kit.read(tmp_path / "a.jsonl", tmp_path)[1] == {("007", "2026-01-01")}


def test_as_many_rows_are_drawn_as_are_asked_for_and_the_same_each_time(kit: Kit, tmp_path: Path) -> None:
    file = tmp_path / "many.csv"
    file.write_text("question,system_prompt\n" + "".join(f"question {number},\n" for number in range(100)))
    said, rows = kit.read(file, tmp_path, samples=7)
    assert "Calibrating with 7 questions" in said
    assert len(rows) == 7
    assert kit.read(file, tmp_path, samples=7)[1] == rows != {(f"question {number}", "") for number in range(7)}


def test_gaudis_scripts_get_a_pickle_that_we_wrote(kit: Kit, tmp_path: Path) -> None:
    target = tmp_path / "mine.pkl"
    assert kit.run(SCRIPTS / "dataset.py", DATASETS / "pandas-1.5.pkl", target, "--samples", "2").returncode == 0
    # As step 1 of their scripts reads it.
    program = "import pandas, sys; f = pandas.read_pickle(sys.argv[1]); print(len(f), *f.columns)"
    assert kit.run("-c", program, target).stdout == "2 question system_prompt\n"


class Evil:
    """Its pickle calls whatever it is given."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call = (call, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def named(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle that calls what is of that name, which this Python need not have."""
    parts = b"".join(b"X" + len(text).to_bytes(4, "little") + text for text in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + parts + b"tR."


def malicious(mark: Path) -> dict[str, bytes]:
    """Pickles that would make the file `mark` if they were let, or that are none."""
    command = f"touch {mark}"
    frame = (DATASETS / "pandas-1.5.pkl").read_bytes()
    return {
        "os.system": pickle.dumps(Evil(os.system, command)),
        "eval": pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')")),
        "exec": pickle.dumps(Evil(exec, f"open({str(mark)!r}, 'w')")),
        "open": pickle.dumps(Evil(open, str(mark), "w")),
        "subprocess": pickle.dumps(Evil(subprocess.getoutput, command)),
        "getattr": named("builtins", "getattr", b"a", b"b"),
        "in a list": pickle.dumps([1, {"a": Evil(os.system, command)}]),
        "pandas.eval": named("pandas", "eval", f"@__import__('os').system({command!r})".encode()),
        "pandas.read_pickle": named("pandas", "read_pickle", str(mark).encode()),
        "pandas' own import": named("pandas.compat._optional", "import_optional_dependency", b"this"),
        "numpy.load": named("numpy", "load", str(mark).encode()),
        "numpy's runner": named("numpy.testing", "runstring", command.encode(), b"{}"),
        "through a dot": b"\x80\x04\x8c\x06pandas\x8c\x12DataFrame.to_pickle\x93" + b"\x8c\x01a\x85R.",
        "a module of ours": named("dataset", "subprocess", b""),
        "posix": b"cposix\nsystem\n(V" + command.encode() + b"\ntR.",
        "after a good one": frame[:-1] + pickle.dumps(Evil(os.system, command)),
        "persistent": b"Pos.system\n.",
        "a registered extension": b"\x80\x02\x82\x01.",
        "cut off": frame[: len(frame) // 2],
        "empty": b"",
        "no pickle": b"question,system_prompt\n",
        "a giant of bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "a giant": b"\x80\x04]\x94(" + b"\x8d" + (2**62).to_bytes(8, "little"),
        # What is refused by no name: made of nothing but an array's own parts.
        **{file.stem: file.read_bytes() for file in sorted((DATASETS / "hostile").iterdir())},
        "another thing": pickle.dumps({"question": ["a"], "system_prompt": ["b"]}),
    }


@pytest.mark.parametrize("name", sorted(malicious(Path("mark"))))
def test_a_pickle_runs_nothing(kit: Kit, tmp_path: Path, name: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / "evil.pkl"
    file.write_bytes(malicious(mark)[name])
    said, rows = kit.read(file, tmp_path)
    assert not rows
    assert not mark.exists()
    assert said.startswith(f"vllm-gateway: the dataset {file} cannot be used: ")
    assert said.count("\n") == 1


def test_the_evil_ones_are_evil(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(malicious(mark)["in a list"])
    assert mark.exists()


def test_strings_of_pyarrow_are_refused_with_a_way_out(kit: Kit, tmp_path: Path) -> None:
    said, _ = kit.read(DATASETS / "pandas-3.1.pkl", tmp_path)
    assert "asks for pyarrow.lib." in said
    assert said.endswith("save it as .jsonl or .parquet where it was made.\n")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "question,prompt\na,b\n", "it has no column system_prompt, only question, prompt"),
        ("a.jsonl", '{"text": "a"}\n', "it has no column question and no column system_prompt, only text"),
        ("a.jsonl", '{"question": 5, "system_prompt": "b"}\n', "question of row 0 is a int, not text"),
        ("a.jsonl", '{"question": ["a"], "system_prompt": "b"}\n', "question of row 0 is a list, not text"),
        ("a.jsonl", "{", "it cannot be read ("),
        ("a.jsonl", "", "it has no row with a question"),
        ("a.jsonl", "[1]", "row 0 is a list, not an object"),
        ("a.jsonl", "[" * 200_000, "it cannot be read (RecursionError"),
        ("a.csv", "question,system_prompt\na,b,c\n", "a row has more fields than the first line has names: 'a'…"),
        ("a.csv", "question,system_prompt\n", "it has no row with a question"),
        ("a.csv", "", "it has no column question and no column system_prompt, only nothing"),
        ("a.parquet", "nothing of the kind", "it cannot be read ("),
        ("a.pkl.gz", "nothing of the kind", "it cannot be read ("),
        ("a.txt", "question", "its name ends with none of .jsonl, .csv, .parquet, .pkl, .pkl.gz"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said(kit: Kit, tmp_path: Path, name: str, text: str, expected: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    said, _ = kit.read(file, tmp_path)
    assert said.startswith(f"vllm-gateway: the dataset {file} cannot be used: {expected}"), said
    assert said.count("\n") == 1


def test_a_parquet_without_the_columns_and_a_file_that_is_not_there_are_said(kit: Kit, tmp_path: Path) -> None:
    assert "cannot be read (" in kit.read(tmp_path / "none.csv", tmp_path)[0]
    kit.run("-c", "import pandas, sys; pandas.DataFrame({'a': ['b']}).to_parquet(sys.argv[1])", tmp_path / "a.parquet")
    assert "question" in kit.read(tmp_path / "a.parquet", tmp_path)[0]
