"""The house's rules of import and state, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gateway

SOURCES = {path.stem: ast.parse(path.read_text()) for path in Path(gateway.__file__).parent.glob("*.py")}
PURE = {
    "citations",
    "prompted",
    "releases",
    "statistics",
    "bounds",
    "keys",
    "media",
    "flattened",
    "openapi",
    "routes",
    "semconv",
    "waiting",
    "simplified",
    "sse",
    "headers",
    "interfaces",
    "upstreams",
    "errors",
    "body",
    "usage",
}
CHAIN = ["cli", "server", "app", "endpoints", "transport", "exchange"]
# The commands, the composition root and what starts from settings; everything else receives values.
READS_CONFIG = {"app", "check", "cli", "modelserver", "server", "up"}
IO = {"asyncio", "httptools", "httpx", "os", "prometheus_client", "socket", "ssl", "starlette", "threading", "time"}
IO |= {"uvicorn", "uvloop"}
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


def ours(module: str) -> set[str]:
    return {name.split(".")[1] for name in imports(SOURCES[module]) if name.startswith("gateway.")}


@pytest.mark.parametrize("module", sorted(PURE | {"exchange"}))
def test_what_does_no_io_imports_nothing_that_does(module: str) -> None:
    assert not packages(module) & IO


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_pure_modules_import_only_each_other(module: str) -> None:
    assert ours(module) <= PURE


def test_the_exchange_imports_only_the_pure_modules() -> None:
    assert ours("exchange") <= PURE


@pytest.mark.parametrize("at", range(len(CHAIN)))
def test_imports_go_one_way(at: int) -> None:
    assert not ours(CHAIN[at]) & set(CHAIN[:at])


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({module: ours(module) for module in SOURCES}).prepare()


def test_only_commands_and_the_composition_root_read_the_settings() -> None:
    settings = {"config", "settings", "trust"}
    assert {module for module in SOURCES if settings & ours(module)} - settings <= READS_CONFIG


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"config"}))
def test_only_config_reads_the_environment(module: str) -> None:
    names = {node.attr for node in ast.walk(SOURCES[module]) if isinstance(node, ast.Attribute)}
    names |= {name.rpartition(".")[2] for name in imports(SOURCES[module])}
    assert not names & {"environ", "environb", "getenv", "getenvb"}


def test_sse_starlette_is_imported_in_one_module_at_most() -> None:
    # Importing it patches uvicorn's exit handler.
    assert len([module for module in SOURCES if "sse_starlette" in packages(module)]) <= 1


def test_opentelemetry_is_imported_in_one_module() -> None:
    # Which is imported late, as test_tracing.py sees.
    assert [module for module in SOURCES if "opentelemetry" in packages(module)] == ["tracing"]


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_no_module_wears_a_name_that_says_nothing(module: str) -> None:
    assert module not in {"base", "common", "helpers", "misc", "registry", "utils"}


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
