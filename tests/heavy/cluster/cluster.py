"""A cluster in small: Deployments make pods and replace them by their strategy, and Services give them names."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import ipaddress
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from tests.heavy.cluster.engine import LABEL, Engine
from tests.heavy.cluster.kubelet import Pod
from tests.heavy.cluster.names import DOMAIN, RESOLV, Names
from tests.heavy.kubernetes.kustomized import Object

SUBNET = ipaddress.ip_network("10.213.0.0/22")
NODES = ("node-a", "node-b")
# Seconds until the word of a change of pods is with every kube-proxy; DNS has it at once.
SPREAD = 3.0
# Seconds until a node that says nothing is not ready, and with it its pods; 50 by default.
NODE_GRACE = 10.0


class Cluster:
    """Made by `running`. `pods` are all that are there, those that end among them, and `gone` those that were."""

    def __init__(self, engine: Engine, network: str, folder: Path) -> None:
        self.engine = engine
        self.network = network
        self.folder = folder
        self.pods: list[Pod] = []
        self.gone: list[Pod] = []
        self.nodes = list(NODES)
        self._objects: dict[tuple[str, str], Object] = {}
        self._applied: dict[tuple[str, str], Object] = {}
        self._addresses = iter(SUBNET.hosts())
        self._changed = asyncio.Event()
        self._ends: set[asyncio.Task[None]] = set()
        self._made = 0
        # By Service, since when it had which addresses.
        self._history: dict[str, list[tuple[float, list[str]]]] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, folder: Path) -> AsyncIterator[Cluster]:
        """An empty one; nothing is left of it at the end, however that comes."""
        engine = Engine()
        try:
            await engine.remove_all()
            address = {"Subnet": str(SUBNET)}
            content = {"Name": LABEL, "Labels": {LABEL: ""}, "IPAM": {"Config": [address]}}
            await engine.ask("POST", "/networks/create", content)
            cluster = cls(engine, LABEL, folder)
            # The network's first address is this machine's.
            server = str(next(cluster._addresses))
            (folder / "resolv.conf").write_text(RESOLV.format(server=server, domain=DOMAIN))
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_datagram_endpoint(lambda: Names(cluster.named), (server, 53))
            try:
                yield cluster
            finally:
                transport.close()
                for end in cluster._ends:
                    end.cancel()
                await asyncio.gather(*cluster._ends, *(pod.forsake() for pod in cluster.pods), return_exceptions=True)
        finally:
            await engine.remove_all()
            await engine.close()

    # What is asked of it.

    def apply(self, objects: list[Object]) -> None:
        """As `kubectl apply` does: what was never in these files, as a restart or a number of pods, stays as it is.

        So does what kustomize names by its content, beside the new.
        """
        for written in objects:
            one = copy.deepcopy(written)
            key = (one["kind"], one["metadata"]["name"])
            if one["kind"] == "Deployment" and (live := self._objects.get(key)) is not None:
                if notes := live["spec"]["template"]["metadata"].get("annotations"):
                    one["spec"]["template"]["metadata"]["annotations"] = notes
                if "replicas" not in one["spec"] and "replicas" not in self._applied[key]["spec"]:
                    one["spec"]["replicas"] = _replicas(live)
            self._objects[key], self._applied[key] = one, written
        self.changed()

    def scale(self, name: str, replicas: int) -> None:
        """As `kubectl scale` does it, and KEDA."""
        self._objects["Deployment", name]["spec"]["replicas"] = replicas
        self.changed()

    def restart(self, name: str) -> None:
        """As `kubectl rollout restart` does it."""
        template = self._objects["Deployment", name]["spec"]["template"]
        notes = template["metadata"].setdefault("annotations", {})
        notes["kubectl.kubernetes.io/restartedAt"] = str(time.time())
        self.changed()

    def delete(self, pod: Pod) -> None:
        """As `kubectl delete pod` does it."""
        pod.ending = True
        end = asyncio.create_task(pod.end())
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)

    async def vanish(self, node: str) -> None:
        """A node is gone from the network, with no word; after a while it is known to be, and no pod is put there."""
        self.nodes.remove(node)
        lost = [pod for pod in self.pods if pod.node == node]
        for pod in lost:
            pod.watch_no_more()
            content = {"Container": pod.container, "Force": True}
            await self.engine.ask("POST", f"/networks/{self.network}/disconnect", content)
        asyncio.get_running_loop().call_later(NODE_GRACE, self._miss, lost)

    def _miss(self, lost: list[Pod]) -> None:
        for pod in lost:
            pod.ready = False
        self.changed()

    async def until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Wait for that. Fails with how the pods are."""
        try:
            async with asyncio.timeout(seconds):
                while not holds():
                    await self._changed.wait()
        except TimeoutError:
            states = "\n".join([await pod.described() for pod in self.pods])
            raise AssertionError(f"not within {seconds:g} s; the pods are\n{states}") from None

    # What it says.

    def find(self, kind: str, name: str) -> Object | None:
        """An object, None where there is none."""
        return self._objects.get((kind, name))

    def of(self, owner: str) -> list[Pod]:
        """A Deployment's pods, but for those that end."""
        return [pod for pod in self.pods if pod.owner == owner and not pod.ending]

    def is_rolled_out(self, name: str) -> bool:
        """As `kubectl rollout status` has it: all of its pods are new, and ready."""
        deployment = self._objects["Deployment", name]
        pods = self.of(name)
        new = _revision(deployment)
        return len(pods) == _replicas(deployment) and all(pod.ready and pod.revision == new for pod in pods)

    def named(self, service: str) -> list[str] | None:
        """The addresses that DNS has of a Service, None where there is none."""
        found = self.find("Service", service)
        if found is None:
            return None
        if found["spec"].get("clusterIP") != "None":
            return [_cluster_address(service)]
        return self._endpoints(found)

    def _endpoints(self, service: Object) -> list[str]:
        spec = service["spec"]
        return [
            pod.address
            for pod in self.pods
            if spec["selector"].items() <= pod.labels.items()
            and ((pod.ready and not pod.ending) or spec.get("publishNotReadyAddresses", False))
        ]

    def proxied(self, service: str) -> list[str]:
        """The addresses of which a new connection to a Service gets one, as the slowest kube-proxy has them."""
        until = time.monotonic() - SPREAD
        return [addresses for since, addresses in self._history[service] if since <= until][-1]

    def links(self) -> dict[str, str]:
        """The variables of Services that have an address."""
        found: dict[str, str] = {}
        for (kind, name), one in self._objects.items():
            if kind == "Service" and one["spec"].get("clusterIP") != "None":
                prefix, address = name.upper().replace("-", "_"), _cluster_address(name)
                first = one["spec"]["ports"][0]["port"]
                found |= {f"{prefix}_SERVICE_HOST": address, f"{prefix}_SERVICE_PORT": str(first)}
                found[f"{prefix}_PORT"] = f"tcp://{address}:{first}"
                for port in one["spec"]["ports"]:
                    number = str(port["port"])
                    found[f"{prefix}_SERVICE_PORT_{port['name'].upper()}"] = number
                    each = f"{prefix}_PORT_{number}_TCP"
                    found |= {each: f"tcp://{address}:{number}", f"{each}_PROTO": "tcp"}
                    found |= {f"{each}_PORT": number, f"{each}_ADDR": address}
        return found

    # What its controllers do.

    def changed(self) -> None:
        """Something is another than it was: what is wanted is looked at anew."""
        self.gone += [pod for pod in self.pods if pod.gone]
        self.pods = [pod for pod in self.pods if not pod.gone]
        for (kind, name), one in list(self._objects.items()):
            if kind == "Deployment":
                self._replace(name, one)
            elif kind == "Service":
                known = self._history.setdefault(name, [(-math.inf, [])])
                if (now := self._endpoints(one)) != known[-1][1]:
                    known.append((time.monotonic(), now))
        self._changed.set()
        self._changed = asyncio.Event()

    def _replace(self, name: str, deployment: Object) -> None:
        """One step of a Deployment towards what it is to be."""
        wanted, revision = _replicas(deployment), _revision(deployment)
        pods = self.of(name)
        new = [pod for pod in pods if pod.revision == revision]
        old = [pod for pod in pods if pod.revision != revision]
        strategy = deployment["spec"].get("strategy", {})
        if strategy.get("type") == "Recreate":
            for pod in old:
                self.delete(pod)
            others = [pod for pod in self.pods if pod.owner == name and pod.revision != revision]
            room = 0 if others else wanted - len(new)
        else:
            figures = strategy.get("rollingUpdate", {})
            surge = _figure(figures.get("maxSurge", "25%"), wanted, math.ceil)
            fewest = wanted - _figure(figures.get("maxUnavailable", "25%"), wanted, math.floor)
            room = min(wanted - len(new), wanted + surge - len(pods))
            # Those that are not ready go first; of those that are, as many as there are to spare.
            may_go = len(pods) - fewest - sum(not pod.ready for pod in new)
            spare = sum(pod.ready for pod in pods) - fewest
            for pod in sorted(old, key=lambda pod: pod.ready)[: max(0, may_go)]:
                if pod.ready:
                    spare -= 1
                if not pod.ready or spare >= 0:
                    self.delete(pod)
        for pod in sorted(new, key=lambda pod: pod.ready)[: max(0, len(new) - wanted)]:
            self.delete(pod)
        for _ in range(room):
            self._add(name, revision, copy.deepcopy(deployment["spec"]["template"]))

    def _add(self, owner: str, revision: str, template: Object) -> None:
        self._made += 1
        # As topologySpreadConstraints have it, by matchLabelKeys: spread among those of one revision.
        new = [pod for pod in self.of(owner) if pod.revision == revision]
        node = min(self.nodes, key=lambda node: sum(pod.node == node for pod in new))
        name = f"{owner}-{revision}-{self._made}"
        pod = Pod(name, owner, revision, template, node, str(next(self._addresses)), self)
        self.pods.append(pod)
        pod.start()


def _revision(deployment: Object) -> str:
    text = json.dumps(deployment["spec"]["template"], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _replicas(deployment: Object) -> int:
    return int(deployment["spec"].get("replicas", 1))


def _figure(value: int | str, of: int, rounded: Callable[[float], int]) -> int:
    return value if isinstance(value, int) else rounded(int(value.removesuffix("%")) * of / 100)


def _cluster_address(service: str) -> str:
    return f"10.96.1.{sum(service.encode()) % 250 + 1}"
