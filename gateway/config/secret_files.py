"""Secrets that the environment gives as files: for a secret NAME, the path in NAME_FILE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# Keys of clients are not among them: GATEWAY_API_KEYS_FILE holds their hashes, not the keys.
NAMES = (
    "GATEWAY_UPSTREAM_API_KEY",
    "LLM_VLLM_API_KEY",
    "GATEWAY_UPSTREAM_CLIENT_SECRET",
    "LLM_VLLM_CLIENT_SECRET",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)


class BadSecretFile(Exception):
    """A file has no secret that could be used; the text says which, and why."""


def with_files(environ: Mapping[str, str]) -> dict[str, str]:
    """The same with each secret under its own name, without the blanks around it, and without the name of its file.

    An empty name of a file is none. Raises BadSecretFile.
    """
    found = dict(environ)
    for name in NAMES:
        if path := found.pop(f"{name}_FILE", ""):
            if found.get(name):
                raise BadSecretFile(f"{name} and {name}_FILE are both set: unset one of them.")
            found[name] = _read(f"{name}_FILE", path)
    return found


def paths(environ: Mapping[str, str]) -> list[Path]:
    """The files that it names."""
    return [Path(path) for name in NAMES if (path := environ.get(f"{name}_FILE"))]


def _read(name: str, path: str) -> str:
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise BadSecretFile(f"{name} {path!r} cannot be read ({error.strerror}): name a file that can.") from None
    except UnicodeDecodeError:
        raise BadSecretFile(f"{name} {path!r} is wrong: it is not UTF-8.") from None
    if not secret:
        raise BadSecretFile(f"{name} {path!r} is empty: write the secret into it, or unset {name}.")
    return secret
