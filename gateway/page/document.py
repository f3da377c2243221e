"""The page as one HTML document with its parts inlined, and its security headers."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

_FOLDER = Path(__file__).parent / "static"
# The consecutive lines of the page that name its parts.
_STYLES = re.compile(r'(?:\s*<link rel="stylesheet" href="[^"]+">)+')
_SCRIPTS = re.compile(r'(?:\s*<script src="[^"]+"></script>)+')
_NAME = re.compile(r'(?:href|src)="([^"]+)"')
# Removed because only readers of the files need them: comments, indentation, and in styles the space around marks.
_COMMENTS = re.compile(r"^\s*(?://.*|/\*.*\*/)\n|^\s+| // .*$", re.MULTILINE)
_SPACE = re.compile(r"\s*([{};,>])\s*|(?<=:) ")


class Document:
    """The page: it loads nothing, runs only its own code, and talks only to the host it came from."""

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
            # Text never becomes markup or code.
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
    """The files that these lines of the page name, joined."""
    found = lines.search(html)
    assert found is not None
    parts = ((_FOLDER / name).read_text(encoding="utf-8") for name in _NAME.findall(found[0]))
    return _COMMENTS.sub("", "".join(parts))


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
