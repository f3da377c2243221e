"""The version stands in pyproject.toml, and wherever else it is named it is that one."""

from __future__ import annotations

import re
import tomllib

from gateway.observability.own_version import own_version
from tests.support.paths import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_what_runs_is_that_version() -> None:
    assert own_version() == VERSION


def test_every_place_that_names_the_version_names_that_one() -> None:
    named = {}
    for pattern in ("docs/*.md", "kubernetes/**/kustomization.yaml", "compose/Dockerfile"):
        for file in ROOT.glob(pattern):
            found = re.findall(
                r"vllm-gateway(?:-runpod)?:(\d+\.\d+\.\d+)|newTag: (\d\.\d+\.\d+)$|ARG VERSION=(\d+\.\d+\.\d+)"
                r"|vllm_gateway-(\d+\.\d+\.\d+)-py3|\"version\":\"(\d+\.\d+\.\d+)\",\"build\"",
                file.read_text(),
                re.MULTILINE,
            )
            if found:
                named[str(file.relative_to(ROOT))] = {one for groups in found for one in groups if one}
    assert len(named) > 5
    assert {file: versions for file, versions in named.items() if versions != {VERSION}} == {}


def test_the_changelog_has_the_version() -> None:
    versions = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert VERSION in versions
