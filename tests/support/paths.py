"""Where the repository and what the tests share lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
CERTIFICATES = SUPPORT / "certs"
AUTHORITY = CERTIFICATES / "authority.pem"
