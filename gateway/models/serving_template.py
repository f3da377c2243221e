"""Writes the document by which SAP AI Core starts an image with vLLM, the gateway and a model."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from gateway.models import ModelError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_ARTIFACT = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_IMAGE = re.compile(r"[a-z0-9][\w.:/@-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)
_PLAN = re.compile(r"[a-z0-9][a-z0-9.-]*", re.ASCII)
# The folder where KServe puts the artifact that STORAGE_URI names.
_MODELS = "/mnt/models"
# Placeholders for numbers, which must stand unquoted; the value of an environment variable must stay quoted text.
_NUMBERS = re.compile(r"((?:containerPort|port|minReplicas|maxReplicas): )'(\{\{[\w.]+\}\})'")
_LONGEST_NAME = 63


class Template(NamedTuple):
    """The options of `serving-template`; without a revision it is the artifact's own."""

    model: str
    image: str
    resource_plan: str
    revision: str | None
    artifact: str | None


class _Block(str):
    """Text that YAML writes as a block, line by line."""

    __slots__ = ()


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types: its class is Any.
    """Writes lists indented below their keys, as in Kubernetes' own documents."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_representer(
    _Block, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")
)


def render(asked: Template) -> str:
    """The whole document. Raises ModelError."""
    _check(asked)
    name = asked.model.rpartition("/")[2]
    artifact = asked.artifact or re.sub(r"\W", "_", name, flags=re.ASCII)
    own = _dns_name(asked.model)
    document = {
        "apiVersion": "ai.sap.com/v1alpha1",
        "kind": "ServingTemplate",
        "metadata": {
            "name": own,
            "annotations": {
                "scenarios.ai.sap.com/name": own,
                "scenarios.ai.sap.com/description": f"{asked.model} by vLLM, with the gateway in front of it",
                "executables.ai.sap.com/name": own,
                "executables.ai.sap.com/description": f"{asked.model} by vLLM, with the gateway in front of it",
                f"artifacts.ai.sap.com/{artifact}.kind": "model",
            },
            "labels": {"scenarios.ai.sap.com/id": own, "ai.sap.com/version": "1.0.0"},
        },
        "spec": {
            "inputs": {"artifacts": [{"name": artifact}], "parameters": _parameters(asked)},
            "template": {
                "apiVersion": "serving.kserve.io/v1beta1",
                "metadata": {
                    "annotations": _Block(_dumped(_annotations())),
                    "labels": _Block(_dumped({"ai.sap.com/resourcePlan": _parameter("resourcePlan")})),
                },
                "spec": _Block(_dumped({"predictor": _predictor(artifact)})),
            },
        },
    }
    return _dumped(document)


def _check(asked: Template) -> None:
    if not _NAME.fullmatch(asked.model):
        raise ModelError(f"Unknown model {asked.model!r}: a hub's name is ORG/NAME.")
    if not _IMAGE.fullmatch(asked.image):
        raise ModelError(f"--image must be as registry.example.com/aicore-vllm:v011226-01, but it is {asked.image!r}.")
    if not _PLAN.fullmatch(asked.resource_plan):
        raise ModelError(f"--resource-plan must be the name of a plan, as infer2.l, but it is {asked.resource_plan!r}.")
    if asked.revision is not None and not _REVISION.fullmatch(asked.revision):
        raise ModelError(f"--revision must be a commit, a branch or a tag, but it is {asked.revision!r}.")
    if asked.artifact is not None and not _ARTIFACT.fullmatch(asked.artifact):
        raise ModelError(f"--artifact must be of letters, digits and _ alone, but it is {asked.artifact!r}.")


def _dns_name(model: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", model.lower())[:_LONGEST_NAME].strip("-")


def _parameters(asked: Template) -> list[dict[str, str]]:
    given = {
        "image": (asked.image, "vLLM and the gateway."),
        "imagePullSecret": ("docker-registry", "The registry's secret, as it is named in AI Core."),
        "resourcePlan": (asked.resource_plan, "What it runs on."),
        "gpu": ("1", "GPUs of the plan that the model is split over."),
        "minReplicas": ("1", "0 stops it where nobody asks."),
        "maxReplicas": ("1", "Most of them at a time."),
        "portNumber": ("9000", "The gateway's port."),
        "modelName": (asked.model, "What clients ask for as `model`."),
        "revision": (asked.revision or "", "A commit of the artifact; empty for the one that it is of."),
        "additionalArguments": ("", "More of vLLM's options, as in a shell, without a single quote."),
    }
    return [
        {"name": name, "type": "string", "default": default, "description": meaning}
        for name, (default, meaning) in given.items()
    ]


def _parameter(name: str) -> str:
    return f"{{{{inputs.parameters.{name}}}}}"


def _annotations() -> dict[str, str]:
    """The rules for starting another replica: vLLM answers many calls at once, so a replica per call wastes GPUs."""
    return {
        "autoscaling.knative.dev/metric": "concurrency",
        "autoscaling.knative.dev/target": "64",
        "autoscaling.knative.dev/targetBurstCapacity": "-1",
        "autoscaling.knative.dev/window": "10m",
        "autoscaling.knative.dev/scaleToZeroPodRetentionPeriod": "10m",
    }


def _predictor(artifact: str) -> dict[str, Any]:
    environment = {
        "STORAGE_URI": f"{{{{inputs.artifacts.{artifact}}}}}",
        # The artifact in any form: a folder of files, a hub's cache, a tarball.
        "LLM_VLLM_MODEL_NAME": _MODELS,
        "LLM_VLLM_MODEL_REVISION": _parameter("revision"),
        "SERVED_MODEL_NAME": _parameter("modelName"),
        "VLLM_TP_SIZE": _parameter("gpu"),
        "EXTRA_ARGS": _parameter("additionalArguments"),
        # The gateway's port; without it the platform would call one port, and the gateway would listen on another.
        "PORT": _parameter("portNumber"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Writable folders: the model's folder is read-only, and the user has no home.
        "HF_HOME": "/tmp/hub",
        "HOME": "/tmp/home",
        "XDG_CACHE_HOME": "/tmp/cache",
    }
    container = {
        "name": "kserve-container",
        "image": _parameter("image"),
        "ports": [{"containerPort": _parameter("portNumber"), "protocol": "TCP"}],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        # Returns 200 as soon as the model answers.
        "readinessProbe": {"httpGet": {"path": "/v1/health_check", "port": _parameter("portNumber")}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "imagePullSecrets": [{"name": _parameter("imagePullSecret")}],
        "minReplicas": _parameter("minReplicas"),
        "maxReplicas": _parameter("maxReplicas"),
        "containers": [container],
        # The workers of several GPUs communicate through /dev/shm, and a container's default has only 64 MB.
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "10Gi"}}],
    }


def _dumped(value: object) -> str:
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)
    return _NUMBERS.sub(r"\1\2", str(text))
