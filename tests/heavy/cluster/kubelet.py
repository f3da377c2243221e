"""A kubelet in small: runs a pod's containers as they are written, by the figures that stand there.

A pod has one container, and any number that run before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from tests.heavy.cluster.engine import EngineError
from tests.heavy.cluster.sandbox import Sandbox, Waits
from tests.heavy.kubernetes.kustomized import Object

# Seconds until a container that ended again and again is started anew; the first time it is at once.
_BACK_OFF = (10.0, 300.0)
# Seconds between two looks at what a pod waits for.
_AGAIN = 1.0


@dataclass(eq=False)
class Pod(Sandbox):
    """A pod, and how it is: `ready` and `ending` as its conditions, `why` is what it waits for.

    `told` is what happened, and when; `gone` once nothing of it is left; `container` is the engine's name of the one
    that runs.
    """

    ready: bool = False
    ending: bool = False
    gone: bool = False
    why: str = "ContainerCreating"
    restarts: int = 0
    container: str | None = None
    told: list[tuple[float, str]] = field(default_factory=list)
    _life: asyncio.Task[None] | None = None
    _probes: asyncio.Task[None] | None = None
    _running: Object = field(default_factory=dict)
    _exited: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def labels(self) -> dict[str, str]:
        """By which it is selected."""
        found: dict[str, str] = self.template["metadata"]["labels"]
        return found

    def start(self) -> None:
        """Begin to run it."""
        self._life = asyncio.create_task(self._live())
        self._life.add_done_callback(self._ended)

    async def end(self) -> None:
        """As it is deleted: not ready for anyone from now on, and gone by its grace."""
        self.ending = True
        self.cluster.changed()
        await self._stop("deleted")
        await self.forsake()
        await self.remove()
        self.gone = True
        self.cluster.changed()

    async def forsake(self) -> None:
        """Look after it no more, as a node that is gone; what ran is killed, with no word."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)

    def watch_no_more(self) -> None:
        """It is probed no more."""
        if self._probes is not None:
            self._probes.cancel()

    def when(self, what: str) -> float:
        """When that was told of it for the first time, as time.monotonic() has it."""
        return next(at for at, told in self.told if what in told)

    async def described(self) -> str:
        """As `kubectl describe` and `kubectl logs` have it, for a message."""
        lines = (await self.cluster.engine.log(self.container)).splitlines()[-5:] if self.container else []
        return "\n  ".join([f"{self.name}: {self.why}, ready: {self.ready}", *(told for _, told in self.told), *lines])

    def _tell(self, what: str) -> None:
        self.told.append((time.monotonic(), what))

    def _ended(self, life: asyncio.Task[None]) -> None:
        if not life.cancelled() and (error := life.exception()) is not None:
            self._tell(f"a fault of this kubelet: {error!r}")

    async def _live(self) -> None:
        spec = self.template["spec"]
        await self._when_it_can(self.make_volumes)
        for container in spec.get("initContainers", []):
            while await self._run(container) != 0:
                await self._rest(container)
        (container,) = spec["containers"]
        while True:
            await self._run(container)
            if self.ending:
                return
            await self._rest(container)

    async def _rest(self, container: Object) -> None:
        pause = min(_BACK_OFF[0] * 2 ** (self.restarts - 1), _BACK_OFF[1]) if self.restarts else 0
        if pause:
            self.why = f"CrashLoopBackOff: back-off {pause:g}s restarting failed container={container['name']}"
            self.cluster.changed()
        await asyncio.sleep(pause)
        self.restarts += 1

    async def _run(self, container: Object) -> int:
        """A new container of it, until that ends; its exit status."""
        await self._when_it_can(lambda: self.create(container))
        engine, name = self.cluster.engine, self.named(container)
        self.container, self._running, self.why = name, container, "Running"
        self._exited.clear()
        await engine.ask("POST", f"/containers/{name}/start")
        wait = asyncio.create_task(engine.ask("POST", f"/containers/{name}/wait", seconds=None))
        self.cluster.changed()
        self._probes = asyncio.create_task(self._probe(container))
        try:
            status = int((await wait)["StatusCode"])
        finally:
            self.ready = False
            wait.cancel()
            self._probes.cancel()
            await asyncio.gather(wait, self._probes, return_exceptions=True)
            log = await engine.log(name)
            with (self.cluster.folder / f"{name}.log").open("a") as file:
                file.write(log)
            await engine.remove_container(name)
            self.container = None
            self._exited.set()
            self.cluster.changed()
        lines = log.splitlines() or [""]
        self._tell(f"{container['name']} ended with {status}: {lines[-1]}")
        return status

    async def _when_it_can(self, start: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Once nothing that it needs is missing."""
        while True:
            try:
                await start()
                return
            except Waits as wait:
                if self.why != str(wait):
                    self.why = str(wait)
                    self._tell(self.why)
                    self.cluster.changed()
                await asyncio.sleep(_AGAIN)

    async def _stop(self, why: str) -> None:
        """preStop, SIGTERM, and SIGKILL when the grace is over, for what runs."""
        if self.container is None:
            return
        grace = self.template["spec"].get("terminationGracePeriodSeconds", 30)
        until = time.monotonic() + grace
        self._tell(f"{self.container} is stopped: {why}")
        if before := self._running.get("lifecycle", {}).get("preStop"):
            await self._exits(min(before["sleep"]["seconds"], grace))
        for signal in ("SIGTERM", "SIGKILL"):
            if self._exited.is_set():
                return
            self._tell(signal)
            with contextlib.suppress(EngineError):  # where it has just ended
                await self.cluster.engine.ask("POST", f"/containers/{self.container}/kill", signal=signal)
            await self._exits(until - time.monotonic() if signal == "SIGTERM" else 60)

    async def _exits(self, seconds: float) -> None:
        """Wait for that, but no longer."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._exited.wait(), max(0, seconds))

    async def _probe(self, container: Object) -> None:
        """By its probes, for as long as it runs; what runs before a pod's container has none, and is never ready."""
        if container not in self.template["spec"]["containers"]:
            return
        if "startupProbe" in container:
            async for good, failed in self._results(container, "startupProbe"):
                if failed and not self.ending:
                    await self._stop("its startupProbe fails")
                if good or failed:
                    break
        await asyncio.gather(self._watch_readiness(container), self._watch_life(container))

    async def _watch_readiness(self, container: Object) -> None:
        async for good, failed in self._results(container, "readinessProbe"):
            if good != self.ready and (good or failed):
                self.ready = good
                self._tell("ready" if good else "not ready")
                self.cluster.changed()

    async def _watch_life(self, container: Object) -> None:
        async for _, failed in self._results(container, "livenessProbe"):
            if failed and not self.ending:
                await self._stop("its livenessProbe fails")

    async def _results(self, container: Object, kind: str) -> AsyncIterator[tuple[bool, bool]]:
        """Whether each probe succeeds, and whether so many in a row have failed that it counts; one, where none is."""
        if kind not in container:
            yield True, False
            return
        probe = container[kind]
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        failures = 0
        while True:
            began = time.monotonic()
            good = await self._answers(container, probe)
            failures = 0 if good else failures + 1
            yield good, failures >= probe.get("failureThreshold", 3)
            await asyncio.sleep(max(0, began + probe.get("periodSeconds", 10) - time.monotonic()))

    async def _answers(self, container: Object, probe: Object) -> bool:
        asked = probe["httpGet"]
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        request = f"GET {asked['path']} HTTP/1.1\r\nHost: {self.address}\r\nConnection: close\r\n\r\n".encode()
        try:
            async with asyncio.timeout(probe.get("timeoutSeconds", 1)):
                reader, writer = await asyncio.open_connection(self.address, ports[asked["port"]])
                try:
                    writer.write(request)
                    return (await reader.readline())[9:12] in (b"200", b"204")
                finally:
                    writer.transport.abort()
        except (OSError, TimeoutError):
            return False
