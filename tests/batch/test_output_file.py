"""A batch's results: whatever ended it, the next run has each answer once and goes on."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batch.output_file import BadOutput, OutputFile, Unwritable, opened, result_of
from gateway.batch.request import digest_of

IDS = ["a", "b", "ü", "d"]
KNOWN = {digest_of(one): number for number, one in enumerate(IDS)}
OTHER = os.stat("/")


def result(custom_id: str, status: int = 200) -> bytes:
    answer = {"status_code": status, "request_id": "r", "body": {"text": "ü\n"}}
    return result_of(custom_id, response=answer, error=None)


def failed(custom_id: str) -> bytes:
    return result_of(custom_id, response=None, error={"code": "no_answer", "message": "m"})


def lines(path: Path) -> list[bytes]:
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    return content.splitlines()


def answered(output: OutputFile) -> set[str]:
    return {one for one in IDS if digest_of(one) in output.answered}


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "out.jsonl"
    yield path
    # Nothing is left beside it.
    assert [file.name for file in tmp_path.iterdir() if file.name not in ("out.jsonl", "link")] == []


def test_results_are_in_openais_form(path: Path) -> None:
    with opened(str(path), OTHER) as output:
        output.go_on(KNOWN)
        for one in (result("a"), failed("b")):
            output.write(one)
            assert path.read_bytes().endswith(one + b"\n")  # at once

    first, second = map(orjson.loads, lines(path))
    assert first.pop("id") != second.pop("id")
    response = {"status_code": 200, "request_id": "r", "body": {"text": "ü\n"}}
    assert first == {"custom_id": "a", "response": response, "error": None}
    assert second == {"custom_id": "b", "response": None, "error": {"code": "no_answer", "message": "m"}}


@given(st.integers(min_value=0))
def test_a_line_that_was_cut_anywhere_is_mended(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    kept = result("a") + b"\n"
    whole = kept + result("ü")
    cut = whole[: at % (len(whole) + 1)]
    path.write_bytes(cut)

    with opened(str(path), OTHER) as output:
        output.go_on(KNOWN)
        output.write(result("d"))
        expected = {"a"} if len(cut) >= len(kept) - 1 else set()
        assert answered(output) == expected | ({"ü"} if cut == whole else set())
    ids = [orjson.loads(one)["custom_id"] for one in lines(path)]
    assert ids == [one for one in IDS if one in expected] + (["ü"] if cut == whole else []) + ["d"]


@pytest.mark.parametrize("end", [b"", b'{"id":"batch_req_12', b"\0\0\0", b"whole"])
def test_answers_are_kept_once_and_failures_go(path: Path, end: bytes) -> None:
    kept = [result("a"), result("ü")]
    if end == b"whole":
        end = result("b")
    others = [result("b", 404), failed("b"), result("a")]
    path.write_bytes(b"\n".join([others[0], kept[0], others[1], kept[1], others[2], end]))
    path.chmod(0o640)

    with opened(str(path), OTHER) as output:
        output.go_on(KNOWN)
        assert path.stat().st_mode & 0o777 == 0o640
        with pytest.raises(BadOutput, match="is being written by another `batch`"), opened(str(path), OTHER):
            pass
        output.write(result("d"))
    assert lines(path)[:-1] == kept + ([end] if end.endswith(b"}") else [])


def test_a_link_stays_one(path: Path) -> None:
    path.write_bytes(result("a", 500) + b"\n")
    link = path.with_name("link")
    link.symlink_to(path)
    with opened(str(link), OTHER) as output:
        output.go_on(KNOWN)
    assert (link.is_symlink(), path.read_bytes()) == (True, b"")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"Notes.", "its line 1 is no result"),
        (result("a") + b"\nNotes.\n", "its line 2 is no result"),
        (result("a") + b"\n\n", "its line 2 is no result"),
        (result("a") + b"\n" + result("c") + b"\n", "its line 2 has a custom_id that the input has not"),
        (b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{}}\n', "its line 1 is no result"),
        (b"\x89PNG\r\n", "its line 1 is no result"),
    ],
    ids=["text", "text below", "blank line", "another batch's", "an input", "an image"],
)
def test_a_file_of_something_else_is_left_as_it_is(path: Path, content: bytes, says: str) -> None:
    path.write_bytes(content)
    with opened(str(path), OTHER) as output, pytest.raises(BadOutput, match=says):
        output.go_on(KNOWN)
    assert path.read_bytes() == content


def test_one_batch_at_a_time_writes_to_a_file(path: Path) -> None:
    with opened(str(path), OTHER):
        script = (
            "import os, sys; from gateway.batch.output_file import *\n"
            "try:\n with opened(sys.argv[1], os.stat('/')): print('open')\nexcept BadOutput as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert done.stdout == f"{path} is being written by another `batch`: wait for its end, or name another output.\n"
    with opened(str(path), OTHER):
        pass


def test_a_result_that_has_no_room_is_taken_back(path: Path) -> None:
    with opened(str(path), OTHER) as output:
        output.go_on(KNOWN)
        output.write(result("a"))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        try:
            with pytest.raises(Unwritable) as error:
                output.write(result("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert isinstance(error.value.__cause__, OSError)
        assert len(lines(path)) == 1
        output.write(result("b"))
    assert [orjson.loads(one)["custom_id"] for one in lines(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/", "/ cannot be written (Is a directory): name another output."),
        ("/nowhere/out", "/nowhere/out cannot be written (No such file or directory): name another output."),
        ("a\0b", "cannot be written ("),
    ],
)
def test_what_cannot_be_written_is_told(name: str, says: str) -> None:
    with pytest.raises(BadOutput) as error, opened(name, OTHER):
        pass
    assert says in str(error.value)


def test_the_input_is_no_output(path: Path) -> None:
    path.write_bytes(b"{}\n")
    link = path.with_name("link")
    os.link(path, link)
    with pytest.raises(BadOutput, match="are one file"), opened(str(link), path.stat()):
        pass
