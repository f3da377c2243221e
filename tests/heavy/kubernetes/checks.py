"""What schemas do not see: names that lead nowhere, quantities, and what a pod may do. Each yields sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.heavy.kubernetes.kustomized import Object, containers, of_kind, settings, templates

# Made by hand, as docs/kubernetes.md says.
SECRETS = {"model-server-key", "hub-token", "model-bucket", "gateway-keys", "gateway-tls"}
# Put onto a group's pods by LeaderWorkerSet itself.
_GROUPS_OWN = {"leaderworkerset.sigs.k8s.io/worker-index"}
_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGTPE]|[KMGTPE]i)?")
_POWERS = {"m": 1e-3, "k": 1e3, "": 1.0} | {
    f"{letter}{i}": (1024.0 if i else 1000.0) ** power for power, letter in enumerate("KMGTPE", 1) for i in ("", "i")
}


def quantity(value: object) -> float:
    """A quantity as a number. Raises ValueError."""
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is no quantity")
    return float(match[1]) * _POWERS[match[2] or ""]


def quantities(objects: list[Object]) -> Iterator[str]:
    """All quantities are some, and no container asks for more than it may have."""
    for where, key, value in _leaves(objects):
        if key in ("cpu", "memory", "storage", "sizeLimit") or "/gpu" in key or "/gaudi" in key:
            try:
                quantity(value)
            except ValueError as error:
                yield f"{where}: {error}"
    for name, pod in templates(objects):
        for container in containers(pod):
            asked, most = (container.get("resources", {}).get(part, {}) for part in ("requests", "limits"))
            if not {"cpu", "memory"} <= asked.keys() or "memory" not in most:
                yield f"{name}: {container['name']} has no requests of cpu and memory, or no limit of memory"
            for what in asked.keys() & most.keys():
                if _number(asked[what]) > _number(most[what]):
                    yield f"{name}: {container['name']} asks for more {what} than it may have"


def _number(value: object) -> float:
    try:
        return quantity(value)
    except ValueError:
        return 0


def _leaves(value: Any, where: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{where}/{name}", name)
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from _leaves(inner, f"{where}/{at}", key)
    else:
        yield where, key, value


def names(objects: list[Object]) -> Iterator[str]:
    """Whatever a pod, a scaler or a Service names is there; services' variables reach no settings."""
    there = {(one["kind"], one["metadata"]["name"]) for one in objects}
    if len(there) < len(objects):
        yield "two objects have one name"
    for name, pod in templates(objects):
        yield from (f"{name} names the {kind} {of}, which is not there" for kind, of in _named(pod) - there)
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        mounted = {mount["name"] for one in containers(pod) for mount in one.get("volumeMounts", [])}
        yield from (f"{name}: the volume {one} is mounted and none, or the reverse" for one in volumes ^ mounted)
        if pod["spec"].get("enableServiceLinks") is not False:
            yield f"{name}: variables of services come into its pods"
    for scaled in of_kind(objects, "ScaledObject"):
        if ("Deployment", target := scaled["spec"]["scaleTargetRef"]["name"]) not in there:
            yield f"the Deployment {target} is scaled and not there"
    for service in of_kind(objects, "Service"):
        if service["metadata"]["name"] in ("gateway", "vllm"):
            yield f"variables of a Service {service['metadata']['name']} would be settings"


def _named(pod: Object) -> set[tuple[str, str]]:
    found = set()
    for container in containers(pod):
        sources = container.get("envFrom", [])
        found |= {("ConfigMap", one["configMapRef"]["name"]) for one in sources if "configMapRef" in one}
        found |= {("Secret", one["secretRef"]["name"]) for one in sources if "secretRef" in one}
        froms = [one["valueFrom"] for one in container.get("env", []) if "valueFrom" in one]
        found |= {("Secret", one["secretKeyRef"]["name"]) for one in froms}
    for volume in pod["spec"].get("volumes", []):
        if "persistentVolumeClaim" in volume:
            found.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        if "secret" in volume:
            found.add(("Secret", volume["secret"]["secretName"]))
    return found - {("Secret", name) for name in SECRETS}


def selectors(objects: list[Object]) -> Iterator[str]:
    """Every selector finds a pod, or a Service, and a workload's finds its own pods."""
    pods = [pod["metadata"]["labels"] for _, pod in templates(objects)]
    services = [one["metadata"].get("labels", {}) for one in of_kind(objects, "Service")]
    for one in objects:
        name, spec = f"the {one['kind']} {one['metadata']['name']}", one.get("spec", {})
        wanted = {
            "Service": lambda spec=spec: [(spec["selector"], pods)],
            "PodDisruptionBudget": lambda spec=spec: [(spec["selector"]["matchLabels"], pods)],
            "NetworkPolicy": lambda spec=spec: [(labels, pods) for labels in _peers(spec)],
            "ServiceMonitor": lambda spec=spec: [(spec["selector"]["matchLabels"], services)],
            "Deployment": lambda spec=spec: [
                (spec["selector"]["matchLabels"], [spec["template"]["metadata"]["labels"]])
            ],
        }.get(one["kind"], list)()
        for labels, among in wanted:
            asked = {item for item in labels.items() if item[0] not in _GROUPS_OWN}
            if not asked or not any(asked <= found.items() for found in among):
                yield f"{name} selects {labels}, which nothing has"


def _peers(spec: Object) -> Iterator[dict[str, str]]:
    yield spec["podSelector"]["matchLabels"]
    for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
        for peer in [*rule.get("from", []), *rule.get("to", [])]:
            # An empty one is all pods of the namespace.
            if labels := peer.get("podSelector", {}).get("matchLabels"):
                yield labels


def ports(objects: list[Object]) -> Iterator[str]:
    """Ports go by their names, and a Service's number is the pod's, as a headless one changes none."""
    for name, pod in templates(objects):
        for container in containers(pod):
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe in container and container[probe]["httpGet"]["port"] not in _ports(container):
                    yield f"{name}: the {probe} asks no named port of {container['name']}"
    for service in of_kind(objects, "Service"):
        of = [pod for _, pod in templates(objects) if _is_of(service["spec"]["selector"], pod)]
        numbers = [_ports(pod["spec"]["containers"][0]) for pod in of]
        for port in service["spec"]["ports"]:
            if any(found.get(port["targetPort"]) != port["port"] for found in numbers):
                yield f"the Service {service['metadata']['name']} has a port that its pods have not"
    yield from scraped_ports(objects)


def scraped_ports(objects: list[Object]) -> Iterator[str]:
    """What is scraped is a port of a Service."""
    for monitor in of_kind(objects, "ServiceMonitor"):
        of = [one for one in of_kind(objects, "Service") if _is_of(monitor["spec"]["selector"]["matchLabels"], one)]
        there = {port["name"] for one in of for port in one["spec"]["ports"]}
        for endpoint in monitor["spec"]["endpoints"]:
            if endpoint["port"] not in there:
                yield f"no Service has the port {endpoint['port']}"


def _ports(container: Object) -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in container.get("ports", [])}


def _is_of(labels: dict[str, str], one: Object) -> bool:
    there: dict[str, str] = one["metadata"]["labels"]
    return {item for item in labels.items() if item[0] not in _GROUPS_OWN} <= there.items()


def upstreams(objects: list[Object]) -> Iterator[str]:
    """Where the gateway looks for vLLM, there is a headless Service that has no pod that is not ready."""
    headless = {
        f"{one['metadata']['name']}:{port['port']}"
        for one in of_kind(objects, "Service")
        if one["spec"].get("clusterIP") == "None" and not one["spec"].get("publishNotReadyAddresses")
        for port in one["spec"]["ports"]
    }
    for name, pod in templates(objects):
        for container in containers(pod):
            for url in settings(objects, container).get("GATEWAY_UPSTREAMS", "").split(","):
                if url and url.removeprefix("dns+http://") not in headless:
                    yield f"{name}: {url} is no headless Service"


def endings(objects: list[Object]) -> Iterator[str]:
    """What a pod's answers get to end in is less than what Kubernetes gives it, by ten seconds or more."""
    for name, pod in templates(objects):
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        for container in pod["spec"]["containers"]:
            found = settings(objects, container)
            if "GATEWAY_UPSTREAMS" in found:
                drain = int(found["GATEWAY_DRAIN_DELAY"]) + int(found["GATEWAY_DRAIN_TIMEOUT"])
                if not grace == int(found["GATEWAY_STOP_GRACE"]) == drain + 10:
                    yield f"{name}: {drain} s and 10 are not {grace}, or not {found['GATEWAY_STOP_GRACE']}"
            elif "LLM_VLLM_MODEL_NAME" in found:
                before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
                answers = int(found.get("VLLM_SHUTDOWN_TIMEOUT", 0))
                # A worker of a group has none, and stays for the leader's.
                worker = "livenessProbe" not in container
                if before < 15 + (answers if worker else 0) or answers < 30:
                    yield f"{name}: its answers are cut off"
                if grace < before + (0 if worker else answers) + 15:
                    yield f"{name}: {grace} s are too few"


def accelerators(objects: list[Object]) -> Iterator[str]:
    """A model's pods have as many accelerators in all as it is split over."""
    sizes = [one["spec"]["leaderWorkerTemplate"]["size"] for one in of_kind(objects, "LeaderWorkerSet")]
    for name, pod in templates(objects):
        for container in pod["spec"]["containers"]:
            found = settings(objects, container)
            if "LLM_VLLM_MODEL_NAME" not in found or found["LLM_DEVICE"] == "cpu":
                continue
            kind = {"cuda": "nvidia.com/gpu", "hpu": "habana.ai/gaudi"}[found["LLM_DEVICE"]]
            wanted = int(found["VLLM_TP_SIZE"]) * int(found["VLLM_PP_SIZE"])
            given = [container["resources"].get(part, {}).get(kind) for part in ("requests", "limits")]
            if given != [wanted / (sizes[0] if sizes else 1)] * 2:
                yield f"{name}: the model is split over {wanted}, but {kind} is {given}"


def volumes(objects: list[Object]) -> Iterator[str]:
    """Where a volume is of one node, there is one pod that has it, which goes before the next one comes."""
    claims = {one["metadata"]["name"]: one["spec"]["accessModes"] for one in of_kind(objects, "PersistentVolumeClaim")}
    for one in of_kind(objects, "Deployment", "LeaderWorkerSet"):
        for name, pod in templates([one]):
            for _, claim in _named(pod) & {("PersistentVolumeClaim", name) for name in claims}:
                recreated = one["spec"].get("strategy", {}).get("type") == "Recreate"
                if recreated != (claims[claim] == ["ReadWriteOnce"]):
                    yield f"{name}: {claim} is {claims[claim]}"
                elif recreated and one["spec"].get("replicas", 1) > 1:
                    yield f"{name}: {one['spec']['replicas']} pods have {claim}, which is of one node"


def restricted(objects: list[Object]) -> Iterator[str]:
    """The rules of Kubernetes' Pod Security Standards, `restricted`, for each pod."""
    for name, pod in templates(objects):
        spec, inner = pod["spec"], pod["spec"].get("securityContext", {})
        everyone = containers(pod)
        own = [one.get("securityContext", {}) for one in everyone]
        seccomp = [one.get("seccompProfile", inner.get("seccompProfile", {})).get("type") for one in own]
        users = [one.get("runAsUser", inner.get("runAsUser")) for one in own]
        capabilities = [one.get("capabilities", {}) for one in own]
        contexts = [inner, *own]
        rules = {
            "host namespaces": not any(spec.get(f"host{one}") for one in ("Network", "PID", "IPC")),
            "privileged": not any(one.get("privileged") for one in own),
            "capabilities": all(
                one.get("drop") == ["ALL"] and set(one.get("add", [])) <= {"NET_BIND_SERVICE"} for one in capabilities
            ),
            "volumes": all(len(one.keys() & _VOLUMES) == 1 for one in spec.get("volumes", [])),
            "host ports": not any(port.get("hostPort") for one in everyone for port in one.get("ports", [])),
            "profiles": all(
                one.get("appArmorProfile", {}).get("type") != "Unconfined"
                and not one.get("seLinuxOptions")
                and one.get("procMount", "Default") == "Default"
                and not one.get("windowsOptions")
                for one in contexts
            ),
            "sysctls": not inner.get("sysctls"),
            "privilege escalation": all(one.get("allowPrivilegeEscalation") is False for one in own),
            "a user other than root": all(users)
            and all(one.get("runAsNonRoot", inner.get("runAsNonRoot")) is True for one in own),
            "seccomp": set(seccomp) <= {"RuntimeDefault", "Localhost"},
        }
        yield from (f"{name}: {rule}" for rule, holds in rules.items() if not holds)
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: it has a token for Kubernetes' API"


ALL = (quantities, names, selectors, ports, upstreams, endings, accelerators, volumes, restricted)
