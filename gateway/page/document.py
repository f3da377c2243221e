"""The page as one document: its parts put together, and what a browser may do with it."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

_FOLDER = Path(__file__).parent / "static"
# The lines of the page that name its parts, one after the other.
_STYLES = re.compile(r'(?:\s*<link rel="stylesheet" href="[^"]+">)+')
_SCRIPTS = re.compile(r'(?:\s*<script src="[^"]+"></script>)+')
_NAME = re.compile(r'(?:href|src)="([^"]+)"')
# What is for readers of the files alone: comments and indentation, and in styles the space around their marks.
_COMMENTS = re.compile(r"^\s*(?://.*|/\*.*\*/)\n|^\s+| // .*$", re.MULTILINE)
_SPACE = re.compile(r"\s*([{};,>])\s*|(?<=:) ")


class Document:
    """It loads nothing, runs no other code than its own, and talks to no other host than the one it came from."""

    def __init__(self) -> None:
        html = _COMMENTS.sub("", (_FOLDER / "index.html").read_text(encoding="utf-8"))
        css, js = (_joined(html, lines) for lines in (_STYLES, _SCRIPTS))
        css = _SPACE.sub(r"\1", css)
        whole = _STYLES.sub(lambda _: f"\n<style>{css}</style>", html)
        whole = _SCRIPTS.sub(lambda _: f"\n<script>{js}</script>", whole)
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


def _joined(html: str, lines: re.Pattern[str]) -> str:
    """The files that these lines of the page name, as one."""
    found = lines.search(html)
    assert found is not None
    parts = ((_FOLDER / name).read_text(encoding="utf-8") for name in _NAME.findall(found[0]))
    return _COMMENTS.sub("", "".join(parts))


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
