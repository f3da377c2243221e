"""KEDA's query, the dashboard's and the alerts', asked of a real Prometheus that scrapes gateways under a known load.

Not among the tests that `make test` finds; `make test-kubernetes` runs it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.heavy.kubernetes.kustomized import FOLDER, Object
from tests.support.fake_vllm import EVENTS, METRICS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, chunk, response
from tests.support.gateway_process import Gateway, running
from tests.support.paths import ROOT
from tests.support.ports import free_port

MONITORING = ROOT / "compose" / "monitoring"
SCALED: Object = yaml.safe_load((FOLDER / "components" / "autoscaling" / "vllm.yaml").read_text())
QUERY: str = SCALED["spec"]["triggers"][0]["metadata"]["query"]
MODEL = QUERY.split('"')[1]
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "vllm-gateway.json").read_text())
DRAWN = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
(GROUP,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
KEY, SMALL = "sk-4f7d0c9a2b6e81d35a", "sk-9e01b7c64f2a83d5c7"
# What a vLLM tells beside what the fake one does, for the dashboard.
MORE = b"""vllm:prompt_tokens_total{engine="0",model_name="demo"} 400.0
vllm:prefix_cache_queries_total{engine="0",model_name="demo"} 400.0
vllm:prefix_cache_hits_total{engine="0",model_name="demo"} 300.0
process_resident_memory_bytes 2.5e+09
"""
# Of one gateway, two on each of two model servers run, and the rest wait; of the other all run.
FIRST, SECOND, ROOM = 6, 3, 2
PATIENCE = 30


class Prometheus:
    """A real one, by its HTTP API."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def get(self, path: str, **parameters: str) -> Any:
        """What it answers; fails with its own words where that is an error."""
        answer = self._client.get(path, params=parameters)
        assert answer.status_code == httpx.codes.OK, answer.text
        told = answer.json()
        assert (told["status"], told.get("warnings")) == ("success", None), answer.text
        return told["data"]

    def values(self, query: str) -> list[float]:
        """One for each series that a query finds."""
        return [float(one["value"][1]) for one in self.get("/api/v1/query", query=query)["result"]]

    def becomes(self, query: str, *values: float) -> None:
        """Wait until it finds these."""
        eventually(lambda: sorted(self.values(query)), sorted(values))


def eventually(found: Callable[[], Any], wanted: Any) -> None:
    until = time.monotonic() + PATIENCE
    while (last := found()) != wanted:
        assert time.monotonic() < until, f"it stays {last}, and not {wanted}"
        time.sleep(0.1)


@contextmanager
def scraping(folder: Path, **targets: list[str]) -> Iterator[Prometheus]:
    """Prometheus as the stack sets it up, but every second and of these targets."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / "alerts.yaml")]
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": targets[job["job_name"]]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"])
    try:
        eventually(lambda: is_ready(port), True)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(20)


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/ready", trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


class Load:
    """Two gateways in front of two model servers of KEDA's model and one of another, and calls that run on."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.servers = [stack.enter_context(FakeVllm(models=(model,))) for model in (MODEL, MODEL, "other")]
        for server in self.servers:
            server.probe_answers["/metrics"] = response("200 OK", METRICS + MORE, kind="text/plain; version=0.0.4")
        keys = folder / "keys"
        hashes = [hashlib.sha256(key.encode()).hexdigest() for key in (KEY, SMALL)]
        keys.write_text(f"rag {hashes[0]}\nsmall {hashes[1]} 1\n")
        urls = [server.url for server in self.servers]
        self.ports = [free_port(), free_port()]
        bounded: dict[str, Any] = {"max_in_flight_per_upstream": ROOM, "probe_interval": 0.05, "drain_timeout": 5}
        self.first, self.second = (
            stack.enter_context(running(*urls, metrics_port=port, **bounded, **more))
            for port, more in zip(self.ports, ({"api_keys_file": keys}, {}), strict=True)
        )
        self._holds: list[Hold] = []
        self._threads = stack.enter_context(ThreadPoolExecutor(FIRST + SECOND + 1))
        stack.callback(self.end)

    def call(self, gateway: Gateway, model: str = MODEL, key: str = KEY) -> int:
        """A stream, to its end: its status."""
        body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        with gateway.client(headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
            return client.post("/v1/chat/completions", json=body).status_code

    def begin(self) -> None:
        """Calls that end well and badly, and then those that run until the end."""
        assert [self.call(self.first) for _ in range(4)] == [200] * 4
        assert [self.call(self.first, key=SMALL) for _ in range(2)] == [200, 429]
        for server in self.servers[:2]:
            server.queue([response("500 Internal Server Error", b'{"error":{"message":"no","code":500}}')])
        assert [self.call(self.second) for _ in range(4)].count(500) >= 1
        for server in self.servers:
            server.clear()
            for _ in range(FIRST + SECOND):
                self._holds.append(hold := Hold())
                server.queue([STREAM_HEAD, chunk(EVENTS[0]), hold, *map(chunk, EVENTS[1:]), STREAM_END])
        all_of_them = [(self.first, FIRST, MODEL), (self.second, SECOND, MODEL), (self.second, 1, "other")]
        for gateway, count, model in all_of_them:
            for _ in range(count):
                self._threads.submit(self.call, gateway, model)

    def end(self) -> None:
        """All that runs ends."""
        for hold in self._holds:
            hold.release()


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    with ExitStack() as stack:
        made = Load(stack, tmp_path_factory.mktemp("gateways"))
        made.begin()
        yield made


@pytest.fixture(scope="module")
def prometheus(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped all of them several times."""
    gateways = [f"127.0.0.1:{port}" for port in load.ports]
    models = [f"127.0.0.1:{server.port}" for server in load.servers]
    with scraping(tmp_path_factory.mktemp("prometheus"), gateway=gateways, vllm=models) as asked:
        asked.becomes("count_over_time(up[1m]) >= bool 3", *[1.0] * 5)
        yield asked


def test_keda_sees_a_models_calls_in_all_gateways_that_run_and_that_wait(prometheus: Prometheus) -> None:
    prometheus.becomes(QUERY, FIRST + SECOND)
    waiting = FIRST - 2 * ROOM
    prometheus.becomes(f'gateway_model_waiting{{model="{MODEL}"}}', waiting, 0)
    prometheus.becomes(f'gateway_model_in_flight{{model="{MODEL}"}}', FIRST, SECOND)
    prometheus.becomes(QUERY.replace(MODEL, "other"), 1)


def test_keda_sees_none_of_a_model_that_was_never_called(prometheus: Prometheus) -> None:
    assert prometheus.values(QUERY.replace(MODEL, "never")) == [0]


@pytest.mark.parametrize("expression", DRAWN)
def test_what_the_dashboard_draws_has_series(prometheus: Prometheus, expression: str) -> None:
    assert prometheus.values(expression.replace("$__rate_interval", "20s")) != []


def test_the_alerts_are_rules_and_are_evaluated(prometheus: Prometheus) -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", MONITORING / "alerts.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(GROUP['rules'])} rules found" in done.stdout

    def evaluated() -> dict[str, str]:
        groups = prometheus.get("/api/v1/rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    eventually(evaluated, {rule["alert"]: "ok" for rule in GROUP["rules"]})


def test_an_alert_is_raised_by_what_it_is_for_and_no_other_is(prometheus: Prometheus) -> None:
    def raised() -> set[str]:
        return {alert["labels"]["alertname"] for alert in prometheus.get("/api/v1/alerts")["alerts"]}

    # Two calls wait, a tenth of the second gateway's failed, and the key was refused some.
    eventually(lambda: "CallsWait" in raised(), True)
    assert raised() <= {"CallsWait", "CallsFail", "KeyAtItsLimit"}


def test_all_is_none_again_when_the_calls_have_ended(prometheus: Prometheus, load: Load) -> None:
    load.end()
    prometheus.becomes(QUERY, 0)
