"""What the audit of our locks says of what the package index knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scripts import audit

SAFE: dict[str, Any] = {"name": "safe", "version": "1", "vulns": []}
BAD: dict[str, Any] = {"name": "bad", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
UNKNOWN: dict[str, Any] = {"name": "unknown", "skip_reason": "not found"}


def said_of(monkeypatch: pytest.MonkeyPatch, *packages: dict[str, Any]) -> None:
    monkeypatch.setattr(audit, "LOCKS", [Path("one.lock")])
    monkeypatch.setattr(audit, "audited", lambda lock: list(packages))
    audit.main()


def test_it_ends_well_where_all_are_safe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said_of(monkeypatch, SAFE, SAFE)
    assert capsys.readouterr().out == "2 packages of 1 locks, none with a known vulnerability.\n"


@pytest.mark.parametrize("packages", [(SAFE, BAD), (SAFE, UNKNOWN)])
def test_it_fails_for_what_is_vulnerable_or_not_known_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], packages: tuple[dict[str, Any], ...]
) -> None:
    with pytest.raises(SystemExit, match=r"\d of 2 packages have known vulnerabilities, \d are unknown\."):
        said_of(monkeypatch, *packages)
    assert str(packages[1]["name"]) in capsys.readouterr().err


def test_it_says_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said_of(monkeypatch, UNKNOWN, UNKNOWN)
    assert capsys.readouterr().out.startswith("Nothing was audited")
