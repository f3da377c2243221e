"""Finds a model before its server starts: in a folder, a tarball, a bucket, the cache or the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import httpx

from gateway.models import ModelError, hub_cache
from gateway.modelserver.install import cache_folder
from gateway.modelserver.preflight import CannotStart

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]+/[\w!'()*./=-]*[\w!'()*.=-]/?", re.ASCII)
_TIMEOUT = 10


class Model(NamedTuple):
    """The model that vLLM serves.

    With `local`, nothing has to be downloaded; `environment` has the variables by which vLLM finds the model.
    """

    name: str
    local: bool
    environment: Mapping[str, str] = MappingProxyType({})


def find_model(
    name: str,
    environ: Mapping[str, str],
    token: str | None = None,
    *,
    watch: hub_cache.Watch = lambda done, total: None,
) -> Model:
    """Find the model of a folder, a tarball, a bucket's address or a hub's name (ORG/NAME).

    A tarball is unpacked once, into our own cache folder, and `watch` gets the progress. Raises CannotStart.
    """
    if is_bucket(name):
        return Model(name, local=False)
    folder = Path(name).expanduser()
    if hub_cache.is_tarball(name) and not folder.is_file():
        raise CannotStart(f"There is no tarball {name}: `vllm-gateway download ORG/NAME --save-as-tarfile` makes one.")
    try:
        cached = hub_cache.find(folder, cache_folder(environ) / "models", watch)
    except ModelError as error:
        raise CannotStart(str(error)) from None
    if cached is not None:
        return Model(cached.name, local=True, environment=cached.environment())
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CannotStart(f"The folder {name} holds no model: it has no config.json.")
        return Model(str(folder.absolute()), local=True)
    if not _NAME.fullmatch(name):
        raise CannotStart(f"Unknown model {name!r}: there is no such folder, and a hub's name is ORG/NAME.")
    if _is_cached(name, environ):
        return Model(name, local=True)
    _ask_hub(name, environ, token)
    return Model(name, local=False)


def is_bucket(name: str) -> bool:
    """Whether this is the address of a model in a bucket, which vLLM streams. Raises CannotStart if it is malformed."""
    if not name.startswith("s3://"):
        return False
    if not _BUCKET.fullmatch(name):
        raise CannotStart(f"The address {name!r} names no model: it is s3://BUCKET/FOLDER, as `upload` prints it.")
    return True


def _is_cached(name: str, environ: Mapping[str, str]) -> bool:
    home = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    hub = Path(environ.get("HF_HUB_CACHE") or Path(environ.get("HF_HOME") or home) / "hub")
    folder = hub.expanduser() / f"models--{name.replace('/', '--')}"
    # An interrupted download leaves `.incomplete` files, and must be resumed from the hub.
    return any(folder.glob("snapshots/*/config.json")) and not any(folder.glob("blobs/*.incomplete"))


def _ask_hub(name: str, environ: Mapping[str, str], token: str | None) -> None:
    hub = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    elsewhere = "serve a folder with --model FOLDER, or the demo model without --model"
    if environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise CannotStart(f"No hub: the model {name} is not in the local cache and HF_HUB_OFFLINE is set; {elsewhere}.")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        # Use the environment's proxy, which is set for downloads like this.
        with httpx.Client(trust_env=True, follow_redirects=True, timeout=_TIMEOUT) as client:
            status = client.head(f"{hub}/{name}/resolve/main/config.json", headers=headers).status_code
    except httpx.HTTPError as error:
        raise CannotStart(
            f"No hub: {hub} cannot be reached for the model {name} ({type(error).__name__}); {elsewhere}."
        ) from None
    _judge(name, hub, status, token)


def _judge(name: str, hub: str, status: int, token: str | None) -> None:
    if status in (401, 403):
        # To a client without a token the hub answers 401 also for a name that does not exist.
        advice = "with HF_TOKEN set to a token that may read it" if token is None else "its HF_TOKEN may not read it"
        raise CannotStart(
            f"The hub {hub} refuses the model {name} ({status}): the name is wrong or it is restricted, "
            f"{'then start again ' if token is None else ''}{advice}."
        )
    if status == 404:
        raise CannotStart(f"Unknown model {name}: the hub {hub} has none of that name with a config.json.")
    if status >= 400:
        raise CannotStart(f"The hub {hub} answers {status} for the model {name}: try again later.")
