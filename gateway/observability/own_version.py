"""Which version of the gateway runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """As the package says; `unknown` where the source runs that nobody has installed."""
    try:
        return version("vllm-gateway")
    except PackageNotFoundError:
        return "unknown"
