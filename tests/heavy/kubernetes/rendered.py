"""What is rendered holds together, and says what is meant.

Not among the tests that `make test` finds; `make test-kubernetes` runs it.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from gateway.config.load import build, differing
from gateway.config.settings import Settings
from gateway.modelserver import vllm_args
from tests.heavy.kubernetes import checks
from tests.heavy.kubernetes.conftest import NAMES
from tests.heavy.kubernetes.kustomized import (
    FOLDER,
    OVERLAYS,
    Object,
    containers,
    kustomize,
    named,
    of_kind,
    settings,
    templates,
)
from tests.support.paths import ROOT

Renderings = dict[str, list[Object]]
Check = Callable[[list[Object]], Iterator[str]]
DOCUMENT = (ROOT / "docs" / "kubernetes.md").read_text()
KEYS = {"LLM_VLLM_API_KEY": "key"}


def pod_of(objects: list[Object], name: str) -> Object:
    pod: Object = named(objects, "Deployment", name)["spec"]["template"]
    return pod


def container_of(objects: list[Object], name: str) -> Object:
    container: Object = pod_of(objects, name)["spec"]["containers"][0]
    return container


# Of these alone the vLLM is elsewhere, under a name that is to be set.
WITHOUT_VLLM = {"base", "components/keys", "components/tls"}


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(name, check, id=f"{name}-{check.__name__}")
        for name in NAMES
        for check in checks.ALL
        if not (name in WITHOUT_VLLM and check is checks.upstreams)
    ],
)
def test_what_schemas_do_not_see(renderings: Renderings, name: str, check: Check) -> None:
    assert list(check(renderings[name])) == []


GATEWAY, VLLM, POD = "Deployment/vllm-gateway", "Deployment/model-server", "spec/template/spec"
# What is put where, and which check finds it.
WRONG: list[tuple[Check, str, str, object]] = [
    (checks.quantities, VLLM, f"{POD}/volumes/shm/emptyDir/sizeLimit", "12Q"),
    (checks.quantities, GATEWAY, f"{POD}/containers/gateway/resources/limits/memory", "1Mi"),
    (checks.quantities, GATEWAY, f"{POD}/containers/gateway/resources/limits", {}),
    (checks.names, GATEWAY, f"{POD}/containers/gateway/envFrom/0/configMapRef/name", "none"),
    (checks.names, VLLM, f"{POD}/volumes/shm/name", "none"),
    (checks.names, VLLM, f"{POD}/volumes/data/persistentVolumeClaim/claimName", "none"),
    (checks.names, VLLM, f"{POD}/enableServiceLinks", True),
    (checks.names, "ScaledObject/model-server", "spec/scaleTargetRef/name", "none"),
    (checks.names, "Service/model-server", "metadata/name", "vllm"),
    (checks.selectors, "Service/model-server", "spec/selector/more", "none"),
    (checks.selectors, VLLM, "spec/selector/matchLabels/more", "none"),
    (checks.selectors, "ServiceMonitor/model-server", "spec/selector/matchLabels/more", "none"),
    (checks.selectors, "NetworkPolicy/model-server", "spec/podSelector/matchLabels/more", "none"),
    (checks.selectors, "PodDisruptionBudget/vllm-gateway", "spec/selector/matchLabels/more", "none"),
    (checks.ports, GATEWAY, f"{POD}/containers/gateway/livenessProbe/httpGet/port", 9000),
    (checks.ports, "Service/vllm-gateway", "spec/ports/http/targetPort", "web"),
    (checks.ports, "Service/model-server", "spec/ports/http/port", 8000),
    (checks.ports, "ServiceMonitor/vllm-gateway", "spec/endpoints/0/port", "web"),
    (checks.upstreams, "Service/model-server", "spec/publishNotReadyAddresses", True),
    (checks.upstreams, "Service/model-server", "spec/clusterIP", ""),
    (checks.endings, GATEWAY, f"{POD}/terminationGracePeriodSeconds", 130),
    (checks.endings, VLLM, f"{POD}/terminationGracePeriodSeconds", 140),
    (checks.endings, VLLM, f"{POD}/containers/vllm/lifecycle/preStop/sleep/seconds", 5),
    (checks.volumes, "PersistentVolumeClaim/model-cache", "spec/accessModes", ["ReadWriteOnce"]),
    (checks.restricted, VLLM, f"{POD}/hostNetwork", True),
    (checks.restricted, VLLM, f"{POD}/containers/vllm/securityContext/privileged", True),
    (checks.restricted, VLLM, f"{POD}/containers/vllm/securityContext/capabilities/add", ["SYS_NICE"]),
    (checks.restricted, VLLM, f"{POD}/volumes/shm", {"name": "shm", "hostPath": {"path": "/dev/shm"}}),
    (checks.restricted, VLLM, f"{POD}/containers/vllm/ports/http/hostPort", 8008),
    (checks.restricted, VLLM, f"{POD}/securityContext/seLinuxOptions", {"type": "spc_t"}),
    (checks.restricted, VLLM, f"{POD}/securityContext/sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
    (checks.restricted, VLLM, f"{POD}/initContainers/settings/securityContext/allowPrivilegeEscalation", True),
    (checks.restricted, VLLM, f"{POD}/securityContext/runAsUser", 0),
    (checks.restricted, VLLM, f"{POD}/securityContext/seccompProfile/type", "Unconfined"),
    (checks.restricted, VLLM, f"{POD}/automountServiceAccountToken", True),
]


def put(one: Object, path: str, value: object) -> None:
    """Steps of the path are keys, places in a list, or names of what is in one."""
    inner: Any = one
    *steps, last = path.split("/")
    for step in steps:
        inner = inner[place(inner, step)]
    inner[place(inner, last)] = value


def place(inner: Any, step: str) -> int | str:
    if isinstance(inner, dict):
        return step
    return int(step) if step.isdecimal() else [one["name"] for one in inner].index(step)


@pytest.mark.parametrize(("check", "of", "path", "value"), WRONG, ids=[path for _, _, path, _ in WRONG])
def test_the_checks_find_what_is_wrong(renderings: Renderings, check: Check, of: str, path: str, value: object) -> None:
    objects = copy.deepcopy(renderings["everything"])
    put(named(objects, *of.split("/")), path, value)
    assert len(list(check(objects))) >= 1


def test_a_group_without_its_accelerators_or_its_worker_in_time_is_found(renderings: Renderings) -> None:
    objects = copy.deepcopy(renderings["overlays/multi-node"])
    group = named(objects, "LeaderWorkerSet", "model-server")["spec"]["leaderWorkerTemplate"]
    group["size"] = 4
    assert len(list(checks.accelerators(objects))) == 2
    group["workerTemplate"]["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] = 15
    assert list(checks.endings(objects)) == ["model-server's workerTemplate: its answers are cut off"]


def test_two_pods_with_a_volume_of_one_node_are_found(renderings: Renderings) -> None:
    objects = copy.deepcopy(renderings["components/vllm"])
    named(objects, "Deployment", "model-server")["spec"]["replicas"] = 2
    assert list(checks.volumes(objects)) == ["model-server: 2 pods have model-cache, which is of one node"]


def test_the_files_are_few_and_plain() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(len(file.read_text().splitlines()) for file in files if file.parent.name == "base") <= 250
    for file in files:
        # But for what Prometheus fills in by itself, when it raises an alert.
        assert "{{" not in re.sub(r"\{\{ \$(labels|value)\b", "", file.read_text()), file
        assert "namespace:" not in file.read_text(), file
        assert "kind: Secret" not in file.read_text(), file


@pytest.mark.parametrize("name", NAMES)
def test_the_gateways_settings_are_some(renderings: Renderings, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the gateway itself, which stops at one that it does not know, or a value that is none."""
    container = container_of(renderings[name], "vllm-gateway")
    monkeypatch.setattr(os, "environ", settings(renderings[name], container) | KEYS)
    found = build(Settings, None)
    assert differing(Settings, None) == []
    named_ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert named_ports == {"http": found.port, "metrics": found.metrics_port}
    assert found.upstream_api_key is not None
    assert found.upstream_api_key.get_secret_value() == "key"


@pytest.mark.parametrize("name", NAMES)
def test_the_gateway_is_asked_whether_it_lives_and_whether_it_serves(renderings: Renderings, name: str) -> None:
    container = container_of(renderings[name], "vllm-gateway")
    tls = "GATEWAY_TLS_CERT_FILE" in settings(renderings[name], container)
    asked = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert [found["path"] for found in asked.values()] == ["/health", "/health", "/v1/health_check"]
    assert [found.get("scheme", "HTTP") for found in asked.values()] == ["HTTPS" if tls else "HTTP"] * 3
    for mount in container["volumeMounts"]:
        assert mount.get("readOnly") or mount["mountPath"] == "/tmp"
    for file in re.findall(r"'(/run/[^']+)'", str(settings(renderings[name], container))):
        assert str(Path(file).parent) in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_the_gateways_memory_is_that_of_what_was_measured(renderings: Renderings) -> None:
    """At rest, for every stream that there may be, and half of the limit for what is held of bodies."""
    table = (ROOT / "bench" / "results" / "README.md").read_text()
    (rest, stream) = (
        float(re.findall(rf"^\| {row} \| ([\d.]+) \|", table, re.MULTILINE)[0]) * unit
        for row, unit in (("memory idle, MB", 1e6), ("memory per open stream, KB", 1e3))
    )
    resources = container_of(renderings["base"], "vllm-gateway")["resources"]
    streams = Settings.model_fields["max_in_flight"].default * stream
    assert checks.quantity(resources["requests"]["memory"]) >= rest + streams
    assert checks.quantity(resources["limits"]["memory"]) / 2 >= rest + streams
    assert "cpu" not in resources["limits"]


def started(pod: Object, objects: list[Object], folder: Path, **environ: str) -> str:
    """vLLM's command line, as the pod's own commands make it, by this package and a vLLM that tells."""
    (before,), (container,) = pod["spec"]["initContainers"], pod["spec"]["containers"]
    where = folder / "settings"
    where.mkdir(exist_ok=True)
    # Not its own: as a volume is, whose mode and times are not its user's to change.
    code = before["args"][0].replace("/opt/settings", str(where))
    assert before["command"] == ["python", "-c"]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    vllm = folder / "vllm"
    vllm.write_text('#!/bin/sh\necho "$@"\n')
    vllm.chmod(0o755)
    python = shutil.which("python3", path=os.defpath) or sys.executable
    command = [python, *(word.replace("/opt/settings", str(where)) for word in container["command"][1:])]
    found = settings(objects, container) | KEYS
    for name, value in found.items():
        found[name] = re.sub(r"\$\((\w+)\)", lambda match: environ[match[1]], value)
    found["PATH"] = f"{folder}:{os.defpath}"
    done = subprocess.run(command, env=found, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["cpu", "cuda", "hpu"])
def test_what_a_pod_starts_vllm_with(renderings: Renderings, name: str, tmp_path: Path) -> None:
    objects = renderings[f"overlays/{name}"]
    line = started(pod_of(objects, "model-server"), objects, tmp_path)
    block = "--block-size 128 " if name == "hpu" else ""
    assert line == (
        "serve Qwen/Qwen2.5-0.5B-Instruct --host 0.0.0.0 --port 8008 --dtype bfloat16 --max-model-len 4096 "
        f"--max-num-seqs 64 {block}--tensor-parallel-size 1 --pipeline-parallel-size 1 --shutdown-timeout 120"
    )


def test_what_the_nodes_of_a_group_start_vllm_with(renderings: Renderings, tmp_path: Path) -> None:
    objects = renderings["overlays/multi-node"]
    group = named(objects, "LeaderWorkerSet", "model-server")["spec"]["leaderWorkerTemplate"]
    lines = [
        started(
            group[part],
            objects,
            tmp_path,
            LWS_GROUP_SIZE=str(group["size"]),
            LWS_WORKER_INDEX=str(rank),
            LWS_LEADER_ADDRESS="model-server-0.model-server.default",
        )
        for rank, part in enumerate(("leaderTemplate", "workerTemplate"))
    ]
    for rank, line in enumerate(lines):
        assert (
            "--tensor-parallel-size 8 --pipeline-parallel-size 2 --distributed-executor-backend mp --nnodes 2 "
            f"--node-rank {rank} --master-addr model-server-0.model-server.default --shutdown-timeout 120"
        ) in line
        assert line.endswith("--headless") == (rank > 0)
    service = named(objects, "Service", "model-server")
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    peers = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "model-server"}}}]
    policy = named(objects, "NetworkPolicy", "model-server")["spec"]
    assert {"from": peers} in policy["ingress"]
    assert {"to": peers} in policy["egress"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_vllm_has_what_it_needs(renderings: Renderings, name: str) -> None:
    pods = [pod for at, pod in templates(renderings[f"overlays/{name}"]) if at.startswith("model-server")]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        mounts = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        shm = checks.quantity(mounts["/dev/shm"]["emptyDir"]["sizeLimit"])
        assert shm <= checks.quantity(container["resources"]["limits"]["memory"]) / 4
        assert mounts["/data"]["persistentVolumeClaim"]["claimName"] == "model-cache"
        assert settings(renderings[f"overlays/{name}"], container)["HF_HOME"] == "/data"
        secrets = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"] if "valueFrom" in one}
        assert secrets["HF_TOKEN"]["optional"] is True
        # No vLLM that is open.
        assert "optional" not in secrets["LLM_VLLM_API_KEY"]
    for probe in [pods[0]["spec"]["containers"][0]["startupProbe"]]:
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


@pytest.mark.parametrize("name", ["cpu", "cuda", "hpu"])
def test_vllms_image_is_that_of_compose(renderings: Renderings, name: str) -> None:
    image = container_of(renderings[f"overlays/{name}"], "model-server")["image"]
    device = (ROOT / "docker" / name / "device.yaml").read_text()
    assert f"${{LLM_VLLM_IMAGE:-{image}}}" in device


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_setting_of_vllm_is_one_of_the_device(renderings: Renderings, name: str) -> None:
    device = "cuda" if name == "multi-node" else name
    keys = set(re.findall(r"^#?([A-Z]\w+)=", (ROOT / "docker" / device / ".env").read_text(), re.MULTILINE))
    stacks = (ROOT / "docker" / device / "device.yaml").read_text() + (ROOT / "compose/docker-compose.yaml").read_text()
    (data,) = [
        one["data"]
        for one in of_kind(renderings[f"overlays/{name}"], "ConfigMap")
        if one["metadata"]["name"].startswith("model-server")
    ]
    cpus_own = {"VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"}
    assert {key for key in data.keys() - keys - cpus_own if f"{key}: " not in stacks} == set()


def test_vllm_is_reached_by_the_gateway_alone(renderings: Renderings) -> None:
    for name in OVERLAYS:
        policy = named(renderings[f"overlays/{name}"], "NetworkPolicy", "model-server")["spec"]
        peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
        found = {peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"] for peer in peers}
        assert found == {"vllm-gateway"} | ({"model-server"} if name == "multi-node" else set())
        assert all(peer.keys() == {"podSelector"} for peer in peers)
        assert policy["policyTypes"] == ["Ingress", "Egress"]


def test_the_dashboard_is_that_of_compose(renderings: Renderings) -> None:
    (found,) = [
        one
        for one in of_kind(renderings["components/monitoring"], "ConfigMap")
        if "dashboard" in one["metadata"]["name"]
    ]
    file = ROOT / "compose" / "monitoring" / "grafana" / "dashboards" / "vllm-gateway.json"
    assert json.loads(found["data"]["vllm-gateway.json"]) == json.loads(file.read_text())
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}


def test_figures_are_of_the_jobs_that_dashboard_and_alerts_name(renderings: Renderings) -> None:
    objects = renderings["components/monitoring"]
    jobs = set()
    for monitor in of_kind(objects, "ServiceMonitor"):
        label, wanted = monitor["spec"]["jobLabel"], monitor["spec"]["selector"]["matchLabels"].items()
        jobs |= {
            one["metadata"]["labels"][label]
            for one in of_kind(objects, "Service")
            if wanted <= one["metadata"]["labels"].items()
        }
    texts = "".join(file.read_text() for file in (ROOT / "compose" / "monitoring").rglob("*") if file.is_file())
    assert jobs == set(re.findall(r'job=\\?"(\w+)', texts)) == {"gateway", "vllm"}
    tls = named(renderings["everything"], "ServiceMonitor", "vllm-gateway")["spec"]["endpoints"][0]
    assert tls["scheme"] == "https"


def test_the_alerts_are_those_of_compose(renderings: Renderings) -> None:
    found = named(renderings["components/monitoring"], "PrometheusRule", "vllm-gateway")
    assert found["spec"] == yaml.safe_load((ROOT / "compose" / "monitoring" / "alerts.yaml").read_text())


def test_vllm_is_scaled_by_what_the_gateways_have_of_its_model(renderings: Renderings) -> None:
    objects = renderings["components/autoscaling"]
    container = container_of(objects, "model-server")
    found = settings(objects, container)
    (trigger,) = named(objects, "ScaledObject", "model-server")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    promql_parser.parse(query)
    model = found.get("SERVED_MODEL_NAME") or found["LLM_VLLM_MODEL_NAME"]
    figures = re.findall(r'(gateway_\w+)\{model="([^"]*)"\}', query)
    assert figures == [("gateway_model_in_flight", model)]
    # Whose figures are looked for in what the gateway tells (tests/heavy/compose).
    dashboard = (ROOT / "compose" / "monitoring" / "grafana" / "dashboards" / "vllm-gateway.json").read_text()
    assert all(f'"{name}"' in dashboard for name, _ in figures)
    assert int(trigger["metadata"]["threshold"]) < int(found["VLLM_MAX_NUM_SEQS"])
    for one in of_kind(objects, "ScaledObject"):
        assert one["spec"]["minReplicaCount"] >= 1
    for one in of_kind(objects, "Deployment"):
        assert "replicas" not in one["spec"]


def examples() -> dict[str, str]:
    """The kustomizations of the document, by the paths that they say to put them at."""
    found = re.findall(r"^```yaml\n# (\S+/kustomization\.yaml)[^\n]*\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    return dict(found)


def of_document(path: str, folder: Path) -> list[Object]:
    """What one of them makes, with all of them where they say, as one names the folder of another."""
    for other, text in examples().items():
        (folder / other).parent.mkdir()
        relative = os.path.relpath(ROOT, (folder / other).parent)
        (folder / other).write_text(text.replace("../vllm-gateway/", f"{relative}/"))
    return kustomize((folder / path).parent)


@pytest.mark.parametrize("path", examples())
def test_the_documents_kustomizations_are_rendered(path: str, tmp_path: Path) -> None:
    objects = of_document(path, tmp_path)
    for check in checks.ALL:
        assert list(check(objects)) == [], check.__name__


def test_two_models_do_not_have_each_others_pods(tmp_path: Path) -> None:
    objects = of_document("two-models/kustomization.yaml", tmp_path)
    pods = dict(templates(objects))
    for service in [one for one in of_kind(objects, "Service") if one["spec"].get("clusterIP") == "None"]:
        selector = service["spec"]["selector"].items()
        assert [name for name, pod in pods.items() if selector <= pod["metadata"]["labels"].items()] == [
            service["metadata"]["name"]
        ]


def test_the_document_says_how_each_secret_is_made(renderings: Renderings) -> None:
    used = {name for name in checks.SECRETS if name in str(renderings)}
    assert used == checks.SECRETS
    for name in used:
        assert re.search(rf"kubectl create secret \w+ {name}\b", DOCUMENT), name


def test_the_environment_that_vllm_gets_has_no_name_that_it_warns_of(renderings: Renderings) -> None:
    for name in OVERLAYS:
        for at, pod in templates(renderings[f"overlays/{name}"]):
            if at.startswith("model-server"):
                container = containers(pod)[-1]
                given = settings(renderings[f"overlays/{name}"], container)
                left = {key for key in vllm_args.vllm_environment(given) if key.startswith("VLLM_")}
                assert left <= {
                    "VLLM_CPU_KVCACHE_SPACE",
                    "VLLM_CPU_OMP_THREADS_BIND",
                    "VLLM_NO_USAGE_STATS",
                    "VLLM_SKIP_WARMUP",
                }
