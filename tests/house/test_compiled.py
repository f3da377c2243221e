"""What is compiled can be: no class has a base that the compiler frees wrongly, and what is missing is said."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SETUP = ROOT / "setup.py"


def modules() -> dict[str, ast.Module]:
    """The syntax of each module that is compiled, by its name."""
    (listed,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(SETUP.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILED"
    )
    return {path.removesuffix(".py").replace("/", "."): ast.parse((ROOT / path).read_text()) for path in listed}


def origins(tree: ast.Module) -> dict[str, str]:
    """Where the names of a module come from, `module:name`, by what they are called there."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {one.asname or one.name: f"{node.module}:{one.name}" for one in node.names}
    return found


def wrong_bases(parsed: dict[str, ast.Module]) -> Iterator[str]:
    """The classes that have a base which is neither a compiled class nor Protocol, or a metaclass, with that."""
    classes = {
        f"{module}:{node.name}"
        for module, tree in parsed.items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    for module, tree in parsed.items():
        named = origins(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for base in node.bases:
                name = ast.unparse(base)
                if named.get(name, f"{module}:{name}") not in classes | {"typing:Protocol"}:
                    yield f"{module}: class {node.name}({name})"
            if node.keywords:
                yield f"{module}: class {node.name} with {ast.unparse(node.keywords[0].value)}"


def test_no_compiled_class_has_an_interpreted_base() -> None:
    """mypyc 2.4 ended the process in the first collection after an OrderedDict, and left weak references to what was
    freed of a logging.Handler: mypyc/mypyc#1186.
    """
    assert len(modules()) > 30
    assert [*wrong_bases(modules())] == []


def test_an_interpreted_base_is_found() -> None:
    good = {"one": "class A: ...\nclass B(A): ...", "two": "from typing import Protocol\nclass C(Protocol): ..."}
    bad = {
        "three": "from one import B\nfrom abc import ABC\nclass D(B): ...\nclass E(ABC): ...\nclass F(OSError): ...",
        "four": "import asyncio\nfrom other import A\nclass G(asyncio.Protocol): ...\nclass H(A): ...\n"
        "def f():\n    class I(dict[str, int]): ...\nclass J(metaclass=M): ...",
    }
    found = [*wrong_bases({name: ast.parse(text) for name, text in (good | bad).items()})]
    assert found == [
        "three: class E(ABC)",
        "three: class F(OSError)",
        "four: class G(asyncio.Protocol)",
        "four: class H(A)",
        "four: class J with M",
        "four: class I(dict[str, int])",
    ]


def build(tmp_path: Path, *, begin: str = "pass", **environment: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a build, of a copy that has no package: it is not to come so far."""
    program = f"import runpy, sys; {begin}; sys.argv = ['setup.py', '--version']; runpy.run_path({str(SETUP)!r})"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("begin", "environment", "said"),
    [
        ("pass", {"CC": "no-such-cc"}, "needs the C compiler no-such-cc (Debian: apt install gcc libc6-dev)"),
        ("sys.modules['mypyc.build'] = None", {}, "needs mypy and what the gateway itself needs: pip install -r"),
        ("import sysconfig; sysconfig.get_path = lambda name: '/nowhere'", {}, "needs the headers of Python"),
    ],
)
def test_asked_for_and_impossible_is_an_error_that_says_what_is_missing(
    tmp_path: Path, begin: str, environment: dict[str, str], said: str
) -> None:
    done = build(tmp_path, begin=begin, **environment, GATEWAY_COMPILE="1")
    assert done.returncode == 1
    assert done.stderr.startswith("GATEWAY_COMPILE=1 ")
    assert said in done.stderr


def test_what_is_neither_yes_nor_no_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, GATEWAY_COMPILE="yes")
    assert (done.returncode, done.stderr) == (1, "GATEWAY_COMPILE must be 1 or 0, but it is 'yes'.\n")


@pytest.mark.parametrize("wish", ["", "0"])
def test_without_the_wish_no_compiler_and_no_mypy_are_needed(tmp_path: Path, wish: str) -> None:
    begin = "sys.modules['mypyc.build'] = None"
    assert build(tmp_path, begin=begin, GATEWAY_COMPILE=wish, CC="no-such-cc").returncode == 0
