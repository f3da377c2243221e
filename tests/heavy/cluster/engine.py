"""The Docker engine, by its own interface; whatever is made through it has a label, and is removed by it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import httpx

SOCKET = "/var/run/docker.sock"
LABEL = "vllm-gateway.cluster"


class EngineError(Exception):
    """What the engine says of a request that it refused, and its status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Engine:
    """One for a test session: what another has left under the label goes, too."""

    def __init__(self) -> None:
        limits = httpx.Limits(max_connections=None)
        transport = httpx.AsyncHTTPTransport(uds=SOCKET, limits=limits)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://docker/v1.40", timeout=60)

    async def ask(
        self, method: str, path: str, content: object = None, seconds: float | None = 60, **query: str
    ) -> Any:
        """The engine's answer, None where it has no body. Raises EngineError."""
        answer = await self._http.request(method, path, json=content, params=query, timeout=seconds)
        if answer.is_error:
            raise EngineError(answer.status_code, answer.json()["message"])
        return answer.json() if answer.content else None

    async def image(self, name: str) -> Any:
        """What is in it, after it was pulled if need be. Raises EngineError where it cannot be pulled."""
        with contextlib.suppress(EngineError):
            return await self.ask("GET", f"/images/{name}/json")
        of, _, tag = name.rpartition(":")
        await self.ask("POST", "/images/create", fromImage=of, tag=tag)
        return await self.ask("GET", f"/images/{name}/json")

    async def volume(self, name: str, options: dict[str, str] | None = None) -> Path:
        """Where a volume of that name is, one that is made if need be."""
        content = {"Name": name, "DriverOpts": options or {}, "Labels": {LABEL: ""}}
        return Path((await self.ask("POST", "/volumes/create", content))["Mountpoint"])

    async def log(self, container: str) -> str:
        """What a container has written to both of its outputs."""
        answer = await self._http.get(f"/containers/{container}/logs", params={"stdout": "1", "stderr": "1"})
        found, rest = [], answer.content
        while len(rest) >= 8:
            end = 8 + int.from_bytes(rest[4:8], "big")
            found.append(rest[8:end])
            rest = rest[end:]
        return b"".join(found).decode(errors="replace")

    async def remove_all(self) -> None:
        """Every container, network and volume that has the label."""
        label = f'{{"label":["{LABEL}"]}}'
        containers = await self.ask("GET", "/containers/json", all="1", filters=label)
        await asyncio.gather(*(self.remove_container(one["Id"]) for one in containers))
        for one in await self.ask("GET", "/networks", filters=label):
            await self._remove(f"/networks/{one['Id']}")
        for one in (await self.ask("GET", "/volumes", filters=label))["Volumes"] or []:
            await self.remove_volume(one["Name"])

    async def remove_container(self, name: str) -> None:
        """With whatever runs in it."""
        await self._remove(f"/containers/{name}", force="1")

    async def remove_volume(self, name: str) -> None:
        """With what is in it."""
        await self._remove(f"/volumes/{name}")

    async def _remove(self, path: str, force: str = "0") -> None:
        try:
            await self.ask("DELETE", path, force=force)
        except EngineError as error:
            # Gone, or going already.
            if error.status not in (httpx.codes.NOT_FOUND, httpx.codes.CONFLICT):
                raise

    async def close(self) -> None:
        """Ask nothing more."""
        await self._http.aclose()
