"""What a pod's containers run in: made on a Docker engine of what is written, and of nothing else.

What stands in a pod and is not known here is refused, so that nothing is left out unseen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.heavy.cluster.engine import LABEL, Engine, EngineError
from tests.heavy.kubernetes.checks import quantity
from tests.heavy.kubernetes.kustomized import Object, containers

_POD = {
    "automountServiceAccountToken",
    "containers",
    "enableServiceLinks",
    "initContainers",
    "securityContext",
    "terminationGracePeriodSeconds",
    "topologySpreadConstraints",
    "volumes",
}
_POD_CONTEXT = {"fsGroup", "fsGroupChangePolicy", "runAsGroup", "runAsNonRoot", "runAsUser", "seccompProfile"}
_CONTAINER = {
    *("args", "command", "env", "envFrom", "image", "lifecycle", "livenessProbe", "name", "ports", "readinessProbe"),
    *("resources", "securityContext", "startupProbe", "volumeMounts", "workingDir"),
}
_CONTEXT = {"allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem"}
_PROBE = {"failureThreshold", "httpGet", "initialDelaySeconds", "periodSeconds", "timeoutSeconds"}


class Waits(Exception):
    """Why a container is not started, in the words of `kubectl get pods` and, behind a colon, `kubectl describe`."""


class Cluster(Protocol):
    """What a kubelet is told of its cluster, and tells it."""

    engine: Engine
    network: str
    folder: Path

    @property
    def pods(self) -> Sequence[Sandbox]:
        """All that are there."""

    def find(self, kind: str, name: str) -> Object | None:
        """An object, None where there is none."""

    def links(self) -> dict[str, str]:
        """The variables of Services."""

    def changed(self) -> None:
        """Something is another than it was."""


@dataclass(eq=False)
class Sandbox:
    """A pod's: its volumes, of which it has all once it is `attached`, and its containers, one after the other."""

    name: str
    owner: str
    revision: str
    template: Object
    node: str
    address: str
    cluster: Cluster
    attached: bool = False

    def __post_init__(self) -> None:
        """Raises AssertionError for what is not known here."""
        spec = self.template["spec"]
        _known(spec, _POD)
        _known(spec.get("securityContext", {}), _POD_CONTEXT)
        for container in containers(self.template):
            _known(container, _CONTAINER)
            _known(container.get("securityContext", {}), _CONTEXT)
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                _known(container.get(kind, {}), _PROBE)
                _known(container.get(kind, {}).get("httpGet", {}), {"path", "port"})

    @property
    def volumes(self) -> list[Object]:
        """As they are written."""
        found: list[Object] = self.template["spec"].get("volumes", [])
        return found

    def named(self, container: Object) -> str:
        """What the engine calls one of its containers."""
        return f"{self.name}-{container['name']}"

    async def remove(self) -> None:
        """All of it, but for what is claimed."""
        for container in containers(self.template):
            await self.cluster.engine.remove_container(self.named(container))
        for volume in self.volumes:
            if "persistentVolumeClaim" not in volume:
                await self.cluster.engine.remove_volume(self._volume(volume))

    def _volume(self, volume: Object) -> str:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        return f"claim-{claim}" if claim else f"{self.name}-{volume['name']}"

    async def make_volumes(self) -> None:
        """Raises Waits where one cannot be."""
        group = self.template["spec"].get("securityContext", {}).get("fsGroup", 0)
        filled = [(volume, self._files(volume)) for volume in self.volumes]
        self.attached = True
        for volume, files in filled:
            empty, options = volume.get("emptyDir", {}), {}
            if memory := empty.get("medium") == "Memory":
                size = int(quantity(empty["sizeLimit"]))
                options = {"type": "tmpfs", "device": "tmpfs", "o": f"size={size},mode=2777,gid={group}"}
            where = await self.cluster.engine.volume(self._volume(volume), options)
            if not memory:
                _own(where, group)
            if files:
                # As there: the files are links into a folder that is one.
                (where / "..1").mkdir()
                (where / "..data").symlink_to("..1")
                for name, text in files.items():
                    (where / "..1" / name).write_text(text)
                    (where / name).symlink_to(f"..data/{name}")

    def _files(self, volume: Object) -> dict[str, str]:
        """What a volume has to begin with. Raises Waits."""
        kind, how = next(item for item in volume.items() if item[0] != "name")
        if kind == "emptyDir":
            return {}
        if kind == "persistentVolumeClaim":
            claim = self.cluster.find("PersistentVolumeClaim", how["claimName"])
            if claim is None:
                raise Waits(f'Pending: persistentvolumeclaim "{how["claimName"]}" not found')
            elsewhere = [pod for pod in self.cluster.pods if pod.node != self.node and volume in pod.volumes]
            if claim["spec"]["accessModes"] == ["ReadWriteOnce"] and any(pod.attached for pod in elsewhere):
                raise Waits(f"ContainerCreating: Multi-Attach error: volume is used by pod {elsewhere[0].name}")
            return {}
        key = {"secret": "secretName", "configMap": "name"}[kind]
        found = self.cluster.find("Secret" if kind == "secret" else "ConfigMap", how[key])
        if found is None:
            raise Waits(f'ContainerCreating: MountVolume.SetUp failed: {kind} "{how[key]}" not found')
        return dict(found["data"])

    def _environment(self, container: Object) -> dict[str, str]:
        """Raises Waits."""
        found = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_PORT": "tcp://10.96.0.1:443"}
        if self.template["spec"].get("enableServiceLinks", True):
            found |= self.cluster.links()
        for source in container.get("envFrom", []):
            ((kind, of),) = source.items()
            found |= self._data(kind.removesuffix("Ref"), of) or {}
        for one in container.get("env", []):
            if "value" in one:
                found[one["name"]] = _expanded(one["value"], found)
                continue
            ((kind, of),) = one["valueFrom"].items()
            data = self._data(kind.removesuffix("KeyRef"), of)
            if data is not None and of["key"] in data:
                found[one["name"]] = data[of["key"]]
            elif not of.get("optional"):
                raise Waits(f"CreateContainerConfigError: couldn't find key {of['key']} in {kind[:-6]} {of['name']}")
        return found

    def _data(self, kind: str, of: Object) -> dict[str, str] | None:
        found = self.cluster.find({"secret": "Secret", "configMap": "ConfigMap"}[kind], of["name"])
        if found is None and not of.get("optional"):
            raise Waits(f'CreateContainerConfigError: {kind.lower()} "{of["name"]}" not found')
        return found and dict(found["data"])

    async def create(self, container: Object) -> None:
        """One of its containers, which does not run yet. Raises Waits where it cannot be."""
        engine = self.cluster.engine
        environ = self._environment(container)
        try:
            image = await engine.image(container["image"])
        except EngineError as error:
            raise Waits(f'ErrImagePull: failed to pull image "{container["image"]}": {error}') from None
        inner, own = self.template["spec"].get("securityContext", {}), container.get("securityContext", {})
        user = str(inner.get("runAsUser", image["Config"]["User"].partition(":")[0]))
        if inner.get("runAsNonRoot") and user in ("", "0"):
            raise Waits("CreateContainerConfigError: container has runAsNonRoot and image will run as root")
        assert inner.get("seccompProfile", {}).get("type") == "RuntimeDefault"
        volumes = {volume["name"]: self._volume(volume) for volume in self.volumes}
        limits = container.get("resources", {}).get("limits", {})
        memory = int(quantity(limits.get("memory", 0)))
        host = {
            "ReadonlyRootfs": own.get("readOnlyRootFilesystem", False),
            "CapDrop": own.get("capabilities", {}).get("drop", []),
            "CapAdd": own.get("capabilities", {}).get("add", []),
            "SecurityOpt": [] if own.get("allowPrivilegeEscalation", True) else ["no-new-privileges"],
            "GroupAdd": [str(inner["fsGroup"])] if "fsGroup" in inner else [],
            "Memory": memory,
            "MemorySwap": memory,
            "CpuShares": int(1024 * quantity(container.get("resources", {}).get("requests", {}).get("cpu", 0))) or 2,
            "NetworkMode": self.cluster.network,
            "Mounts": [
                {
                    "Type": "volume",
                    "Source": volumes[mount["name"]],
                    "Target": mount["mountPath"],
                    "ReadOnly": mount.get("readOnly", False),
                    "VolumeOptions": {"NoCopy": True},
                }
                for mount in container.get("volumeMounts", [])
            ],
        }
        resolv = {"Type": "bind", "Source": str(self.cluster.folder / "resolv.conf"), "Target": "/etc/resolv.conf"}
        host["Mounts"].append(resolv | {"ReadOnly": True})
        content = {
            "Image": container["image"],
            "Env": [f"{name}={value}" for name, value in environ.items()],
            "User": f"{user}:{inner['runAsGroup']}" if "runAsGroup" in inner else user,
            "Hostname": self.name,
            "WorkingDir": container.get("workingDir", ""),
            # An image's own is Docker's alone.
            "Healthcheck": {"Test": ["NONE"]},
            "Labels": {LABEL: ""},
            "HostConfig": host,
            "NetworkingConfig": {
                "EndpointsConfig": {self.cluster.network: {"IPAMConfig": {"IPv4Address": self.address}}}
            },
        }
        content |= {"Entrypoint": container["command"]} if "command" in container else {}
        content |= {"Cmd": container["args"]} if "args" in container else {}
        await engine.ask("POST", "/containers/create", content, name=self.named(container))


def _expanded(value: str, environ: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: environ.get(match[1], match[0]), value)


def _known(written: Object, names: set[str]) -> None:
    assert written.keys() <= names, f"not known here: {written.keys() - names}"


def _own(folder: Path, group: int) -> None:
    """Give what is in a volume to the group, where its root is not that group's (OnRootMismatch)."""
    if folder.stat().st_gid == group:
        return
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, -1, group)
        path.chmod(path.stat().st_mode | (0o2777 if path == folder else 0o2070 if path.is_dir() else 0o060))
