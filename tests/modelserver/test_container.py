"""What runs in a model server's container: what it starts, with which words it says no, and how it calibrates."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import httpx
import pytest

from gateway.modelserver import container as entrypoint
from gateway.modelserver import vllm_args
from tests.models.test_hub_cache import GOOD, make
from tests.models.test_serving_template import filled, rendered
from tests.support.paths import ROOT
from tests.support.ports import free_port


class Container:
    """What is mounted into a model server's container, beside a vLLM that only says how it was started."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self._folder = folder
        self._program = folder / "gateway/modelserver/container.py"
        shutil.copytree(
            ROOT / "gateway", folder / "gateway", ignore=shutil.ignore_patterns("__pycache__", "*.lock", "*.so")
        )
        script = "import os, sys; print(os.environ.get('HF_TOKEN'), os.environ.get('VLLM_TP_SIZE'), *sys.argv)"
        (folder / "gateway/modelserver/scripts/quantize.py").write_text(script)
        vllm = folder / "vllm"
        # One more variable, if it is named.
        vllm.write_text('#!/bin/sh\necho $QUANT_CONFIG $HF_TOKEN ${SHOWN:+$(printenv "$SHOWN")} $*\n')
        vllm.chmod(0o755)

    def file(self, name: str) -> None:
        """One in the data folder."""
        (self.data / name).parent.mkdir(parents=True, exist_ok=True)
        (self.data / name).write_text("{}")

    def serve(self, *where: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """What came of starting it, with nothing but Python."""
        return self.run("serve", *where, **environ)

    def run(self, *what: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """What came of it."""
        process = self.start(*what, **environ)
        stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def start(self, *what: str, **environ: str) -> subprocess.Popen[str]:
        """It, as it runs."""
        command = [sys.executable, "-E", "-S", str(self._program), *what]
        given = {"PATH": f"{self._folder}:/usr/bin:/bin", "HF_HOME": str(self.data), **environ}
        return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def becomes(self, script: str) -> None:
        """What vLLM does from now on."""
        (self._folder / "vllm").write_text(f"#!/bin/sh\n{script}\n")


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


MODEL = {"LLM_VLLM_MODEL_NAME": "Org/Name"}
START = "serve Org/Name --host 0.0.0.0 --port 8008"
FP8 = {**MODEL, "IF_FP8_QUANTIZATION": "true"}


def test_a_container_starts_with_nothing_but_python(container: Container) -> None:
    done = container.serve(**MODEL, VLLM_DTYPE="auto", HF_TOKEN="token")
    assert done.stdout == f"token {START} --dtype auto\n"
    assert done.stderr == f"Starting: vllm {START} --dtype auto\n"


def test_a_container_on_its_machines_own_network_listens_where_it_is_told(container: Container) -> None:
    nodes = {"VLLM_NNODES": "2", "VLLM_NODE_RANK": "1", "VLLM_MASTER_ADDR": "10.0.0.1", "VLLM_TP_SIZE": "2"}
    done = container.serve("127.0.0.1", "8108", **MODEL, **nodes)
    options = "--tensor-parallel-size 2 --nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --headless"
    assert done.stdout == f"serve Org/Name --host 127.0.0.1 --port 8108 {options}\n"


def test_of_several_nodes_the_first_alone_is_asked_how_it_is(container: Container) -> None:
    port = str(free_port())
    assert container.run("healthy", port).returncode == 1
    assert container.run("healthy", port, VLLM_NODE_RANK="0").returncode == 1
    assert container.run("healthy", port, VLLM_NODE_RANK="1").returncode == 0


@pytest.mark.parametrize("path", ["models", "models/n", "models/n.tar"])
def test_a_hubs_cache_is_served_by_its_models_name(container: Container, tmp_path: Path, path: str) -> None:
    (tmp_path / "models").mkdir()
    tarball = make(tmp_path / "models" / "n.tar", GOOD)
    cache = tmp_path / "models" / "n"
    if path != "models/n.tar":
        with tarfile.open(tarball) as tar:
            tar.extractall(cache.parent, filter="data")
        tarball.unlink()
    done = container.serve(LLM_VLLM_MODEL_NAME=str(tmp_path / path), SHOWN="HF_HUB_CACHE")
    where, started = done.stdout.split(" ", 1)
    assert started == "serve org/name --host 0.0.0.0 --port 8008\n"
    if path == "models/n.tar":
        (cache,) = (container.data / "unpacked").glob("*/n")
    assert where == str(cache)


def test_the_template_of_ai_core_starts_it(container: Container, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    make(tmp_path / "models" / "n.tar", GOOD)
    (kserve,) = filled(rendered(), gpu="4")["spec"]["predictor"]["containers"]
    environ = {one["name"]: one["value"] for one in kserve["env"]}
    assert environ["LLM_VLLM_MODEL_NAME"] == "/mnt/models"
    # Folders of this machine in the place of the platform's.
    environ |= {"LLM_VLLM_MODEL_NAME": str(tmp_path / "models"), "HF_HOME": str(container.data)}
    done = container.serve(**environ)
    assert done.stdout.rstrip() == (
        "serve org/name --host 0.0.0.0 --port 8008 --served-model-name org/My-Model.v2 --tensor-parallel-size 4"
    )


def test_a_tarball_that_is_damaged_is_told(container: Container, tmp_path: Path) -> None:
    (tmp_path / "n.tar").write_bytes(b"x" * 10_000)
    done = container.serve(LLM_VLLM_MODEL_NAME=str(tmp_path / "n.tar"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path}/n.tar is no whole tarball" in done.stderr


def test_a_bucket_is_vllms_to_read(container: Container) -> None:
    done = container.serve(LLM_VLLM_MODEL_NAME="s3://bucket/models/name", AWS_ACCESS_KEY_ID="me", AWS_REGION="")
    assert done.stdout == "serve s3://bucket/models/name --host 0.0.0.0 --port 8008\n"


def test_a_secret_may_stand_in_a_file(container: Container, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("from-a-file\n")
    done = container.serve(**MODEL, HF_TOKEN_FILE=str(tmp_path / "token"))
    assert done.stdout == f"from-a-file {START}\n"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**MODEL, "HF_TOKEN_FILE": "/nowhere"}, "HF_TOKEN_FILE '/nowhere' cannot be read (No such file or directory)"),
        ({}, "LLM_VLLM_MODEL_NAME must be a hub's ORG/NAME"),
        ({**MODEL, "EXTRA_ARGS": "'"}, "EXTRA_ARGS cannot be split"),
        ({**FP8, "QUANTIZATION": "awq"}, "QUANTIZATION and IF_FP8_QUANTIZATION are two ways of quantizing"),
        ({**FP8, "LLM_DEVICE": "hpu"}, "There are no scales in "),
    ],
)
def test_a_container_says_why_it_cannot_start(container: Container, environ: dict[str, str], message: str) -> None:
    done = container.serve(**environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vllm-gateway: {message}")


def test_vllm_apps_own_file_and_variables_start_it(container: Container) -> None:
    file = container.data / "config.json"
    container.file("config.json")
    container.file("models/name/config.json")
    file.write_text('{"model_path": "./models/name", "cuda_graph_mode": "full", "temperature": 0.5}')
    environ = {"VLLM_APP_CONFIG": str(file), "VLLM_EAGER": "1", "MAX_TOKENS": "1024", "EXTRA_ARGS": "--seed 1"}
    made = '--compilation-config {"cudagraph_mode": "FULL"} --override-generation-config {"temperature": 0.5}'
    rest = f"--host 0.0.0.0 --port 8008 {made} --max-model-len 1024 --enforce-eager --seed 1\n"
    model = container.data / "models/name"
    assert container.serve(**environ).stdout == f"serve {model} {rest}"
    done = container.serve(**environ, **MODEL, VLLM_MAX_MODEL_LEN="2048")
    assert done.stdout == f"serve Org/Name {rest.replace('1024', '2048')}"
    assert done.stderr.splitlines()[:-1] == [
        "vllm-gateway: warning: LLM_VLLM_MODEL_NAME and vllm-app's model_path differ: LLM_VLLM_MODEL_NAME is used.",
        "vllm-gateway: warning: VLLM_MAX_MODEL_LEN and MAX_TOKENS are both set and differ: VLLM_MAX_MODEL_LEN is used.",
    ]
    file.write_text('{"temperature": 3}')
    assert container.serve(**environ).stderr == (
        f"vllm-gateway: {file} (VLLM_APP_CONFIG): temperature must be a number from 0 to 2, but it is 3.\n"
    )


def test_the_model_of_vllm_app_is_the_one_that_is_in_fp8(container: Container) -> None:
    container.file("config.json")
    container.file("fp8/name/config.json")
    container.file("models/name/config.json")
    (container.data / "config.json").write_text('{"model_path": "./models/name"}')
    environ = {"VLLM_APP_CONFIG": str(container.data / "config.json")}
    model, made = container.data / "models/name", container.data / "fp8/name"
    done = container.serve(**environ, IF_FP8_QUANTIZATION="true", LLM_DEVICE="cuda")
    options = f"--host 0.0.0.0 --port 8008 --served-model-name {model} --kv-cache-dtype fp8"
    assert done.stdout == f"serve {made} {options}\n"
    shutil.rmtree(made)
    script = container.data.parent / "gateway/modelserver/scripts/quantize.py"
    assert container.run("quantize", **environ).stdout == f"None None {script} {model} {made}\n"


@pytest.mark.parametrize(
    ("given", "logged"),
    [
        ("--api-key A --api-key=A --seed 1", "--api-key … --api-key=… --seed 1"),
        ("--api-key A 'B C' -5 --seed 1", "--api-key … … … --seed 1"),
        ("--max_long_tokens 5 --my-key A", "--max_long_tokens 5 --my-key …"),
        ("""--x '{"max_new_tokens": 5, "tokens": "A"}'""", """--x '{"max_new_tokens": 5, "tokens": "…"}'"""),
        ("--api_key A --API_KEY=A", "--api_key … --API_KEY=…"),
        ("--api-k A --ap=A --hf-t A", "--api-k … --ap=… --hf-t …"),
        ("--hf-token A --hf_token=A", "--hf-token … --hf_token=…"),
        ("--ssl-keyfile-password A --my-secret A", "--ssl-keyfile-password … --my-secret …"),
        ("--kv-transfer-config.extra.api_key A --x.tokens+=A", "--kv-transfer-config.extra.api_key … --x.tokens+=…"),
        ("""--x '{"b": [{"Api_Key": "A", "c": 1}]}'""", """--x '{"b": [{"Api_Key": "…", "c": 1}]}'"""),
        ("""--x='{"password": "A"}' -b'{"token": "A"}'""", """--x='{"password": "…"}' -b'{"token": "…"}'"""),
        ("""--x "{'token': 'A'}" --b '[1'""", "--x '…' --b '[1'"),
        ("--otlp http://me:A@host:4317", "--otlp 'http://…@host:4317'"),
    ],
)
def test_secrets_in_extra_args_are_not_logged(container: Container, given: str, logged: str) -> None:
    done = container.serve(**MODEL, EXTRA_ARGS=given)
    assert "A" in done.stdout
    assert done.stderr == f"Starting: vllm {START} {logged}\n"


def test_what_our_own_variables_say_is_logged(container: Container) -> None:
    done = container.serve(**MODEL, MAX_CONCURRENT_TOKENS="4096", EXTRA_ARGS="--seed -1 --x 'b c'")
    assert done.stderr == f"Starting: vllm {START} --max-num-batched-tokens 4096 --seed -1 --x 'b c'\n"


def test_vllm_gets_none_of_the_gateways_secrets(container: Container, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of-the-gateway\n")
    (container.data.parent / "vllm").write_text("#!/bin/sh\nenv\n")
    files = {
        name: str(tmp_path / "secret") for name in ("GATEWAY_UPSTREAM_CLIENT_SECRET_FILE", "LLM_VLLM_API_KEY_FILE")
    }
    done = container.serve(**MODEL, **files, OTEL_EXPORTER_OTLP_HEADERS="a=of-the-gateway", NCCL_DEBUG="INFO")
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert [name for name, value in found.items() if "of-the-gateway" in value] == ["VLLM_API_KEY"]
    assert str(secret) not in found.values()
    assert found["NCCL_DEBUG"] == "INFO"


@pytest.mark.parametrize("word", ["true", "True", "1"])
def test_one_word_turns_fp8_on(container: Container, word: str) -> None:
    done = container.serve(**MODEL, IF_FP8_QUANTIZATION=word, LLM_DEVICE="cpu", EXTRA_ARGS="--kv-cache-dtype fp8_e4m3")
    assert done.stdout == f"{START} --kv-cache-dtype fp8_e5m2 --kv-cache-dtype fp8_e4m3\n"
    assert f"no checkpoint in FP8 at {container.data}/fp8/Org--Name, so that only the cache is in FP8" in done.stderr
    assert container.serve(**MODEL, IF_FP8_QUANTIZATION="false").stdout == f"{START}\n"


@pytest.mark.parametrize(("device", "options"), [("cpu", ""), ("cuda", " --kv-cache-dtype fp8")])
def test_a_prepared_checkpoint_is_served_under_its_models_name(container: Container, device: str, options: str) -> None:
    container.file("fp8/Org--Name/config.json")
    at = f"serve {container.data}/fp8/Org--Name --host 0.0.0.0 --port 8008"
    done = container.serve(**FP8, LLM_DEVICE=device)
    assert done.stdout == f"{at} --served-model-name Org/Name{options}\n"
    named = container.serve(**FP8, LLM_DEVICE=device, SERVED_MODEL_NAME="name")
    assert named.stdout == f"{at}{options} --served-model-name name\n"


def test_gaudi_goes_by_the_scales_of_a_calibration(container: Container) -> None:
    options = "--quantization inc --kv-cache-dtype fp8_inc"
    container.file("inc/name/maxabs_measure_g3.json")
    container.file("inc/name/maxabs_quant_g3.json")
    done = container.serve(**FP8, LLM_DEVICE="hpu")
    assert done.stdout == f"{container.data}/inc/name/maxabs_quant_g3.json {START} {options}\n"
    container.file("inc/name/maxabs_quant_g2.json")
    done = container.serve(**FP8, LLM_DEVICE="hpu")
    assert "There are scales for Gaudi 2 and for Gaudi 3" in done.stderr
    done = container.serve(**FP8, LLM_DEVICE="hpu", QUANT_CONFIG="/data/q.json")
    assert done.stdout == f"/data/q.json {START} {options}\n"


@pytest.mark.parametrize(("dynamic", "served"), [(True, True), (False, False)])
def test_a_calibrated_checkpoint_is_for_gpus(container: Container, dynamic: bool, served: bool) -> None:
    container.file("fp8/Org--Name/config.json")
    groups = {"group_0": {"weights": {"dynamic": False}, "input_activations": {"dynamic": dynamic}}}
    config = {"quantization_config": {"config_groups": groups}}
    (container.data / "fp8/Org--Name/config.json").write_text(json.dumps(config))
    done = container.serve(**FP8, LLM_DEVICE="cpu")
    assert (done.returncode == 0) is served
    assert ("was calibrated on a dataset (static FP8), which only GPUs serve" in done.stderr) is not served
    assert container.serve(**FP8, LLM_DEVICE="cuda").returncode == 0


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"quantization_config": null}', '{"quantization_config": {"config_groups": []}}']
)
def test_a_checkpoint_of_another_kind_is_vllms_to_judge_and_a_broken_one_is_told(
    container: Container, text: str
) -> None:
    container.file("fp8/Org--Name/config.json")
    (container.data / "fp8/Org--Name/config.json").write_text(text)
    done = container.serve(**FP8, LLM_DEVICE="cpu")
    assert "Traceback" not in done.stderr
    if text == "{":
        assert f"{container.data}/fp8/Org--Name/config.json is no JSON" in done.stderr
    else:
        assert done.stdout.startswith(f"serve {container.data}/fp8/Org--Name ")


def test_a_checkpoint_is_its_own_models_alone(container: Container) -> None:
    container.file("fp8/Other--Name/config.json")
    container.file("fp8/Org--Name@v1/config.json")
    assert container.serve(**FP8, LLM_DEVICE="cuda").stdout.startswith(f"{START} ")
    at = f"serve {container.data}/fp8/Org--Name@v1 "
    assert container.serve(**FP8, LLM_DEVICE="cuda", LLM_VLLM_MODEL_REVISION="v1").stdout.startswith(at)
    done = container.run("quantize", **MODEL, LLM_VLLM_MODEL_REVISION="v1")
    assert done.stderr.startswith(
        "vllm-gateway: Org/Name is quantized already: to do it anew, remove fp8/Org--Name@v1 in"
    )


def test_another_word_than_yes_and_no_is_refused(container: Container) -> None:
    done = container.serve(**MODEL, IF_FP8_QUANTIZATION="enabled")
    assert done.stderr == "vllm-gateway: IF_FP8_QUANTIZATION must be true or false, but it is 'enabled'.\n"
    assert "--kv-cache-dtype" in container.serve(**MODEL, IF_FP8_QUANTIZATION="Yes", LLM_DEVICE="cpu").stdout


def test_quantizing_is_told_what_the_settings_say(container: Container) -> None:
    done = container.run("quantize", **MODEL, LLM_DEVICE="cpu", HUGGING_FACE_HUB_TOKEN="token", VLLM_TP_SIZE="2")
    script, made = container.data.parent / "gateway/modelserver/scripts/quantize.py", container.data / "fp8/Org--Name"
    assert done.stdout == f"token None {script} Org/Name {made}\n"
    container.file("d.csv")
    settings = {"FP8_DATASET_PATH": str(container.data / "d.csv"), "LLM_VLLM_MODEL_REVISION": "v2"}
    done = container.run("quantize", **MODEL, **settings)
    options = f"--dataset {container.data}/d.csv --samples 512 --length 2048 --revision v2"
    assert done.stdout == f"None None {script} Org/Name {made}@v2 {options}\n"
    done = container.run("quantize", **MODEL, **settings, FP8_DATASET_SAMPLES="5", FP8_DATASET_LENGTH="64")
    assert "--samples 5 --length 64" in done.stdout


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "LLM_VLLM_MODEL_NAME must be a hub's ORG/NAME"),
        (
            {**MODEL, "FP8_DATASET_PATH": "/data/none.csv"},
            "There is no dataset /data/none.csv: put the file into the data",
        ),
        ({**MODEL, "LLM_DEVICE": "hpu"}, "Gaudi's FP8 is calibrated: set FP8_DATASET_PATH"),
        ({**MODEL, "FP8_DATASET_SAMPLES": "0"}, "FP8_DATASET_SAMPLES must be a whole number, 1 or more, but it is '0'"),
        ({**MODEL, "FP8_DATASET_PATH": __file__, "FP8_DATASET_LENGTH": "-1"}, "FP8_DATASET_LENGTH must be a whole"),
    ],
)
def test_quantizing_says_why_it_cannot_start(container: Container, environ: dict[str, str], message: str) -> None:
    done = container.run("quantize", **environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vllm-gateway: {message}")


class Gaudi:
    """What is in the image that calibrates, its scripts' place taken by what tells of itself."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data, self.said, scripts = folder / "data", folder / "said", folder / "calibration"
        self.data.mkdir()
        scripts.mkdir()
        shutil.copy(ROOT / "tests/heavy/compose/vllm-gaudi/calibration/calibrate_model.sh", scripts)
        scripts.chmod(0o555)
        (folder / "dataset.py").write_text(
            "import sys; open(sys.argv[2], 'w').write('rewritten ' + ' '.join(sys.argv))"
        )
        monkeypatch.setattr(entrypoint, "_CALIBRATION", scripts)
        monkeypatch.setattr(entrypoint, "_SCRIPTS", folder)
        self.mine = self.data / "mine.pkl"
        self.mine.touch()

    def quantize(self, model: str = "Org/Mixtral-8x7B", **environ: str) -> list[str]:
        """What the scripts say: their options, their folder, their environment, their dataset."""
        given = {"PATH": "/usr/bin:/bin", "SAID": str(self.said), "LLM_VLLM_MODEL_NAME": model, "LLM_DEVICE": "hpu"}
        entrypoint.quantize(given | {"FP8_DATASET_PATH": str(self.mine)} | environ, self.data)
        return self.said.read_text().splitlines()


@pytest.fixture
def gaudi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gaudi:
    return Gaudi(tmp_path, monkeypatch)


def test_gaudi_is_calibrated_by_a_copy_of_the_scripts_and_a_dataset_of_ours(
    gaudi: Gaudi, capfd: pytest.CaptureFixture[str]
) -> None:
    options, folder, *rest = gaudi.quantize(VLLM_TP_SIZE="8", FP8_DATASET_SAMPLES="100", HUGGING_FACE_HUB_TOKEN="token")
    assert options == f"-m Org/Mixtral-8x7B -d {folder}/dataset.pkl -o {gaudi.data}/inc -t 8 -b 32"
    assert rest[-1] == f"rewritten {gaudi.data.parent}/dataset.py {gaudi.mine} {folder}/dataset.pkl --samples 100"
    assert "HF_TOKEN=token" in rest
    assert not Path(folder).exists()
    scales = gaudi.data / "inc/mixtral-8x7b/maxabs_quant_g3.json"
    assert f"Calibrated: {scales}. IF_FP8_QUANTIZATION=true serves by it." in capfd.readouterr().err
    # What was written in lower case is found by the model's name as it is.
    assert entrypoint._scales("Org/Mixtral-8x7B", gaudi.data) == scales


def test_gaudis_batches_and_experts_can_be_set(gaudi: Gaudi) -> None:
    options, *_ = gaudi.quantize(BATCH_SIZE="8", VLLM_ENABLE_EXPERT_PARALLEL="1")
    assert options.endswith("-t 1 -b 8 -u")


def test_a_calibration_that_fails_is_told(gaudi: Gaudi) -> None:
    with pytest.raises(vllm_args.OptionError, match="Nothing was calibrated; what was in the way stands above"):
        gaudi.quantize(FAIL="1")
    # What the scripts left is not taken for the scales.
    assert (gaudi.data / "inc/mixtral-8x7b/maxabs_quant_g3.json").exists()
    with pytest.raises(vllm_args.OptionError, match="did not end well: calibrate again"):
        entrypoint._scales("Org/Mixtral-8x7B", gaudi.data)
    gaudi.quantize()
    assert entrypoint._scales("Org/Mixtral-8x7B", gaudi.data).exists()
    (gaudi.data.parent / "dataset.py").write_text("import sys; sys.exit(1)")
    gaudi.said.unlink()
    with pytest.raises(vllm_args.OptionError, match="Nothing was calibrated"):
        gaudi.quantize()
    assert not gaudi.said.exists()


@pytest.mark.parametrize(
    ("folder", "kind", "message"),
    [
        ("mixtral-of-mine", "mixtral", None),
        ("DeepSeek-V3", "deepseek_v3", None),
        ("Llama-3.1-8B", "llama", None),
        ("mine", "mixtral", "kind mixtral, .* must begin with mixtral: rename it"),
        ("r1", "deepseek_v3", "must begin with deepseek"),
        ("DeepSeek-R1-Distill-Llama-8B", "llama", "kind llama, .* must be without deepseek"),
        ("my-deepseek-distill", "llama", "must be without deepseek"),
    ],
)
def test_what_fp8_leaves_out_is_not_missed_for_a_folders_name(
    gaudi: Gaudi, folder: str, kind: str, message: str | None
) -> None:
    model = gaudi.data / folder
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": kind}))
    if message is None:
        assert gaudi.quantize(str(model))[0].startswith(f"-m {model} ")
    else:
        with pytest.raises(vllm_args.OptionError, match=message):
            gaudi.quantize(str(model))


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "LLM_VLLM_MODEL_NAME must be a hub's ORG/NAME"),
        ({**MODEL, "PORT": "8008"}, "PORT must be another port than 8008, which is vLLM's here."),
        ({**MODEL, "PORT_HEALTH": "8008"}, "PORT_HEALTH must be another port than 8008, which is vLLM's here."),
        ({**MODEL, "PORT": "http"}, "PORT must be a whole number, 1 or more, but it is 'http'."),
        ({**MODEL, "VLLM_NNODES": "2"}, "VLLM_NNODES is 2, but VLLM_MASTER_ADDR is not set"),
    ],
)
def test_one_container_of_both_says_why_it_cannot_start(
    container: Container, environ: dict[str, str], message: str
) -> None:
    done = container.run("both", **environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vllm-gateway: {message}")


def test_one_container_of_both_ends_where_vllm_does(container: Container) -> None:
    container.becomes("echo $*; exit 3")
    done = container.run("both", **MODEL, PORT=str(free_port()))
    assert done.returncode == 1
    assert "serve Org/Name --host 127.0.0.1 --port 8008\n" in done.stdout
    assert done.stderr.endswith("vllm-gateway: vLLM ended with 3; its lines are above.\n")


def test_one_container_of_both_ends_where_the_gateway_does(container: Container) -> None:
    container.becomes("exec sleep 60")
    done = container.run("both", **MODEL, PORT=str(free_port()), GATEWAY_MAX_QUEUE="none")
    assert done.returncode == 1
    assert "GATEWAY_MAX_QUEUE is wrong: 'none'" in done.stderr
    assert "vllm-gateway: The gateway ended with" in done.stderr


def test_one_container_of_both_answers_from_the_start_and_ends_both_at_a_signal(
    container: Container, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    container.becomes(f"trap 'echo $HF_TOKEN > {told}; exit 0' TERM\nwhile :; do sleep 0.1; done")
    port = free_port()
    with container.start("both", **MODEL, PORT=str(port), HF_TOKEN="token", GATEWAY_UPSTREAM_API_KEY="key") as process:
        until = time.monotonic() + 60
        while not answers(port):
            assert process.poll() is None
            assert time.monotonic() < until
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not answers(port)
    assert told.read_text() == "token\n"


def answers(port: int) -> bool:
    """Whether the gateway on this port lives."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
