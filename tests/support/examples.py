"""How many examples hypothesis draws: all of them in CI, a quarter of them at a desk."""

from __future__ import annotations

import os

from hypothesis import settings

IN_CI = os.environ.get("CI") == "true"


def examples(count: int) -> settings:
    """So many in CI."""
    return settings(max_examples=count if IN_CI else count // 4)
