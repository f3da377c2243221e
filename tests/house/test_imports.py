"""The house's rules of import and state that are no contract of import-linter's, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gateway

FOLDER = Path(gateway.__file__).parent
SOURCES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts): ast.parse(path.read_text())
    for path in FOLDER.rglob("*.py")
}
# A program of its own, for another Python.
CONTAINER = "modelserver.container"
TRACING = ["observability.tracing"]
CHANGES = {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popleft", "popitem"}
CHANGES |= {"remove", "setdefault", "update"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported, in functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(module: str) -> set[str]:
    return {name.split(".")[0] for name in imports(SOURCES[module])}


@pytest.mark.parametrize(
    "module", sorted(module for module in SOURCES if not module.startswith("config.") and module != CONTAINER)
)
def test_only_config_reads_the_environment(module: str) -> None:
    names = {node.attr for node in ast.walk(SOURCES[module]) if isinstance(node, ast.Attribute)}
    names |= {name.rpartition(".")[2] for name in imports(SOURCES[module])}
    assert not names & {"environ", "environb", "getenv", "getenvb"}


def test_sse_starlette_is_imported_in_one_module_at_most() -> None:
    # Importing it patches uvicorn's exit handler.
    assert len([module for module in SOURCES if "sse_starlette" in packages(module)]) <= 1


def test_opentelemetry_is_imported_in_one_module() -> None:
    # Which is imported late, as test_tracing.py sees.
    assert [module for module in SOURCES if "opentelemetry" in packages(module)] == TRACING


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_module_wears_a_name_that_says_nothing(module: str) -> None:
    assert module.rpartition(".")[2] not in {"base", "common", "helpers", "misc", "registry", "utils"}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_function_changes_what_belongs_to_its_module(module: str) -> None:
    tree = SOURCES[module]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    named = {name.id for node in assigned for name in ast.walk(node) if isinstance(name, ast.Name)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    changed = {name for function in functions for node in ast.walk(function) for name in _changed_by(node)}
    assert not named & changed


def _changed_by(node: ast.AST) -> Iterator[str]:
    """The name whose value a statement changes: `x[…] = …`, `del x[…]`, `x.append(…)`."""
    if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
        target: ast.expr = node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        target = node.func.value
    else:
        return
    if isinstance(target, ast.Name):
        yield target.id
