"""CONTRIBUTING.md, `make help` and the pre-commit hooks say what the Makefile does."""

from __future__ import annotations

import re
import subprocess

from tests.support.paths import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_make_help_lists_every_target() -> None:
    command = ["make", "--no-print-directory", "help"]  # said where a make runs the tests
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert listed.keys() == set(phony.split())
    assert re.search(r"^\.DEFAULT_GOAL := up$", MAKEFILE, re.MULTILINE)


def test_the_table_of_targets_is_made_from_the_makefile() -> None:
    rows = ["| Target | What |", "|---|---|"]
    rows += [f"| `make {name}` | {text} |" for name, text in re.findall(r"^([\w-]+):.*  ## (.*)$", MAKEFILE, re.M)]
    made = "\n".join(rows)

    assert made in CONTRIBUTING, f"put this into CONTRIBUTING.md:\n{made}"


def test_the_hooks_run_the_tools_of_lint_and_types() -> None:
    recipes = re.findall(r"^(?:lint|types):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    tools = {tool for recipe in recipes for tool in re.findall(r"\$\(BIN\)/(ruff \w+|[\w-]+)", recipe)}
    hooks = re.findall(r"entry: \.venv/bin/(ruff \w+|[\w-]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert tools == set(hooks)
    assert len(hooks) == len(tools) > 3


def test_contributing_is_short_and_every_file_that_it_names_is_there() -> None:
    # The table of targets is as long as there are targets.
    assert len([line for line in CONTRIBUTING.splitlines() if not line.startswith("| `make ")]) <= 110
    named = re.findall(r"`([\w.*-]+(?:/[\w.*-]+)+)/?`", CONTRIBUTING)
    assert len(named) > 20
    for name in named:
        assert name.startswith(".venv/") or list(ROOT.glob(name)), name
