"""The command `check`: whether a call would succeed now, the upstreams' states, the settings and warnings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from gateway.app import create_connections, create_credentials, create_discovery, create_prober
from gateway.cache.running import Running
from gateway.config.secrets import Secrets
from gateway.config.settings import Settings, names_of
from gateway.config.urls import is_loopback
from gateway.pool.aliases import Alias, as_words
from gateway.pool.upstream_pool import UpstreamPool
from gateway.upstream.httpx_transport import UpstreamTransport

# Docker and Podman each create one of these files in a container.
_CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
_PATIENCE = 5
_HIDDEN = "(set, hidden)"


class Findings(NamedTuple):
    """The result; its fields are the fields of the JSON output.

    `gateways` are the gateways that `up` runs on this machine. `upstreams` are the upstreams that their health checks
    list. If the settings name upstreams, or no `up` runs, they are the upstreams of the settings.
    """

    ok: bool
    verdict: str
    gateways: list[dict[str, Any]]
    upstreams: list[dict[str, Any]]
    warnings: list[str]
    settings: dict[str, dict[str, Any]]


def examine(
    settings: Settings, secrets: Secrets, warnings: Sequence[str], running: Sequence[Running], *, in_container: bool
) -> Findings:
    """Ask the running gateways, or else probe the upstreams; `ok` says whether a chat call would succeed now."""
    gateways = [_asked(one) for one in running]
    told = list(warnings)
    if gateways and "upstreams" not in settings.model_fields_set:
        upstreams = [upstream for gateway in gateways for upstream in gateway.pop("upstreams")]
        serving = [gateway for gateway in gateways if gateway["status"] == "serving"]
        whom = [f"the gateway on {gateway['url']} serves {gateway['model']}" for gateway in serving]
    else:
        upstreams = asyncio.run(_probed(settings, secrets))
        serving = [upstream for upstream in upstreams if upstream["state"] == "serving"]
        whom = [f"{upstream['url']} serves {', '.join(upstream['models'])}" for upstream in serving]
        told += _doubts(settings, upstreams, in_container=in_container)
    verdict = f"A call would succeed: {'; '.join(whom)}." if whom else "No call would succeed: no model server serves."
    return Findings(bool(whom), verdict, gateways, upstreams, told, shown(settings))


def lines(findings: Findings) -> Iterator[str]:
    """The findings as text, the verdict first, then one line each."""
    yield findings.verdict
    for gateway in findings.gateways:
        yield (
            f"`up` (process {gateway['pid']}) runs the gateway on {gateway['url']} in front of vLLM on "
            f"{gateway['upstream']} with {gateway['model']}: {gateway['status']}; vLLM's log: {gateway['log']}"
        )
    for upstream in findings.upstreams:
        yield f"{upstream['url']} is {upstream['state']}{_because(upstream)}{_led_to_by(upstream)}"
    for warning in findings.warnings:
        yield f"warning: {warning}"
    yield ""
    yield "Settings, as `serve` has them here; * is another than the default:"
    for name, setting in findings.settings.items():
        line = f"{'*' if setting['differs'] else ' '} {name} = {_as_text(setting['value'])}"
        yield f"{line} (default: {_as_text(setting['default'])})" if setting["differs"] else line


def runs_in_container() -> bool:
    """Whether this process seems to run in a container."""
    return any(mark.exists() for mark in _CONTAINER_MARKS)


def shown(settings: Settings) -> dict[str, dict[str, Any]]:
    """Each setting's `value`, its `default` and whether the two differ, by name; secrets are hidden."""
    return {
        names_of(field)[0]: {
            "value": _shown(field, getattr(settings, field)),
            "default": _shown(field, info.default),
            "differs": getattr(settings, field) != info.default,
        }
        for field, info in Settings.model_fields.items()
    }


def _shown(field: str, value: Any) -> Any:
    if isinstance(value, SecretStr) or (value and field == "api_keys"):
        return _HIDDEN
    if isinstance(value, Path):
        return str(value)
    return list(map(str, value)) if isinstance(value, tuple) else value


def _as_text(value: Any) -> str:
    if value in (None, "", [], {}):
        return "(not set)"
    if isinstance(value, dict):
        return as_words(value)
    return ",".join(value) if isinstance(value, list) else str(value)


def _asked(running: Running) -> dict[str, Any]:
    """The status and upstreams that the gateway of an `up` reports, with its URL and process id."""
    status, upstreams = "no answer yet", []
    try:
        # No verification: the certificate is for the name by which others reach this machine.
        answer = httpx.get(f"{running.gateway}/v1/health_check", trust_env=False, timeout=_PATIENCE, verify=False)
        told = answer.json()
        status, upstreams = str(told["status"]), list(told["upstreams"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        pass
    where = {"url": running.gateway, "pid": running.pid, "upstream": running.upstream, "model": running.model}
    return {**where, "log": running.log, "status": status, "upstreams": upstreams}


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


def _doubts(settings: Settings, upstreams: Sequence[dict[str, Any]], *, in_container: bool) -> Iterator[str]:
    for url in (one["url"] for one in upstreams if one["state"] != "serving"):
        host = urlsplit(url).hostname or ""
        if in_container and is_loopback(host):
            yield (
                f"inside a container {host} is the container itself: name the model server's service or host in "
                "GATEWAY_UPSTREAMS, or run the container on the host's network."
            )
        if "upstreams" not in settings.model_fields_set:
            yield (
                f"{url} is the default, and no `up` of this user runs on this machine: name the model server by "
                "--upstream or GATEWAY_UPSTREAMS, or start one by `vllm-gateway up`."
            )


def _because(upstream: dict[str, Any]) -> str:
    return f": {upstream['why']}" if upstream["why"] else f": {', '.join(upstream['models'])}"


def _led_to_by(upstream: dict[str, Any]) -> str:
    """The setting that led to the upstream, unless that is the upstream's own URL."""
    source = upstream.get("source")
    return f" (by {source})" if source and source != upstream["url"] else ""
