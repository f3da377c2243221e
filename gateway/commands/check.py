"""Says what the settings are, what is wrong with them, and how the upstreams are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from gateway.app import create_connections, create_credentials, create_discovery, create_prober
from gateway.config.secrets import Secrets
from gateway.config.settings import Settings, names_of
from gateway.config.urls import is_loopback
from gateway.pool.aliases import Alias, as_words
from gateway.pool.upstream_pool import UpstreamPool
from gateway.upstream.httpx_transport import UpstreamTransport

# Docker and Podman each leave one of these in a container's root.
_CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))


def check(
    settings: Settings, secrets: Secrets, warnings: list[str], say: Callable[[str], None], *, in_container: bool
) -> bool:
    """Say everything, a line at a time; whether a chat call would succeed now."""
    for names, value in shown(settings):
        say(f"{names} = {value}")
    for warning in warnings:
        say(f"warning: {warning}")
    upstreams = asyncio.run(_probed(settings, secrets))
    for upstream in upstreams:
        say(f"{upstream['url']} is {upstream['state']}{_because(upstream)}")
        if upstream["state"] != "serving" and in_container and _is_loopback(upstream["url"]):
            say(
                f"warning: inside a container {urlsplit(upstream['url']).hostname} is the container itself: name the "
                "model server's service or host in GATEWAY_UPSTREAMS, or run the container on the host's network."
            )
    return any(upstream["state"] == "serving" for upstream in upstreams)


def runs_in_container() -> bool:
    """Whether this process seems to run in a container."""
    return any(mark.exists() for mark in _CONTAINER_MARKS)


def shown(settings: Settings) -> Iterable[tuple[str, str]]:
    """Every setting's name and value, with secrets hidden."""
    for field in Settings.model_fields:
        value: Any = getattr(settings, field)
        if isinstance(value, SecretStr) or (value and field == "api_keys"):
            value = "(set, hidden)"
        elif isinstance(value, tuple):
            value = ",".join(map(str, value))
        elif field == "model_aliases":
            value = as_words(value)
        yield names_of(field)[0], "(not set)" if value in (None, "") else str(value)


async def _probed(settings: Settings, secrets: Secrets) -> list[dict[str, Any]]:
    pool = UpstreamPool(())
    connections = create_connections(settings, secrets)
    transport = UpstreamTransport(connections)
    credentials = create_credentials(settings, secrets, transport)
    aliases = {name: Alias(name, weights) for name, weights in secrets.upstreams.aliases.items()}
    prober = create_prober(settings, pool, credentials, transport, aliases)
    discovery = create_discovery(settings, secrets, pool, prober, connections)
    try:
        async with credentials.renewing(), discovery.discovering(), prober.probing():
            await prober.probe_all()
            return prober.report(time.monotonic())
    finally:
        await connections.close()


def _because(upstream: dict[str, Any]) -> str:
    return f": {upstream['why']}" if upstream["why"] else f": {', '.join(upstream['models'])}"


def _is_loopback(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")
