"""The command `up`: starts, watches and ends a local vLLM and the gateway in front of it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import NamedTuple

import httpx

from gateway.cache.running import Running, announced, folder_in
from gateway.config.model_server_settings import ModelServerSettings
from gateway.config.settings import CLIENT_KEY, Settings, names_of, own_url
from gateway.modelserver import demo_model, install, model_source, preflight, vllm_app, vllm_args
from gateway.modelserver.child_process import Child
from gateway.modelserver.preflight import GIB, CannotStart
from gateway.modelserver.vllm_process import DEMO_NAME, ModelServer, launch
from gateway.progress import Display

_TICK = 0.2
# Seconds that a start takes on two cores; only the progress display uses it.
_USUAL_START = 45
_GATEWAY_START = 30
# Memory of Python, torch and vLLM without a model, measured; the cache and the model come on top.
_MEMORY = 2 * GIB
_DRAIN = 5


class Stopped(BaseException):
    """A signal asked `up` to end."""


class Served(NamedTuple):
    """The parameters with which the model server is started."""

    python: Path
    model: str
    name: str
    demo: bool
    local: bool
    environment: Mapping[str, str] = MappingProxyType({})


def up(
    model_server: ModelServerSettings,
    gateway: Settings,
    environ: Mapping[str, str],
    *,
    display: Display | None = None,
) -> int:
    """Run vLLM and the gateway until a signal or until one of them dies; returns the exit status, 0 after a signal.

    `environ` is the environment of both, from `config.load.child_environment`.
    """
    display = display or Display()
    try:
        with _signals():
            return _run(model_server, gateway, environ, display)
    except CannotStart as error:
        sys.stderr.write(f"vllm-gateway: {error}\n")
        return 1
    except Stopped:
        display.say("Stopped.")
        return 0


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn the signals that end a program into an exception, so that every `finally` runs.

    A second signal ends the wait for the children; later signals are ignored, as nothing is left to speed up.
    """
    ours, came = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        if came <= 2:
            raise Stopped

    before = [signal.signal(number, stop) for number in ours]
    try:
        yield
    except Stopped:
        before = [signal.SIG_IGN] * len(ours)  # so that no signal changes our exit status
        raise
    finally:
        for number, handler in zip(ours, before, strict=True):
            signal.signal(number, handler)


def _run(settings: ModelServerSettings, gateway: Settings, environ: Mapping[str, str], display: Display) -> int:
    _check(settings, gateway)
    app = _read_app(settings)
    served = _prepare(settings, settings.model or app.model, environ, display)
    cache = install.cache_folder(environ)
    log = cache / "logs" / f"vllm-{settings.port}.log"
    # The variables by which vLLM finds the model are for vLLM alone, not for the gateway.
    own = {**environ, **served.environment}
    command = launch(settings, served.python, served.model, own, app.options, demo=served.demo, local=served.local)
    key = gateway.upstream_api_key.get_secret_value() if gateway.upstream_api_key else None
    # The first check of the ports may be minutes old.
    _check_ports(settings, gateway)
    with (
        announced(folder_in(cache), Running(os.getpid(), own_url(gateway), _upstream(settings), served.name, str(log))),
        ModelServer(command, settings.port, log, key) as server,
    ):
        with _telling(display, "Stopping vLLM."):
            _wait_for(server, served, display)
        _check_gateway_ports(gateway)
        display.say("Starting the gateway.")
        front_argv = [sys.executable, "-m", "gateway", "serve"]
        with (
            Child(front_argv, _gateway_environment(settings, environ), grace=_gateway_grace(gateway)) as front,
            _telling(display, "Stopping the gateway and vLLM."),
        ):
            _wait_for_gateway(server, front, gateway)
            for line in _what_to_try(gateway, served, log):
                display.say(line)
            _watch(server, front)
    return 1


@contextlib.contextmanager
def _telling(display: Display, stopping: str) -> Iterator[None]:
    """On Stopped, say what is being stopped, because that takes a while."""
    try:
        yield
    except Stopped:
        display.say(stopping)
        raise


def _check(settings: ModelServerSettings, gateway: Settings) -> None:
    """The quick checks, made before anything is installed."""
    if gateway.port == 0:
        raise CannotStart("GATEWAY_PORT must be a port of your choice for `up`, but it is 0: take 9000, say.")
    if settings.node_rank:
        raise CannotStart(
            f"VLLM_NODE_RANK must be 0 for `up`, which starts the node that answers, but it is {settings.node_rank}: "
            "start the others by `vllm serve MODEL --headless` with the same options."
        )
    _check_ports(settings, gateway)
    if settings.port in (gateway.port, gateway.health_port):
        raise CannotStart(f"The gateway and the model server cannot both have port {settings.port}: set LLM_VLLM_PORT.")
    meminfo = Path("/proc/meminfo")
    if settings.python is None and meminfo.exists():
        preflight.check_memory(meminfo.read_text(), _MEMORY + (settings.cpu_kvcache_space or 1) * GIB)


def _check_ports(settings: ModelServerSettings, gateway: Settings) -> None:
    preflight.check_port("127.0.0.1", settings.port, "LLM_VLLM_PORT")
    _check_gateway_ports(gateway)


def _check_gateway_ports(gateway: Settings) -> None:
    for field in ("port", "health_port", "metrics_port"):
        port = getattr(gateway, field)
        if port is not None:
            preflight.check_port(gateway.host, port, names_of(field)[0])


def _read_app(settings: ModelServerSettings) -> vllm_app.App:
    try:
        return vllm_app.read(settings.app_config)
    except vllm_args.OptionError as error:
        raise CannotStart(str(error)) from None


def _prepare(settings: ModelServerSettings, model: str | None, environ: Mapping[str, str], display: Display) -> Served:
    """Find the model, then install the environment: a missing model is reported before the minutes of an install."""
    demo = model in (None, DEMO_NAME)
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    found = None if demo or model is None else _find_model(model, environ, token, display)
    python = settings.python
    if python is None:
        python = install.ensure_environment(environ, display)
    else:
        # Absolute: a Path drops a leading ./, and a bare file name would then be looked up in PATH.
        python = python.absolute() if python.exists() else python
        _check_has(python, "vllm", "vLLM: name one that has, or leave --vllm-python out")
    if found is None:
        folder = demo_model.ensure_demo_model(environ, python, display)
        return Served(python, str(folder), settings.served_name or DEMO_NAME, demo=True, local=True)
    name = settings.served_name or found.name
    variables = {**found.environment}
    if model_source.is_bucket(found.name):
        variables |= _streamer(settings, python, environ, display)
    return Served(python, found.name, name, demo=False, local=found.local, environment=variables)


def _streamer(
    settings: ModelServerSettings, python: Path, environ: Mapping[str, str], display: Display
) -> dict[str, str]:
    """The variables by which vLLM finds its bucket reader, the streamer.

    A Python of the user must have its own; for our environment it is installed beside.
    """
    if settings.python is not None:
        _check_has(python, "runai_model_streamer", "Run:ai's Model Streamer for s3://: install vllm[runai] there")
        return {}
    folder = install.ensure_streamer(environ, python, display)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), environ.get("PYTHONPATH"))))}


def _find_model(model: str, environ: Mapping[str, str], token: str | None, display: Display) -> model_source.Model:
    with display.task("Unpacking the model") as update:

        def watch(done: int, total: int) -> None:
            update(done / total)

        return model_source.find_model(model, environ, token, watch=watch)


def _check_has(python: Path, module: str, told: str) -> None:
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    try:
        missing = subprocess.run([python, "-c", look], check=False, capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotStart(f"--vllm-python {python} cannot be run ({error}): name a Python that has vLLM.") from None
    if missing:
        raise CannotStart(f"The Python {python} has no {told}.")


def _wait_for(server: ModelServer, served: Served, display: Display) -> None:
    display.say(f"Starting vLLM with {served.name}; its log: {server.log}")
    display.say("Even of a small model that is half a minute or more: PyTorch is imported in each of vLLM's processes.")
    began = time.monotonic()
    with display.task("Starting vLLM", in_steps=True) as update:

        def pause(seconds: float) -> None:
            share = (time.monotonic() - began) / _USUAL_START
            update(min(share, 0.95), server.step())
            time.sleep(seconds)

        server.wait_ready(pause)
        update(1.0)


def _upstream(settings: ModelServerSettings) -> str:
    return f"http://127.0.0.1:{settings.port}"


def _gateway_grace(gateway: Settings) -> float:
    """Seconds that the gateway gets to end: its drain and 5 s for the rest."""
    drain = gateway.drain_timeout if "drain_timeout" in gateway.model_fields_set else _DRAIN
    return gateway.drain_delay + drain + 5


def _gateway_environment(settings: ModelServerSettings, environ: Mapping[str, str]) -> dict[str, str]:
    ours = {"GATEWAY_LOG_FORMAT": "text", "GATEWAY_DRAIN_TIMEOUT": str(_DRAIN)}
    found = ours | dict(environ) | {"GATEWAY_UPSTREAMS": _upstream(settings)}
    # An older name of GATEWAY_UPSTREAMS, which is set above: two different values would cause a warning.
    found.pop("LLM_MODEL_SERVER_ENDPOINT", None)
    for token in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        found.pop(token, None)
    return found


def _wait_for_gateway(server: ModelServer, front: Child, gateway: Settings) -> None:
    url, until = own_url(gateway), time.monotonic() + _GATEWAY_START
    assert front.pid is not None
    while True:
        answers = _answers(f"{url}/v1/health_check")
        preflight.check_nobody_else(gateway.host, gateway.port, "GATEWAY_PORT", front.pid)
        server.check_alive()
        _check_front(front)
        if answers:
            return
        if time.monotonic() > until:
            raise CannotStart(f"The gateway on {url} is not ready after {_GATEWAY_START} s; its lines are above.")
        time.sleep(_TICK)


def _answers(url: str) -> bool:
    try:
        # No verification: our certificate is for the name by which others reach this machine.
        return httpx.get(url, trust_env=False, timeout=5, verify=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _watch(server: ModelServer, front: Child) -> None:
    """Check both until one of them ends (raises CannotStart) or a signal comes; never returns."""
    while True:
        server.check_alive()
        _check_front(front)
        time.sleep(_TICK)


def _check_front(front: Child) -> None:
    code = front.exit_code()
    if code is not None:
        raise CannotStart(f"The gateway ended with {code}; its lines are above.")


def _what_to_try(gateway: Settings, served: Served, log: Path) -> Iterator[str]:
    url = own_url(gateway)
    model = served.name
    simplified = {"messages": {"system": "You are a helpful assistant.", "user": "What is Deep Learning?"}}
    openai = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}]}
    yield f"\nReady: the gateway on {url}, in front of vLLM with {model}. Try:\n"
    keyed = bool(gateway.api_keys) or gateway.api_keys_file is not None
    yield _curl(url, simplified | {"streaming": False}, keyed=keyed)
    yield _curl(url, openai, keyed=keyed)
    if gateway.page:
        yield f"\nIn a browser: {url}/"
    yield f"\nvLLM's log: {log}\nStop both with Ctrl-C."
    yield from _devices()


def _curl(url: str, body: Mapping[str, object], *, keyed: bool) -> str:
    headers = "-H 'Content-Type: application/json'"
    if keyed:
        headers += f' -H "Authorization: Bearer ${CLIENT_KEY}"'
    return f"curl {url}/v1/chat/completions {headers} -d {shlex.quote(json.dumps(body))}"


def _devices(
    find: Callable[[str], str | None] = shutil.which, exists: Callable[[Path], bool] = Path.exists
) -> Iterator[str]:
    """How to use the accelerators of this machine, if it has any."""
    command = "vllm-gateway up --model ORG/NAME --vllm-python PATH, with a Python that has a vLLM for"
    if find("nvidia-smi") or exists(Path("/dev/nvidia0")):
        yield f"\nThis machine has an NVIDIA GPU. To use it: {command} CUDA."
    if find("hl-smi") or exists(Path("/dev/accel/accel0")):
        yield f"\nThis machine has an Intel Gaudi. To use it: {command} Gaudi."
