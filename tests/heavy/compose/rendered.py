"""What Docker Compose makes of the files and the settings; needs its command, but no engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

from gateway.config.secret_files import NAMES as SECRETS
from gateway.config.settings import Settings, names_of
from tests.support.paths import ROOT

DEVICES = sorted(file.parent.name for file in ROOT.glob("docker/*/docker-compose.yaml"))
# What people type, by the folder that they do it in.
COMMANDS = {
    ".": ["--env-file", "docker/{device}/.env"],
    "docker/{device}": ["--env-file=.env", "-f", "docker-compose.yaml"],
}
# Those that have a default in the stack itself.
STACKS_OWN = {
    "HABANA_VISIBLE_DEVICES",
    "OMPI_MCA_btl_vader_single_copy_mechanism",
    "PT_HPU_ENABLE_LAZY_COLLECTIVES",
}
MODEL_SERVER, GATEWAY = "llm-vllm-model-server", "llm-vllm-microservice"


def environment(**more: str) -> dict[str, str]:
    """Without what this machine happens to have set."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **more}


def rendered(folder: Path, *options: str, **environ: str) -> dict[str, Any]:
    command = ["docker", "compose", *options, "config", "--format", "json"]
    done = subprocess.run(command, cwd=folder, env=environment(**environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def stack(device: str, **environ: str) -> dict[str, Any]:
    return rendered(ROOT, "--env-file", f"docker/{device}/.env", **environ)


def everything(device: str, **environ: str) -> dict[str, Any]:
    """With the services that `up` leaves out, too."""
    return rendered(ROOT, "--env-file", f"docker/{device}/.env", "--profile", "*", **environ)


def keys(device: str) -> dict[str, str | None]:
    """Every key of a device's file with its default, those that are not set among them."""
    text = (ROOT / "docker" / device / ".env").read_text()
    found = dict(dotenv_values(ROOT / "docker" / device / ".env"))
    return {name: found.get(name) for name in re.findall(r"^#?([A-Z][A-Z0-9_]+)=", text, re.MULTILINE)}


@pytest.mark.parametrize("device", DEVICES)
def test_every_command_gives_the_same_stack(device: str, tmp_path: Path) -> None:
    stacks = [
        rendered(ROOT / folder.format(device=device), *(option.format(device=device) for option in options))
        for folder, options in COMMANDS.items()
    ]
    assert stacks[0] == stacks[1]
    assert stacks[0]["name"] == "vllm-gateway"
    # A copy of the file at the top, as the documentation has it; not in this checkout, where there may be one.
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*_cache", ".venv", ".git", "data"))
    shutil.copy(ROOT / "docker" / device / ".env", copy / ".env")
    found = rendered(copy, "--env-file", ".env")
    assert json.loads(json.dumps(found).replace(str(copy), str(ROOT))) == stacks[0]


# Which services use a key, by how it begins; all others are the model server's.
USED_BY = {
    "GATEWAY_|LLM_USVC_|OPEA_|OTEL_|LLM_VLLM_(TOKEN_URL|CLIENT_)": {GATEWAY},
    "LLM_VLLM_(MEMORY|PIDS)": {MODEL_SERVER, "quantize"},
    "LLM_NOFILE": {MODEL_SERVER, GATEWAY},
    "FP8_|BATCH_SIZE|VLLM_GAUDI_SOURCE": {"quantize"},
    "PROMETHEUS_": {"prometheus"},
    "GRAFANA_": {"grafana"},
    "LLM_VLLM_API_KEY": {GATEWAY, MODEL_SERVER},
    "LLM_VLLM_MODEL_|VLLM_APP_CONFIG|HF_|HUGGING_FACE_HUB_TOKEN|VLLM_TP_SIZE": {MODEL_SERVER, "quantize"},
}


@pytest.mark.parametrize("device", DEVICES)
def test_every_key_of_the_file_reaches_what_uses_it(device: str) -> None:
    for at, name in enumerate(sorted(keys(device).keys() - {"LLM_DEVICE"})):
        value = f"47{at:02}" if re.search("PORT|UID|GID|MEMORY|PIDS|NOFILE", name) else f"set-{name.lower()}"
        value = f"127.0.0.{at + 1}" if "HOST" in name else f"{at + 1}s" if "GRACE" in name else value
        services = everything(device, **{name: value})["services"]
        expected = next((found for pattern, found in USED_BY.items() if re.match(pattern, name)), {MODEL_SERVER})
        assert expected <= {one for one, service in services.items() if value in json.dumps(service)}, name


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_copy_of_the_file_leaves_out_is_unset(device: str, tmp_path: Path) -> None:
    copy = tmp_path / ".env"
    copy.write_text(f"LLM_DEVICE={device}\n")
    environ = rendered(ROOT, "--env-file", str(copy))["services"][MODEL_SERVER]["environment"]
    assert {name for name in keys(device) if environ.get(name)} <= {"LLM_DEVICE", *STACKS_OWN}


@pytest.mark.parametrize("device", DEVICES)
def test_every_key_is_explained_and_no_secret_is_set(device: str) -> None:
    lines = (ROOT / "docker" / device / ".env").read_text().splitlines()
    for above, line in pairwise(lines):
        if re.match(r"#?[A-Z_]+=", line):
            assert above, f"nothing above {line} says what it is"
    for name, value in keys(device).items():
        if re.search("TOKEN|KEY$", name):
            assert value is None, name


@pytest.mark.parametrize("device", DEVICES)
def test_every_setting_of_the_gateway_can_be_given(device: str) -> None:
    names = {name for field in Settings.model_fields for name in names_of(field)}
    # These are the stack's own: the ports inside are fixed, and published as the file says.
    names -= {"GATEWAY_HOST", "GATEWAY_PORT", "LLM_USVC_PORT", "LLM_MODEL_SERVER_ENDPOINT"}
    names |= {f"{name}_FILE" for name in SECRETS if name in names}
    given = set(stack(device)["services"][GATEWAY]["environment"])
    assert {name for name in given if not name.startswith("OTEL_")} == names


@pytest.mark.parametrize("device", DEVICES)
def test_the_image_has_the_extras_that_are_asked_for(device: str) -> None:
    assert stack(device)["services"][GATEWAY]["build"]["args"]["EXTRAS"] == ""
    assert stack(device, LLM_USVC_EXTRAS="otel")["services"][GATEWAY]["build"]["args"]["EXTRAS"] == "otel"


@pytest.mark.parametrize("device", DEVICES)
def test_vllm_is_for_this_machine_alone_and_the_gateway_for_all(device: str) -> None:
    services = stack(device)["services"]
    (vllm,), (ours, metrics) = services[MODEL_SERVER]["ports"], services[GATEWAY]["ports"]
    assert (vllm["host_ip"], vllm["published"]) == ("127.0.0.1", "8008")
    assert (ours["host_ip"], ours["published"]) == ("0.0.0.0", "9000")
    assert (metrics["host_ip"], metrics["published"]) == ("127.0.0.1", "9464")


@pytest.mark.parametrize("device", DEVICES)
def test_the_gateway_may_do_no_more_than_it_must(device: str) -> None:
    ours = stack(device)["services"][GATEWAY]
    assert ours["read_only"] is True
    assert ours["tmpfs"] == ["/tmp"]
    mounted = {volume["target"]: (volume["source"], volume["read_only"]) for volume in ours["volumes"]}
    files = str(ROOT / "docker" / device / "files")
    assert mounted == {"/run/vllm-key": ("/dev/null", True), "/run/files": (files, True)}


@pytest.mark.parametrize("device", DEVICES)
def test_every_container_is_bounded(device: str) -> None:
    for name, service in everything(device)["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["ulimits"] == {"nofile": 16384}, name
        assert int(service["mem_limit"]) > 0, name
        assert service["pids_limit"] > 0, name


def test_the_bounds_of_the_two_are_the_operators() -> None:
    given = {"LLM_USVC_MEMORY": "1g", "LLM_VLLM_MEMORY": "0", "LLM_VLLM_PIDS": "900", "GATEWAY_STOP_GRACE": "1m30s"}
    services = stack("cpu", **given)["services"]
    assert services[GATEWAY]["mem_limit"] == str(2**30)
    assert services[GATEWAY]["stop_grace_period"] == "1m30s" == services[GATEWAY]["environment"]["GATEWAY_STOP_GRACE"]
    assert services[MODEL_SERVER].get("mem_limit", "0") == "0"
    assert services[MODEL_SERVER]["pids_limit"] == 900


def test_a_model_server_on_the_cpu_writes_to_its_data_alone() -> None:
    vllm = stack("cpu")["services"][MODEL_SERVER]
    assert vllm["read_only"] is True
    assert vllm["tmpfs"] == ["/tmp:exec,mode=1777"]
    assert [volume["target"] for volume in vllm["volumes"] if not volume.get("read_only")] == ["/data"]


@pytest.mark.parametrize(
    ("name", "target", "services"),
    [
        ("HF_TOKEN_FILE", "/run/hub-token", {MODEL_SERVER, "quantize"}),
        ("HUGGING_FACE_HUB_TOKEN_FILE", "/run/hub-token", {MODEL_SERVER, "quantize"}),
        ("LLM_VLLM_API_KEY_FILE", "/run/vllm-key", {MODEL_SERVER, GATEWAY}),
    ],
)
def test_a_secret_in_a_file_stands_in_no_environment(name: str, target: str, services: set[str]) -> None:
    found = everything("cpu", **{name: "./secret"})["services"]
    source = str(ROOT / "docker/cpu/secret")
    assert {one for one, service in found.items() if source in json.dumps(service)} == services
    for one in services:
        assert found[one]["environment"][name] == target
        assert {volume["target"]: volume["source"] for volume in found[one]["volumes"]}[target] == source


@pytest.mark.parametrize(
    "name",
    [
        "GATEWAY_API_KEYS_FILE",
        "GATEWAY_UPSTREAM_CA_FILE",
        "GATEWAY_TLS_CERT_FILE",
        "GATEWAY_TLS_KEY_FILE",
        "GATEWAY_UPSTREAM_API_KEY_FILE",
        "GATEWAY_UPSTREAM_CLIENT_SECRET_FILE",
        "LLM_VLLM_CLIENT_SECRET_FILE",
    ],
)
def test_a_file_for_the_gateway_lies_in_a_folder_that_is_the_gateways_alone(name: str) -> None:
    services = everything("cpu", LLM_USVC_FILES="/etc/letsencrypt", **{name: "live/file"})["services"]
    mounted = {volume["target"]: volume["source"] for volume in services[GATEWAY]["volumes"]}
    assert mounted["/run/files"] == "/etc/letsencrypt"
    assert services[GATEWAY]["environment"][name] == "/run/files/live/file"
    told = {one for one, service in services.items() if re.search("letsencrypt|live/file", json.dumps(service))}
    assert told == {GATEWAY}


@pytest.mark.parametrize("device", DEVICES)
def test_no_container_fills_the_disk_with_its_log(device: str) -> None:
    for name, service in everything(device)["services"].items():
        assert service["logging"] == {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}}, name


@pytest.mark.parametrize("device", DEVICES)
def test_the_tokens_reach_the_model_server_alone(device: str) -> None:
    services = everything(device, HF_TOKEN="hf_secret", HTTP_PROXY="http://proxy:1")["services"]
    told = {name for name, service in services.items() if "hf_secret" in json.dumps(service)}
    assert told == {MODEL_SERVER, "quantize"}
    # The proxy also where images are built, but not where the gateway runs.
    told = {name for name, service in services.items() if "proxy:1" in json.dumps(service.get("environment"))}
    assert told == {MODEL_SERVER, "quantize"}
    for name in (GATEWAY, "quantize"):
        assert services[name]["build"]["args"]["HTTP_PROXY"] == "http://proxy:1"


@pytest.mark.parametrize("device", DEVICES)
def test_up_starts_neither_what_quantizes_nor_what_watches(device: str) -> None:
    assert set(stack(device)["services"]) == {MODEL_SERVER, GATEWAY, "llm-vllm-data"}
    assert set(everything(device)["services"]) - set(stack(device)["services"]) == {"quantize", "prometheus", "grafana"}


@pytest.mark.parametrize("device", DEVICES)
def test_what_quantizes_has_the_model_servers_image_device_and_data(device: str) -> None:
    services = everything(device, LLM_VLLM_IMAGE="registry/image:1", LLM_VLLM_DATA_DIR="/models")["services"]
    quantize, vllm = services["quantize"], services[MODEL_SERVER]
    assert quantize["build"]["args"]["LLM_VLLM_IMAGE"] == vllm["image"] == "registry/image:1"
    assert quantize["volumes"][0] == vllm["volumes"][0]
    assert quantize["volumes"][0]["source"] == "/models"
    for what in ("user", "runtime", "cap_add", "ipc", "deploy"):
        if device != "cpu" or what == "user":
            assert quantize.get(what) == vllm.get(what), what
    shared = set(quantize["environment"]) & set(vllm["environment"])
    assert {"LLM_DEVICE", "LLM_VLLM_MODEL_NAME", "VLLM_TP_SIZE", "HF_HOME", "HOME"} <= shared
    assert all(quantize["environment"][name] == vllm["environment"][name] for name in shared)
    assert not quantize.get("ports")
    assert not quantize.get("restart")


FP8 = ["-f", "docker/hpu/fp8/docker-compose.yaml", "--env-file", "docker/hpu/.env"]


def test_gaudis_calibration_is_the_stacks_own_alone() -> None:
    found = rendered(ROOT, *FP8)
    assert found["name"] == "vllm-gateway"
    assert set(found["services"]) == {"llm-vllm-data", "quantize"}
    expected = everything("hpu")["services"]["quantize"]
    assert expected.pop("profiles") == ["quantize"]
    assert found["services"]["quantize"] == expected
    assert found["services"]["quantize"]["runtime"] == "habana"
    folder = rendered(ROOT / "docker/hpu/fp8", "--env-file", "../.env")
    assert folder == found


def test_gaudis_calibration_takes_its_data_where_serving_does() -> None:
    given = {"HUGGINGFACE_HUB_CACHE": "models", "FP8_DATASET_PATH": "/data/open_orca.pkl", "VLLM_TP_SIZE": "8"}
    quantize = rendered(ROOT, *FP8, **given)["services"]["quantize"]
    vllm = stack("hpu", **given)["services"][MODEL_SERVER]
    assert quantize["volumes"][0]["source"] == str(ROOT / "docker/hpu/models") == vllm["volumes"][0]["source"]
    assert quantize["environment"]["FP8_DATASET_PATH"] == "/data/open_orca.pkl"
    assert quantize["environment"]["VLLM_TP_SIZE"] == "8"
    assert quantize["environment"]["HABANA_VISIBLE_DEVICES"] == "all"
    assert quantize["environment"]["PT_HPU_ENABLE_LAZY_COLLECTIVES"] == "true"
    assert quantize["cap_add"] == ["SYS_NICE"]


def test_gaudis_calibration_is_by_pinned_scripts_or_by_ones_own() -> None:
    def scripts(**environ: str) -> str:
        return str(rendered(ROOT, *FP8, **environ)["services"]["quantize"]["build"]["context"])

    assert re.fullmatch(r"https://github\.com/vllm-project/vllm-gaudi\.git#[0-9a-f]{40}", scripts())
    assert scripts(VLLM_GAUDI_SOURCE="/mine") == "/mine"


MONITORING = ROOT / "compose" / "monitoring"


def test_what_watches_is_for_this_machine_alone_and_may_do_no_more_than_it_must() -> None:
    services = everything("cpu")["services"]
    for name in ("prometheus", "grafana"):
        (port,) = services[name]["ports"]
        assert port["host_ip"] == "127.0.0.1"
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["profiles"] == ["monitoring"]
        for mounted in services[name]["volumes"]:
            assert mounted["target"] == "/data" or mounted["read_only"], mounted
            assert mounted["target"] == "/data" or Path(mounted["source"]).exists(), mounted
    assert f"{MONITORING}/grafana" == services["grafana"]["volumes"][0]["source"]


def test_prometheus_asks_where_the_stack_answers() -> None:
    text = (MONITORING / "prometheus.yaml").read_text()
    services = stack("cpu")["services"]
    asked = re.findall(r'targets: \["(.*):(\d+)"\]', text)
    assert {name: int(port) for name, port in asked} == {
        name: services[name]["ports"][-1]["target"] for name in (GATEWAY, MODEL_SERVER)
    }


NODES = {"VLLM_NNODES": "2", "VLLM_NODE_RANK": "0", "VLLM_MASTER_ADDR": "10.0.0.1"}


def on_several_machines(device: str, **environ: str) -> dict[str, Any]:
    options = ["-f", "compose.nodes.yaml", "--env-file", f"docker/{device}/.env"]
    return rendered(ROOT, *options, **(NODES | environ))


@pytest.mark.parametrize("device", DEVICES)
def test_a_stack_of_several_machines_is_the_stack_on_their_own_network(device: str) -> None:
    ours, alone = on_several_machines(device), stack(device, **NODES)
    assert ours["name"] == alone["name"]
    for name, service in alone["services"].items():
        found = ours["services"][name]
        changed = {key for key in service.keys() | found.keys() if service.get(key) != found.get(key)}
        assert changed <= {"network_mode", "networks", "ports", "entrypoint", "environment", "healthcheck"}, name
        assert name == "llm-vllm-data" or found["network_mode"] == "host"
        environ = found["environment"] if name != "llm-vllm-data" else {}
        alike = {key: value for key, value in service.get("environment", {}).items() if environ.get(key) == value}
        # What the gateway's own container has fixed is this machine's now.
        assert service.get("environment", {}).keys() - alike.keys() <= {"GATEWAY_UPSTREAMS", "GATEWAY_METRICS_PORT"}


def test_a_machine_of_several_shows_no_more_than_the_settings_say() -> None:
    services = on_several_machines("cuda", LLM_VLLM_PORT="8108", LLM_USVC_HOST="10.0.0.1", LLM_USVC_PORT="9100")
    vllm, ours = services["services"][MODEL_SERVER], services["services"][GATEWAY]
    assert vllm["entrypoint"][2:] == ["serve", "127.0.0.1", "8108"]
    assert vllm["healthcheck"]["test"][-2:] == ["healthy", "8108"]
    assert {name: vllm["environment"][name] for name in NODES} == NODES
    expected = {
        "GATEWAY_UPSTREAMS": "http://127.0.0.1:8108",
        "GATEWAY_HOST": "10.0.0.1",
        "GATEWAY_PORT": "9100",
        "GATEWAY_METRICS_PORT": "",
    }
    assert {name: ours["environment"][name] for name in expected} == expected


@pytest.mark.parametrize("missing", NODES)
def test_several_machines_without_a_number_a_rank_or_an_address_are_refused(missing: str) -> None:
    given = {name: value for name, value in NODES.items() if name != missing}
    command = ["docker", "compose", "-f", "compose.nodes.yaml", "--env-file", "docker/cuda/.env", "config"]
    done = subprocess.run(command, cwd=ROOT, env=environment(**given), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"required variable {missing} is missing a value: set it to " in done.stderr
