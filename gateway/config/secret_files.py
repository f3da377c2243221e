"""Reads secrets that the environment gives as files: NAME_FILE holds the path of the secret NAME."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# Client keys are not listed here: GATEWAY_API_KEYS_FILE holds their hashes, not the keys.
NAMES = (
    "GATEWAY_UPSTREAM_API_KEY",
    "LLM_VLLM_API_KEY",
    "GATEWAY_UPSTREAM_CLIENT_SECRET",
    "LLM_VLLM_CLIENT_SECRET",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
)


class BadSecretFile(Exception):
    """A file has no usable secret; the text says which file, and why."""


def with_files(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with each NAME_FILE replaced by NAME, which holds the stripped secret.

    An empty NAME_FILE counts as unset. Raises BadSecretFile.
    """
    found = dict(environ)
    for name in NAMES:
        if path := found.pop(f"{name}_FILE", ""):
            if found.get(name):
                raise BadSecretFile(f"{name} and {name}_FILE are both set: unset one of them.")
            found[name] = _read(f"{name}_FILE", path)
    return found


def paths(environ: Mapping[str, str]) -> list[Path]:
    """The secret files that the environment names."""
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
