"""The version of the gateway, and whether it is compiled."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from gateway.relay import exchange


def own_version() -> str:
    """The package's version; `unknown` if the source runs without being installed."""
    try:
        return version("vllm-gateway")
    except PackageNotFoundError:
        return "unknown"


def own_build() -> Literal["compiled", "plain"]:
    """The kind of build: with a compiled data path, or plain Python."""
    return "plain" if exchange.__file__.endswith(".py") else "compiled"
