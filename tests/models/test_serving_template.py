"""The document for SAP AI Core: what it says once its parameters are filled in, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from gateway.models import ModelError
from gateway.models.serving_template import Template, render

IMAGE = "docker.io/me/aicore-vllm:v011226-01"
PLACE = re.compile(r"\{\{inputs\.(parameters|artifacts)\.(\w+)\}\}")


def rendered(**given: Any) -> dict[str, Any]:
    asked = {
        "model": "org/My-Model.v2",
        "image": IMAGE,
        "resource_plan": "infer2.l",
        "revision": None,
        "artifact": None,
    }
    document = yaml.safe_load(render(Template(**{**asked, **given})))
    assert isinstance(document, dict)
    return document


def filled(document: dict[str, Any], **parameters: str) -> dict[str, Any]:
    """What the platform makes of it: the parts that are text, with the parameters and the artifact put in."""
    inputs = document["spec"]["inputs"]
    values = {("parameters", one["name"]): one["default"] for one in inputs["parameters"]}
    values |= {("artifacts", one["name"]): "s3://bucket/models" for one in inputs["artifacts"]}
    values |= {("parameters", name): value for name, value in parameters.items()}
    template = document["spec"]["template"]

    def put(text: str) -> Any:
        return yaml.safe_load(PLACE.sub(lambda found: values[found[1], found[2]], text))

    metadata = {name: put(text) for name, text in template["metadata"].items()}
    return {"metadata": metadata, "spec": put(template["spec"]), "apiVersion": template["apiVersion"]}


def container(found: dict[str, Any]) -> dict[str, Any]:
    (one,) = found["spec"]["predictor"]["containers"]
    assert isinstance(one, dict)
    return one


def test_it_is_the_platforms_kind() -> None:
    document = rendered()
    assert (document["apiVersion"], document["kind"]) == ("ai.sap.com/v1alpha1", "ServingTemplate")
    metadata = document["metadata"]
    assert metadata["name"] == "org-my-model-v2"
    for name in ("scenarios.ai.sap.com/name", "executables.ai.sap.com/name", "artifacts.ai.sap.com/My_Model_v2.kind"):
        assert metadata["annotations"][name]
    assert set(metadata["labels"]) == {"scenarios.ai.sap.com/id", "ai.sap.com/version"}
    assert all(isinstance(value, str) for value in metadata["labels"].values())
    assert document["spec"]["inputs"]["artifacts"] == [{"name": "My_Model_v2"}]
    for one in document["spec"]["inputs"]["parameters"]:
        assert one["type"] == "string"
        assert isinstance(one["default"], str)


def test_each_parameter_has_a_use_and_each_use_a_parameter() -> None:
    document = rendered()
    template = document["spec"]["template"]
    text = "".join([*template["metadata"].values(), template["spec"]])
    used = {name for kind, name in PLACE.findall(text) if kind == "parameters"}
    assert used == {one["name"] for one in document["spec"]["inputs"]["parameters"]}


@pytest.mark.parametrize("port", ["9000", "8080"])
def test_the_gateway_listens_on_the_port_that_the_platform_asks(port: str) -> None:
    one = container(filled(rendered(), portNumber=port))
    environment = {item["name"]: item["value"] for item in one["env"]}
    # A port is a number, and the value of a variable is text.
    assert one["ports"] == [{"containerPort": int(port), "protocol": "TCP"}]
    assert environment["PORT"] == port
    assert one["readinessProbe"] == {"httpGet": {"path": "/v1/health_check", "port": int(port)}}


def test_the_model_is_where_the_platform_puts_it() -> None:
    found = filled(rendered(revision="0123456"), gpu="4", additionalArguments="--max-model-len 32768")
    environment = {item["name"]: item["value"] for item in container(found)["env"]}
    assert environment["STORAGE_URI"] == "s3://bucket/models"
    assert environment["LLM_VLLM_MODEL_NAME"] == "/mnt/models"
    assert environment["SERVED_MODEL_NAME"] == "org/My-Model.v2"
    assert environment["LLM_VLLM_MODEL_REVISION"] == "0123456"
    assert environment["VLLM_TP_SIZE"] == "4"
    assert environment["EXTRA_ARGS"] == "--max-model-len 32768"
    assert all(isinstance(value, str) for value in environment.values())
    assert container(found)["image"] == IMAGE
    assert container(found)["name"] == "kserve-container"


def test_plan_and_artifact_are_the_ones_given() -> None:
    document = rendered(resource_plan="infer2.4xl", artifact="textmodel")
    assert filled(document)["metadata"]["labels"] == {"ai.sap.com/resourcePlan": "infer2.4xl"}
    assert document["spec"]["inputs"]["artifacts"] == [{"name": "textmodel"}]
    assert "{{inputs.artifacts.textmodel}}" in document["spec"]["template"]["spec"]
    assert all(isinstance(value, str) for value in filled(document)["metadata"]["annotations"].values())


def test_a_long_name_is_cut_to_what_the_platform_takes() -> None:
    name = rendered(model=f"{'org' * 20}/{'model' * 20}")["metadata"]["name"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"model": "model"}, "Unknown model 'model': a hub's name is ORG/NAME."),
        ({"model": "a/b: {{x}}"}, "Unknown model "),
        (
            {"image": "my image"},
            "--image must be as registry.example.com/aicore-vllm:v011226-01, but it is 'my image'.",
        ),
        ({"image": ""}, "--image must be as "),
        ({"image": "{{evil}}"}, "--image must be as "),
        ({"resource_plan": "Infer 2"}, "--resource-plan must be the name of a plan, as infer2.l, but it is 'Infer 2'."),
        ({"artifact": "text-model"}, "--artifact must be of letters, digits and _ alone, but it is 'text-model'."),
        ({"artifact": ""}, "--artifact must be of letters, digits and _ alone, but it is ''."),
        ({"artifact": "mödel"}, "--artifact must be of letters, digits and _ alone, but it is 'mödel'."),
        ({"revision": "a'b"}, '--revision must be a commit, a branch or a tag, but it is "a\'b".'),
        ({"revision": "{{x}}"}, "--revision must be a commit, a branch or a tag, but it is '{{x}}'."),
    ],
)
def test_what_the_platform_would_not_take_is_a_sentence(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(ModelError) as caught:
        rendered(**given)
    assert str(caught.value).startswith(sentence)
