"""Which version of the gateway runs, and whether that is compiled."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from gateway.relay import exchange


def own_version() -> str:
    """As the package says; `unknown` where the source runs that nobody has installed."""
    try:
        return version("vllm-gateway")
    except PackageNotFoundError:
        return "unknown"


def own_build() -> Literal["compiled", "plain"]:
    """Which of the two that a package can be: compiled on the way of a call, or plain Python."""
    return "plain" if exchange.__file__.endswith(".py") else "compiled"
