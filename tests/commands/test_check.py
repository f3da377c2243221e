"""`check`: its verdict, what it marks, what it knows of an `up`, and what it says inside a container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gateway.cache.running import Running, announced, folder_in, found
from gateway.cli import main
from gateway.commands.check import examine, lines
from gateway.config.secrets import read_secrets
from gateway.config.settings import Settings
from gateway.modelserver.preflight import CannotStart
from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import Gateway
from tests.support.ports import free_port

Check = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an `up` of this user says that it runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return folder_in(tmp_path / "vllm-gateway")


@pytest.fixture
def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def check(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["check", *arguments], prog_name="vllm-gateway")
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().out

    return check


def running(gateway: str, upstream: str = "http://127.0.0.1:1") -> Running:
    return Running(os.getpid(), gateway, upstream, "demo", "/logs/vllm.log")


def said(settings: Settings, up: Sequence[Running] = (), *, in_container: bool = False) -> list[str]:
    return [*lines(examine(settings, read_secrets(settings), [], up, in_container=in_container))]


@pytest.mark.parametrize(
    ("url", "in_container", "warned"),
    [
        ("http://localhost:9", True, True),
        ("http://127.0.0.1:9", True, True),
        ("http://localhost:9", False, False),
        ("http://no.such.invalid:9", True, False),
    ],
)
def test_an_upstream_at_localhost_inside_a_container_is_warned_of(url: str, in_container: bool, warned: bool) -> None:
    got = said(Settings(GATEWAY_UPSTREAMS=(url,)), in_container=in_container)

    assert got[0] == "No call would succeed: no model server serves."
    assert any("the container itself" in line for line in got) == warned


def test_the_verdict_comes_first_and_what_is_no_default_is_marked(
    check: Check, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "9001")
    monkeypatch.setenv("GATEWAY_HOST", "0.0.0.0")
    monkeypatch.setenv("GATEWAY_MODEL_ALIASES", "a=demo,b=demo")
    monkeypatch.setenv("GATEWAY_UPSTREAM_API_KEY", "s3cret")
    monkeypatch.setenv("GATEWAY_API_KEYS", "s3cret-0123456789abcdef")
    status, out = check("--upstream", fake.url)

    first, second, *rest = out.splitlines()
    assert (status, first) == (0, f"A call would succeed: {fake.url} serves demo.")
    assert second == f"{fake.url} is serving: demo"
    assert f"* GATEWAY_UPSTREAMS = {fake.url} (default: http://localhost:8008)" in rest
    assert "* GATEWAY_PORT = 9001 (default: 9000)" in rest
    assert "  GATEWAY_HOST = 0.0.0.0" in rest
    assert "* GATEWAY_MODEL_ALIASES = a=demo,b=demo (default: (not set))" in rest
    assert "* GATEWAY_UPSTREAM_API_KEY = (set, hidden) (default: (not set))" in rest
    assert "* GATEWAY_API_KEYS = (set, hidden) (default: (not set))" in rest
    assert sum(line.startswith("*") for line in rest) == 5
    assert "s3cret" not in out


def test_json_has_the_same(check: Check, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TLS_CERT_FILE", "")
    monkeypatch.setenv("GATEWAY_UPSTREAM_API_KEY", "s3cret")
    status, out = check("--upstream", fake.url, "--json")
    failed, wrong = check("--upstream", "ftp://x", "--json")

    got, bad = json.loads(out), json.loads(wrong)
    assert (status, got["ok"], got["warnings"], got["gateways"]) == (0, True, [], [])
    assert [(one["url"], one["state"], one["models"]) for one in got["upstreams"]] == [(fake.url, "serving", ["demo"])]
    assert got["settings"].keys() == {line.split(" = ")[0].strip("* ") for line in said(Settings()) if " = " in line}
    assert got["settings"]["GATEWAY_UPSTREAMS"] == {
        "value": [fake.url],
        "default": ["http://localhost:8008"],
        "differs": True,
    }
    assert got["settings"]["GATEWAY_PORT"] == {"value": 9000, "default": 9000, "differs": False}
    assert got["settings"]["GATEWAY_UPSTREAM_API_KEY"]["value"] == "(set, hidden)"
    assert (failed, bad["ok"]) == (1, False)
    assert bad["errors"][0].startswith("GATEWAY_UPSTREAMS is wrong: 'ftp://x'")


def test_the_gateway_that_up_runs_is_asked_whatever_its_ports_are(
    check: Check, folder: Path, gateway: Gateway, fake: FakeVllm
) -> None:
    with announced(folder, running(gateway.url, fake.url)):
        status, out = check()
        _, told = check("--json")
    later, _ = check()

    assert (status, later) == (0, 1)
    assert out.splitlines()[:3] == [
        f"A call would succeed: the gateway on {gateway.url} serves demo.",
        f"`up` (process {os.getpid()}) runs the gateway on {gateway.url} in front of vLLM on {fake.url} with demo: "
        "serving; vLLM's log: /logs/vllm.log",
        f"{fake.url} is serving: demo",
    ]
    assert json.loads(told)["gateways"] == [
        {
            "url": gateway.url,
            "pid": os.getpid(),
            "upstream": fake.url,
            "model": "demo",
            "log": "/logs/vllm.log",
            "status": "serving",
        }
    ]


def test_an_upstream_that_is_named_is_asked_though_an_up_runs(check: Check, folder: Path, gateway: Gateway) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with announced(folder, running(gateway.url)):
        status, out = check("--upstream", url)

    assert status == 1
    assert f"{url} is loading: it refuses connections" in out
    assert f"runs the gateway on {gateway.url}" in out


def test_an_up_that_does_not_answer_yet_is_told_of(check: Check, folder: Path) -> None:
    with announced(folder, running(f"http://127.0.0.1:{free_port()}")):
        status, out = check()

    assert status == 1
    assert "with demo: no answer yet; vLLM's log: /logs/vllm.log" in out


def test_where_nothing_is_named_and_nothing_runs_it_says_what_to_do(check: Check) -> None:
    status, out = check()

    assert status == 1
    assert "http://localhost:8008 is the default, and no `up` of this user runs on this machine: name" in out


def test_an_up_that_was_killed_is_not_found_and_its_file_goes(folder: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom gateway.cache.running import Running, announced\n"
        "with announced(Path(sys.argv[1]), Running(os.getpid(), 'a', 'b', 'c', 'd')):\n"
        "    print('on', flush=True)\n    signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "on\n"
        assert [one.pid for one in found(folder)] == [killed.pid]
        assert (folder / f"{killed.pid}.json").stat().st_mode & 0o777 == 0o600
        killed.kill()
    assert found(folder) == []
    assert [*folder.iterdir()] == [folder / f"{killed.pid}.json"]
    with announced(folder, running("http://127.0.0.1:1")):
        assert [one.pid for one in found(folder)] == [os.getpid()]
        assert len([*folder.iterdir()]) == 1
    assert [*folder.iterdir()] == []


def test_a_file_of_another_version_is_passed_over(folder: Path) -> None:
    with announced(folder, running("http://127.0.0.1:1")):
        (folder / f"{os.getpid()}.json").write_text('{"pid": 1}')
        assert found(folder) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotStart, match=r"cannot be written \(.*\): name another folder with XDG_CACHE_HOME"):
        announced(tmp_path / "file" / "up", running("http://127.0.0.1:1")).__enter__()
