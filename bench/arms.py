"""The gateways that are compared: how each is installed, started and asked."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import httpx

from bench import processes

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-gateway" / "bench"
MOCK_PORT = 18008
# These take seconds for what the others do in one.
SLOW = {"starlette-httpx", "litellm"}
# The gateway as a checkout has it, where the other arms that are ours are compiled as the image is.
PLAIN = "gateway-plain"
# Those with an environment of their own, by its lock.
_PEERS = {name: HERE / "requirements" / f"{name}.lock" for name in ("vllm-router", "litellm")}

_KEY = "sk-of-the-benchmark-1234567890"

_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr warn;
worker_rlimit_nofile 20000;
events {{ worker_connections 9000; }}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  client_max_body_size 16m; client_body_buffer_size 128k;
  keepalive_requests 1000000;
  upstream vllm {{ server 127.0.0.1:{mock}; keepalive 512; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://vllm; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""

_LITELLM = """
model_list:
  - model_name: demo
    litellm_params: {{model: openai/demo, api_base: "http://127.0.0.1:{mock}/v1", api_key: none}}
litellm_settings: {{num_retries: 0}}
"""


@dataclass
class Arm:
    """A gateway that runs, and how it is asked: in the simplified form, more slowly, with a key."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    simplified: bool = False
    slow: bool = False
    key: str = ""

    @property
    def pid(self) -> int:
        """The root of its process tree."""
        return self.process.pid


class Missing(Exception):
    """Something that the benchmark needs is not there; the text says what to do."""


def python() -> str:
    """The distribution's interpreter, if it is new enough.

    It is built with profile-guided optimization, as are those of Docker's images; one that was built
    by hand is mostly not, and slower by a sixth.
    """
    distributions = "/usr/bin/python3"
    new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
    with contextlib.suppress(OSError):
        if subprocess.run([distributions, "-c", new_enough], check=False).returncode == 0:
            return distributions
    return sys.executable


def environment_of_ours() -> Path:
    """The programs of the environment that the gateway and its compiler run in; it has no gateway itself."""
    image, *more = (REPOSITORY / "requirements" / f"{name}.lock" for name in ("image", "build", "compile"))
    return environment("gateway", image, python(), *more, compiled=True)


def compiled_package() -> Path:
    """The folder of a copy of the package that is compiled; made anew where the source is another."""
    tool = environment_of_ours() / "python"
    sources = [*(REPOSITORY / "gateway").rglob("*.py"), REPOSITORY / "setup.py", REPOSITORY / "pyproject.toml"]
    found = hashlib.sha256(str(tool).encode())
    for file in sorted(sources):
        found.update(f"{file.relative_to(REPOSITORY)} ".encode() + file.read_bytes())
    folder = CACHE / "compiled"
    stamp = folder / "of"
    if stamp.exists() and stamp.read_text() == found.hexdigest():
        return folder
    click.echo(f"compiling the gateway (into {folder})")
    shutil.rmtree(folder, ignore_errors=True)
    # Never in the checkout, where what was compiled would win over a file that has changed since.
    shutil.copytree(REPOSITORY / "gateway", folder / "gateway", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    done = subprocess.run(
        [tool, "setup.py", "--quiet", "build_ext", "--inplace"],
        env={**os.environ, "GATEWAY_COMPILE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        check=False,
    )
    if done.returncode:
        raise Missing(f"The gateway could not be compiled; it said:\n{done.stdout[-2000:]}")
    stamp.write_text(found.hexdigest())
    return folder


def environment(name: str, lock: Path, interpreter: str, *more: Path, compiled: bool = False) -> Path:
    """The folder of a virtual environment with what `lock` names, and `more` of them; made once.

    `compiled` all of it, which takes half a minute of LiteLLM's packages: they are imported once or twice.
    """
    # Not by the link to it in a checkout's own environment, so that every checkout shares what is made.
    interpreter = os.path.realpath(interpreter)
    locks = [lock, *more]
    key = hashlib.sha256(b"".join(lock.read_bytes() for lock in locks) + interpreter.encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Two processes may want it at the same time: the second waits for what the first one makes.
    with open(CACHE / f"{name}.lock", "w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        _make(name, folder, locks, interpreter, compiled=compiled)
    return folder / "bin"


def _make(name: str, folder: Path, locks: list[Path], interpreter: str, *, compiled: bool) -> None:
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        click.echo(f"installing {name} (once, into {folder})")
        subprocess.run([interpreter, "-m", "venv", "--without-pip", str(folder)], check=True)
        # The pip that runs this one: a distribution's Python may come without.
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
        pip += ["--disable-pip-version-check", "--only-binary", ":all:", "--compile" if compiled else "--no-compile"]
        # A lock is complete; for the dependency on an extra, pip would take the newest version (pypa/pip#9644).
        pip += ["--no-deps", "--require-hashes", *(word for lock in locks for word in ("-r", str(lock)))]
        done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise Missing(f"{name} could not be installed; pip said:\n{done.stdout[-2000:]}")
        (folder / "ready").touch()


def need_tools() -> None:
    """nginx, wrk and taskset, installed where we may; raises Missing."""
    missing = [
        name for name in ("nginx", "wrk", "taskset") if not (shutil.which(name) or Path(f"/usr/sbin/{name}").exists())
    ]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = ["-qq", "--no-install-recommends"]
        subprocess.run(["apt-get", "update", "-qq"], check=True, stdout=subprocess.DEVNULL)
        install = ["apt-get", "install", "-y", *quiet, "nginx-light", "wrk", "util-linux"]
        # Debian's package starts its service; nothing of ours uses it.
        blocked = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=blocked)
    elif missing:
        raise Missing(f"The benchmark needs {', '.join(missing)}: install them (Debian: apt install nginx-light wrk).")


@contextlib.contextmanager
def running(
    names: list[str], folder: Path, cores: tuple[int, int]
) -> Iterator[tuple[dict[str, Arm], subprocess.Popen[bytes]]]:
    """The mock on the first core and the arms on the second, all answering."""
    installed = _install([name for name in names if name in _PEERS])
    ours = installed["gateway"]
    mock = [str(ours / "python"), "-m", "bench.mock", str(MOCK_PORT)]
    started: list[subprocess.Popen[bytes]] = []
    # Of the working folder nothing is imported, as the compiled copy is to come before what is there.
    path = {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}
    compiled = os.pathsep.join(map(str, (compiled_package(), REPOSITORY)))
    try:
        upstream = processes.start(mock, cores[0], folder / "mock.log", path)
        started.append(upstream)
        _wait(MOCK_PORT, "/health", upstream, folder / "mock.log")
        arms = {}
        for number, name in enumerate(names):
            port, log = MOCK_PORT + 1 + number, folder / f"{name}.log"
            command, extra, health = _command(name, port, folder, installed)
            own = {} if name == PLAIN else {"PYTHONPATH": compiled}
            process = processes.start(command, cores[1], log, {**path, **own, **extra})
            started.append(process)
            _wait(port, health, process, log)
            key = _KEY if name == "gateway-keyed" else ""
            arms[name] = Arm(name, port, process, name == "gateway-simplified", name in SLOW, key)
        yield arms, upstream
    finally:
        for process in started:
            processes.stop(process)


def _install(peers: list[str]) -> dict[str, Path]:
    """The programs of our environment, `gateway`, and of these peers'; at the same time, as pip mostly waits."""
    with ThreadPoolExecutor() as pool:
        ours = pool.submit(environment_of_ours)
        made = {name: pool.submit(environment, name, _PEERS[name], sys.executable) for name in peers}
        return {name: one.result() for name, one in {"gateway": ours, **made}.items()}


def _command(name: str, port: int, folder: Path, installed: dict[str, Path]) -> tuple[list[str], dict[str, str], str]:
    """What starts an arm, what it adds to the environment, and the path that answers once it is up."""
    upstream = f"http://127.0.0.1:{MOCK_PORT}"
    if name == "nginx":
        config = folder / "nginx.conf"
        config.write_text(_NGINX.format(folder=folder, port=port, mock=MOCK_PORT))
        return [shutil.which("nginx") or "/usr/sbin/nginx", "-c", str(config), "-p", str(folder)], {}, "/health"
    if name == "vllm-router":
        tool = installed[name] / "vllm-router"
        options = ["--worker-urls", upstream, "--policy", "round_robin", "--prometheus-port", str(port + 100)]
        return [str(tool), "--host", "127.0.0.1", "--port", str(port), *options], {}, "/health"
    if name == "litellm":
        tool = installed[name] / "litellm"
        config = folder / "litellm.yaml"
        config.write_text(_LITELLM.format(mock=MOCK_PORT))
        extra = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "PYTHONPATH": ""}
        # Without a key of its own, as are the other arms.
        extra["LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"] = "true"
        options = ["--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        return [str(tool), *options, "--telemetry", "False"], extra, "/health/liveliness"
    if name == "starlette-httpx":
        return [str(installed["gateway"] / "python"), "-m", "bench.proxy", upstream, str(port)], {}, "/health"
    settings = {
        "GATEWAY_UPSTREAMS": upstream,
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "GATEWAY_SHORTCUT": "off" if name == "gateway-asgi" else "on",
        "GATEWAY_API_KEYS": _KEY if name == "gateway-keyed" else "",
    }
    return [str(installed["gateway"] / "python"), "-m", "gateway", "serve"], settings, "/v1/health_check"


def _wait(port: int, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise Missing(f"{process.args!r} did not come up; it said:\n{log.read_text(errors='replace')[-2000:]}")
