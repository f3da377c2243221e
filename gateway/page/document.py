"""The page as one document: its parts put together, and what a browser may do with it."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path

_FOLDER = Path(__file__).parent / "static"
_STYLE = '<link rel="stylesheet" href="page.css">'
_SCRIPT = '<script src="page.js"></script>'


class Document:
    """It loads nothing, runs no other code than its own, and talks to no other host than the one it came from."""

    def __init__(self) -> None:
        html, css, js = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("index.html", "page.css", "page.js"))
        whole = html.replace(_STYLE, f"<style>{css}</style>").replace(_SCRIPT, f"<script>{js}</script>")
        self.content = whole.encode()
        policy = [
            "default-src 'none'",
            f"script-src '{_hash(js)}'",
            f"style-src '{_hash(css)}'",
            "connect-src 'self'",
            "img-src data:",  # its icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # No text becomes markup or code.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
        self.headers = {
            "content-security-policy": "; ".join(policy),
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
