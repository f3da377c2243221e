"""Processes of which coverage is not measured."""

from __future__ import annotations

import os
from collections.abc import Mapping


def unmeasured(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of one into which signals raise, which would have coverage never give back a lock of its own."""
    return {name: value for name, value in environ.items() if not name.startswith("COVERAGE_")}
