"""The program of a model server's container: prepares the data folder, starts vLLM, checks its health, quantizes.

    container.py own FOLDER UID GID    give the data folder to that user, or say why that is impossible
    container.py serve [HOST PORT]     become `vllm serve`, there or on all of the container's addresses
    container.py both                  run vLLM and the gateway in front of it, where a platform runs one container
    container.py healthy [PORT]        exit with 0 if the vLLM in this container is healthy
    container.py quantize              make the model's checkpoint in FP8, or on Gaudi its scales

Mounted into the container with its package; it needs only Python, so any vLLM image will do.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

if __name__ == "__main__":
    # The folder that contains the package, instead of the script's folder.
    sys.path[0] = str(Path(__file__).parents[2])

from gateway.config.secret_files import BadSecretFile, with_files
from gateway.models import ModelError, hub_cache
from gateway.modelserver import vllm_app, vllm_args
from gateway.modelserver.child_process import Child

PORT = 8008
_TICK = 0.2
# Seconds that vLLM gets to end, after the last answer has ended.
_GRACE = 20
# The variables with the gateway's port, in order of precedence. Platforms that run one container set PORT.
_PORTS = ("GATEWAY_PORT", "LLM_USVC_PORT", "PORT")
_HEALTH_PORTS = ("GATEWAY_HEALTH_PORT", "PORT_HEALTH")

# The names that a data folder of this stack may contain.
_OURS = {"cache", "demo-model", "fp8", "home", "inc", "prometheus", "unpacked"}

_SCRIPTS = Path(__file__).with_name("scripts")
# The folder of vLLM-Gaudi's scripts in the quantize image for Gaudi. By the model's name these scripts exclude the
# layers that FP8 would spoil.
_CALIBRATION = Path("/opt/calibration")
_UNFINISHED = "unfinished"
_BLOCKED = {"mixtral": "mixtral", "deepseek_v2": "deepseek", "deepseek_v3": "deepseek"}


def own(folder: Path, uid: int, gid: int) -> None:
    """Give a new folder to that user. Raises OptionError if the user cannot write there or cannot read the mounts.

    A folder with files that are not of this stack may belong to somebody else, so its owner is not changed.
    """
    status = folder.stat()
    if status.st_uid == 0 and {entry.name for entry in folder.iterdir()} <= _OURS:
        os.chown(folder, uid, gid)
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
    for kept in (folder, *(folder / name for name in ("cache", "fp8", "home", "hub", "inc", "prometheus", "unpacked"))):
        if kept.exists() and not os.access(kept, os.R_OK | os.W_OK | os.X_OK):
            owner = kept.stat().st_uid
            raise vllm_args.OptionError(
                f"{kept} (LLM_VLLM_DATA_DIR) belongs to user {owner}, and user {uid} cannot write there: "
                f"`sudo chown -R {uid}` the folder, or set UID={owner} in the .env file."
            )
    for mounted in (__file__, vllm_args.__file__):
        if not os.access(mounted, os.R_OK):
            raise vllm_args.OptionError(f"User {uid} cannot read {mounted}: `chmod -R a+rX` the repository's folder.")


def serve(environ: Mapping[str, str], data: Path, host: str = "0.0.0.0", port: str = str(PORT)) -> None:
    """Become `vllm serve`. Raises OptionError."""
    command, found = _vllm(environ, data, host, port)
    os.execvpe(command[0], command, found)


def both(environ: Mapping[str, str], data: Path) -> NoReturn:
    """Run vLLM, reachable from this container only, and the gateway, until a signal or until one of the two ends.

    Raises SystemExit after a signal: first the gateway finishes its calls, then vLLM ends. Raises OptionError.
    """
    front = _gateway(environ)
    command, found = _vllm(environ, data, "127.0.0.1", str(PORT))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    # No limit for the gateway: it limits its drain itself, and the platform ends the container.
    argv = [sys.executable, "-P", "-m", "gateway", "serve"]
    with Child(command, found, grace=_GRACE) as vllm, Child(argv, front, grace=math.inf) as gateway:
        while True:
            for name, child in (("vLLM", vllm), ("The gateway", gateway)):
                if (code := child.exit_code()) is not None:
                    raise vllm_args.OptionError(f"{name} ended with {code}; its lines are above.")
            time.sleep(_TICK)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # Ignored: a second signal would cut off the answers that the first one lets finish.
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    raise SystemExit(0)


def _gateway(environ: Mapping[str, str]) -> dict[str, str]:
    """The gateway's environment, with the package's folder in PYTHONPATH. Raises OptionError."""
    port = next((name for name in _PORTS if environ.get(name)), "PORT")
    for name in (port, *_HEALTH_PORTS):
        if _count(environ, name, "80") == str(PORT):
            raise vllm_args.OptionError(f"{name} must be another port than {PORT}, which is vLLM's here.")
    # Only vLLM gets the hub's tokens.
    others = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LLM_MODEL_SERVER_ENDPOINT", *_PORTS)
    found = {name: value for name, value in environ.items() if name not in others}
    found["GATEWAY_PORT"] = _count(environ, port, "80")
    found["GATEWAY_UPSTREAMS"] = f"http://127.0.0.1:{PORT}"
    found["PYTHONPATH"] = str(Path(__file__).parents[2])
    return found


def _vllm(environ: Mapping[str, str], data: Path, host: str, port: str) -> tuple[list[str], dict[str, str]]:
    """The command line of `vllm serve` and its environment; writes the former to stderr. Raises OptionError."""
    app = vllm_app.read(environ.get("VLLM_APP_CONFIG"))
    model = _model(environ, app)
    found = vllm_args.vllm_environment(environ)
    if cached := hub_cache.find(Path(model), data / "unpacked"):
        model, found = cached.name, {**found, **cached.environment()}
    options = app.options + vllm_args.options(environ)
    # The settings files have defaults for variables that vllm-app sets under other names.
    for sentence in vllm_args.differing(environ):
        _warn(sentence)
    if vllm_args.is_on(environ, "IF_FP8_QUANTIZATION"):
        if environ.get("QUANTIZATION"):
            raise vllm_args.OptionError(
                "QUANTIZATION and IF_FP8_QUANTIZATION are two ways of quantizing: unset one of them."
            )
        model, more = _in_fp8(model, environ, data)
        options = more + options
        if environ.get("LLM_DEVICE") == "hpu":
            found["QUANT_CONFIG"] = environ.get("QUANT_CONFIG") or str(_scales(model, data))
    command = ["vllm", "serve", model, "--host", host, "--port", port, *options]
    sys.stderr.write(f"Starting: {vllm_args.shown(command)}\n")
    return command, found


def _model(environ: Mapping[str, str], app: vllm_app.App) -> str:
    named = environ.get("LLM_VLLM_MODEL_NAME")
    if named and app.model not in (None, named):
        _warn("LLM_VLLM_MODEL_NAME and vllm-app's model_path differ: LLM_VLLM_MODEL_NAME is used.")
    if model := named or app.model:
        return model
    raise vllm_args.OptionError(
        "LLM_VLLM_MODEL_NAME must be a hub's ORG/NAME, a folder or a tarball as /data/NAME, or s3://BUCKET/FOLDER, but "
        "it is not set."
    )


def _warn(sentence: str) -> None:
    sys.stderr.write(f"vllm-gateway: warning: {sentence}\n")


def _in_fp8(model: str, environ: Mapping[str, str], data: Path) -> tuple[str, list[str]]:
    """The checkpoint to serve in FP8 and its options; it is served under the name of its original model."""
    device = environ.get("LLM_DEVICE", "cpu")
    checkpoint = _checkpoint(model, environ, data)
    prepared = device != "hpu" and (checkpoint / "config.json").exists()
    options = vllm_args.fp8(device, prepared=prepared)
    if not prepared:
        if device == "cpu":
            sys.stderr.write(f"There is no checkpoint in FP8 at {checkpoint}, so that only the cache is in FP8.\n")
        return model, options
    if device == "cpu" and _is_static(checkpoint):
        raise vllm_args.OptionError(
            f"{checkpoint} was calibrated on a dataset (static FP8), which only GPUs serve: "
            "remove it, and quantize again with FP8_DATASET_PATH unset."
        )
    named = [] if environ.get("SERVED_MODEL_NAME") else ["--served-model-name", model]
    return str(checkpoint), named + options


def _checkpoint(model: str, environ: Mapping[str, str], data: Path) -> Path:
    """The folder of the model's FP8 checkpoint; each organization and revision has its own."""
    name = Path(model).name if Path(model).is_absolute() else model.replace("/", "--")
    revision = environ.get("LLM_VLLM_MODEL_REVISION")
    return data / "fp8" / (f"{name}@{revision.replace('/', '--')}" if revision else name)


def _count(environ: Mapping[str, str], name: str, default: str) -> str:
    """A whole number from 1. Raises OptionError."""
    value = environ.get(name) or default
    if not value.isdecimal() or int(value) < 1:
        raise vllm_args.OptionError(f"{name} must be a whole number, 1 or more, but it is {value!r}.")
    return value


def _is_static(checkpoint: Path) -> bool:
    """Whether the activations are scaled by fixed numbers."""
    try:
        config = json.loads((checkpoint / "config.json").read_text())
    except ValueError as error:
        raise vllm_args.OptionError(f"{checkpoint}/config.json is no JSON ({error}): quantize again.") from None
    try:
        groups = config["quantization_config"]["config_groups"].values()
        return any(group["input_activations"]["dynamic"] is False for group in groups)
    # A checkpoint of another tool has other fields.
    except (AttributeError, KeyError, TypeError):
        return False


def _scales(model: str, data: Path) -> Path:
    """The file of scales that calibration on this kind of Gaudi wrote. Raises OptionError."""
    found = _found_scales(model, data)
    if len(found) == 1:
        return found[0]
    folder = _inc(model, data)
    if (folder / _UNFINISHED).exists():
        raise vllm_args.OptionError(
            f"The calibration that was to leave its scales in {folder} did not end well: calibrate again."
        )
    if found:
        raise vllm_args.OptionError(
            f"There are scales for Gaudi 2 and for Gaudi 3 in {folder}: set QUANT_CONFIG to the one to use."
        )
    raise vllm_args.OptionError(
        f"There are no scales in {folder}: make them with docker/hpu/fp8/docker-compose.yaml, or set QUANT_CONFIG to a "
        "maxabs_quant_g2.json or _g3.json in the data folder."
    )


def _found_scales(model: str, data: Path) -> list[Path]:
    folder = _inc(model, data)
    return [] if (folder / _UNFINISHED).exists() else sorted(folder.glob("maxabs_quant_g[23].json"))


def _inc(model: str, data: Path) -> Path:
    """The folder of the model's scales; the scripts write the model's name in lower case."""
    return data / "inc" / Path(model).name.lower()


def quantize(environ: Mapping[str, str], data: Path) -> None:
    """Make the checkpoint or scales that `serve` uses with IF_FP8_QUANTIZATION. Raises OptionError."""
    model = _model(environ, vllm_app.read(environ.get("VLLM_APP_CONFIG")))
    dataset = environ.get("FP8_DATASET_PATH")
    if dataset and not Path(dataset).is_file():
        raise vllm_args.OptionError(
            f"There is no dataset {dataset}: put the file into the data folder (LLM_VLLM_DATA_DIR), which is /data "
            "here, and set FP8_DATASET_PATH to /data/NAME."
        )
    samples = _count(environ, "FP8_DATASET_SAMPLES", "512")
    if environ.get("LLM_DEVICE") == "hpu":
        if not dataset:
            raise vllm_args.OptionError(
                "Gaudi's FP8 is calibrated: set FP8_DATASET_PATH to a dataset in the data folder."
            )
        _calibrate(model, [sys.executable, "-P", str(_SCRIPTS / "dataset.py"), dataset], samples, environ, data)
        return
    checkpoint = _checkpoint(model, environ, data)
    if checkpoint.exists():
        raise vllm_args.OptionError(
            f"{model} is quantized already: to do it anew, remove fp8/{checkpoint.name} in the data folder "
            "(LLM_VLLM_DATA_DIR)."
        )
    argv = [sys.executable, "-P", str(_SCRIPTS / "quantize.py"), model, str(checkpoint)]
    if dataset:
        length = _count(environ, "FP8_DATASET_LENGTH", "2048")
        argv += ["--dataset", dataset, "--samples", samples, "--length", length]
    if revision := environ.get("LLM_VLLM_MODEL_REVISION"):
        argv += ["--revision", revision]
    os.execve(argv[0], argv, vllm_args.vllm_environment(environ))


def _calibrate(model: str, rewrite: list[str], samples: str, environ: Mapping[str, str], data: Path) -> None:
    """Calibrate with the dataset that `rewrite` makes, by a copy of vLLM-Gaudi's scripts.

    A copy, because the scripts write into their own folder.
    """
    _check_name(model)
    with tempfile.TemporaryDirectory() as work:
        scripts = Path(shutil.copytree(_CALIBRATION, Path(work) / "calibration"))
        # The scripts unpickle without checks, so they never get the user's own file.
        dataset = str(scripts / "dataset.pkl")
        command = ["bash", str(scripts / "calibrate_model.sh"), "-m", model, "-d", dataset, "-o", str(data / "inc")]
        command += ["-t", _count(environ, "VLLM_TP_SIZE", "1"), "-b", _count(environ, "BATCH_SIZE", "32")]
        if vllm_args.is_on(environ, "VLLM_ENABLE_EXPERT_PARALLEL"):
            command.append("-u")
        # The scripts write the files that serving looks for before they have measured anything.
        unfinished = _inc(model, data) / _UNFINISHED
        for argv in ([*rewrite, dataset, "--samples", samples], command):
            if argv is command:
                unfinished.parent.mkdir(parents=True, exist_ok=True)
                unfinished.touch()
            sys.stderr.write(f"Starting: {vllm_args.shown(argv)}\n")
            if subprocess.run(argv, env=vllm_args.vllm_environment(environ), check=False).returncode:
                raise vllm_args.OptionError("Nothing was calibrated; what was in the way stands above.")
    unfinished.unlink()
    made = ", ".join(str(file) for file in _found_scales(model, data))
    sys.stderr.write(f"Calibrated: {made}. IF_FP8_QUANTIZATION=true serves by it.\n")


def _check_name(model: str) -> None:
    """Check that the folder's name fits its model, because the scripts go by the name. Raises OptionError."""
    config = Path(model) / "config.json"
    if not config.is_file():
        return
    kind = json.loads(config.read_text()).get("model_type")
    name, expected = Path(model).name.lower(), _BLOCKED.get(kind)
    named = next((each for each in set(_BLOCKED.values()) if each in name), None)
    if named != expected or (expected and not name.startswith(expected)):
        must = f"begin with {expected}" if expected else f"be without {named}"
        raise vllm_args.OptionError(
            f"{model} holds a model of the kind {kind}, and what FP8 leaves out is chosen by the folder's name, which "
            f"must {must}: rename it."
        )


def healthy(environ: Mapping[str, str], port: str = str(PORT)) -> bool:
    """Whether the vLLM in this container reports that it is healthy; ignores a proxy that is set for downloads.

    Of several nodes only the first has an API; any other node counts as healthy while it runs.
    """
    if environ.get("VLLM_NODE_RANK", "0") not in ("", "0"):
        return True
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return bool(opener.open(f"http://127.0.0.1:{port}/health", timeout=3).status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main(arguments: list[str]) -> int:
    """Run one of the commands; returns the exit status."""
    try:
        match arguments:
            case ["own", folder, uid, gid]:
                own(Path(folder), int(uid), int(gid))
            case ["serve", *where] if len(where) in (0, 2):
                serve(with_files(os.environ), Path(os.environ.get("HF_HOME", "/data")), *where)
            case ["both"]:
                both(with_files(os.environ), Path(os.environ.get("HF_HOME", "/data")))
            case ["quantize"]:
                quantize(with_files(os.environ), Path(os.environ.get("HF_HOME", "/data")))
            case ["healthy", *where] if len(where) < 2:
                return 0 if healthy(os.environ, *where) else 1
            case _:
                raise vllm_args.OptionError(f"no such command: {shlex.join(arguments)}")
    except (vllm_args.OptionError, ModelError, BadSecretFile, OSError) as error:
        sys.stderr.write(f"vllm-gateway: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
