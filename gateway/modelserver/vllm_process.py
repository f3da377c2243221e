"""Starts and watches a local vLLM."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import httpx

from gateway.config.model_server_settings import ModelServerSettings
from gateway.config.settings import names_of
from gateway.modelserver import preflight, vllm_args
from gateway.modelserver.child_process import Child, last_lines
from gateway.modelserver.preflight import CannotStart

DEMO_NAME = "demo-model"

# In float32 the demo model runs on every processor; bfloat16 needs instructions that some containers forbid.
_DEMO_OPTIONS = {
    "SERVED_MODEL_NAME": DEMO_NAME,
    "VLLM_DTYPE": "float32",
    "VLLM_MAX_MODEL_LEN": "4096",
    "VLLM_EAGER": "true",
}
# The steps of a start in order: the text in the log that begins a step, and the step's name.
_STEPS = (
    (b"", "importing PyTorch and vLLM"),
    (b"non-default args", "reading the model's config"),
    (b"Resolved architecture", "starting its engine"),
    (b"Initializing a V1 LLM engine", "starting its workers"),
    (b"Starting to load model", "loading the weights"),
    (b"Loading weights took", "trying the model"),
    (b"Starting vLLM server", "opening its port"),
)
# The last line of a traceback in vLLM's log, and the number of lines above it that say where it was.
_ERROR = re.compile(r"^\(.*\) ERROR .*\] [\w.]+(Error|Exception)\b")
_ABOVE = 3
_HOST = "127.0.0.1"
_GRACE = 20
_TICK = 0.25
_PATIENCE = 2

# The user's own environment overrides each of these.
_ENVIRONMENT = {
    # By default vLLM binds its threads to cores that a container may not have.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
# Threads that spin while they wait do not speed up so small a model, and they slow down other programs.
_DEMO_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
_LOCAL_ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}


class Launch(NamedTuple):
    """How vLLM is started: its command line, its whole environment, and the seconds it gets to end after SIGTERM."""

    argv: list[str]
    environment: dict[str, str]
    grace: int = _GRACE


def launch(
    settings: ModelServerSettings,
    python: Path,
    model: str,
    environ: Mapping[str, str],
    options: Sequence[str] = (),
    *,
    demo: bool = False,
    local: bool = False,
) -> Launch:
    """Turn the settings into vLLM's command line and environment.

    `options` are vLLM options that come before the settings' options. Raises CannotStart if EXTRA_ARGS or another
    setting is wrong.
    """
    fields = ((names_of(field, ModelServerSettings)[0], value) for field, value in settings)
    given = {name: str(value) for name, value in fields if value is not None}
    argv = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    argv += ["--host", _HOST, "--port", str(settings.port), *options]
    try:
        argv += vllm_args.options((_DEMO_OPTIONS if demo else {}) | given)
    except vllm_args.OptionError as error:
        raise CannotStart(str(error)) from None
    environment = _environment(settings, environ, demo=demo, local=local)
    # The grace is added to the shutdown timeout, so that running answers keep their full time to end.
    return Launch(argv, environment, _GRACE + (settings.shutdown_timeout or 0))


def _environment(
    settings: ModelServerSettings, environ: Mapping[str, str], *, demo: bool, local: bool
) -> dict[str, str]:
    found = _ENVIRONMENT | (_DEMO_ENVIRONMENT if demo else {}) | (_LOCAL_ENVIRONMENT if local else {}) | dict(environ)
    space = settings.cpu_kvcache_space or (1 if demo else None)
    if space is not None:
        found["VLLM_CPU_KVCACHE_SPACE"] = str(space)
    if settings.hf_token is not None:
        found["HF_TOKEN"] = settings.hf_token.get_secret_value()
    return vllm_args.vllm_environment(found)


class ModelServer:
    """A vLLM on the loopback address, with its log in a file.

    with ModelServer(launch(settings, python, model, os.environ), settings.port, log) as server:
        server.wait_ready()
    """

    def __init__(self, command: Launch, port: int, log: Path, api_key: str | None = None) -> None:
        """`api_key` is the key that vLLM requires of its clients, if any."""
        self.url = f"http://{_HOST}:{port}"
        self.log = log
        self._port = port
        self._read = 0
        self._step = 0
        self._names = vllm_args.served_names(command.argv)
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._child = Child(command.argv, command.environment, log=log, grace=command.grace)
        self.exit_code: Callable[[], int | None] = self._child.exit_code

    def start(self) -> None:
        """Start vLLM, which answers only later, see `wait_ready`. Raises CannotStart."""
        try:
            self._child.start()
        except OSError as error:
            raise CannotStart(f"The model server cannot be started: {error}.") from None

    def is_ready(self) -> bool:
        """Whether vLLM lists its model under the given name.

        Raises CannotStart if another program has vLLM's port, or if vLLM refuses our key.
        """
        session = self._child.pid
        if session is None:
            return False
        answer = self._ask()
        # Checked after the request, because another program may have taken the port just before the answer.
        preflight.check_nobody_else(_HOST, self._port, "LLM_VLLM_PORT", session)
        if answer is None:
            return False
        if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise CannotStart(
                f"The model server refuses the gateway's key ({answer.status_code}): give both the same, as "
                "LLM_VLLM_API_KEY."
            )
        listed = _listed(answer)
        return bool(listed.intersection(self._names) if self._names else listed)

    def _ask(self) -> httpx.Response | None:
        try:
            return httpx.get(f"{self.url}/v1/models", headers=self._headers, trust_env=False, timeout=_PATIENCE)
        except httpx.HTTPError:
            return None

    def wait_ready(self, pause: Callable[[float], object] = time.sleep) -> None:
        """Wait until vLLM serves; `pause` is called between two checks. Raises CannotStart if vLLM ends before."""
        while not self.is_ready():
            self.check_alive()
            pause(_TICK)
        self.check_alive()

    def step(self) -> str:
        """The current step of the start, from the log's new lines since the last call."""
        with contextlib.suppress(OSError), self.log.open("rb") as log:
            log.seek(self._read)
            lines = log.read().rpartition(b"\n")[0]
            self._read += len(lines)
            self._step = max(
                number for number, (mark, _) in enumerate(_STEPS) if number == self._step or (mark and mark in lines)
            )
        return _STEPS[self._step][1]

    def check_alive(self) -> None:
        """Raise CannotStart, with the end of the log, if vLLM has ended."""
        code = self.exit_code()
        if code is not None:
            end = last_lines(self.log)
            raise CannotStart(
                f"The model server ended with {code}. {self._cause(end)}The end of its log, {self.log}:\n{end}"
            )

    def _cause(self, end: str) -> str:
        """The first error in the log, unless `end` has it: after one worker dies, errors of the others follow."""
        lines = last_lines(self.log, 1000).splitlines()
        at = next((number for number, line in enumerate(lines) if _ERROR.match(line)), None)
        if at is None or lines[at] in end:
            return ""
        return "Its first error:\n" + "\n".join(lines[max(0, at - _ABOVE) : at + 1]) + "\n"

    def stop(self) -> None:
        """End vLLM with all its processes; may be called again."""
        self._child.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _listed(answer: httpx.Response) -> set[str]:
    try:
        return {model["id"] for model in answer.json()["data"]} if answer.is_success else set()
    except (ValueError, LookupError, TypeError):
        return set()
