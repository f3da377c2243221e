"""What the dashboard draws and the alerts watch is there: each expression is PromQL, and finds its series."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_vllm import EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, chunk, response
from tests.support.gateway_process import running
from tests.support.paths import AUTHORITY, ROOT

FOLDER = ROOT / "compose" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/vllm-gateway.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
DRAWN = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
KEY = "sk-4f7d0c9a2b6e81d35a"
# Of Prometheus itself, and of what `make test-docker` looks for in a vLLM.
OTHERS = re.compile(r"up$|vllm:|process_")


def selectors(expression: str) -> Iterator[Any]:
    """The series that it asks for."""
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression.replace("$__rate_interval", "5m")), visit)
    yield from found


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, str]]]:
    """All of a gateway in whose life everything has come about: names and labels."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"one {hashlib.sha256(KEY.encode()).hexdigest()} 3\n")
    settings = {"api_keys_file": str(keys), "tls_cert_file": str(AUTHORITY.parent / "good.pem")}
    with FakeVllm() as fake, FakeVllm() as other, running(fake.url, other.url, **settings) as gateway:
        call = {"model": "demo", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
        for one in (fake, other):
            one.queue(
                *[[STREAM_HEAD, *map(chunk, EVENTS), STREAM_END], [response("500 Internal Server Error", b"{}")]] * 2
            )
        with gateway.client(headers={"authorization": f"Bearer {KEY}"}) as client:
            statuses = {client.post("/v1/chat/completions", json=call).status_code for _ in range(5)}
            text = client.get("/metrics").text
    assert statuses == {200, 500, 429}
    families = text_string_to_metric_families(text)
    return [(sample.name, sample.labels) for family in families for sample in family.samples]


@pytest.mark.parametrize("expression", [*DRAWN, *(rule["expr"] for rule in RULES)])
def test_an_expression_finds_its_series(expression: str, series: list[tuple[str, dict[str, str]]]) -> None:
    asked = list(selectors(expression))
    assert asked
    for one in asked:
        if OTHERS.match(one.name):
            continue
        labels = [labels for name, labels in series if name == one.name]
        assert labels or one.name == "gateway_upstream_prefix_hit_ratio", one.name
        for matcher in one.matchers.matchers:
            assert all(matcher.name in found for found in labels), matcher.name
    for by in re.findall(r"by \(([^)]*)\)", expression):
        for name in {*re.split(r",\s*", by)} - {"instance"}:
            assert all(name in found for metric, found in series for one in asked if metric == one.name), name


def test_alerts_say_what_to_do_by_labels_that_there_are() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {*rule["annotations"]} == {"summary", "description"}
        kept = re.findall(r"by \(([^)]*)\)", rule["expr"])
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["description"]):
            assert not kept or all(label in by for by in kept), (rule["alert"], label)


def test_the_stack_has_prometheus_read_the_alerts() -> None:
    assert yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["rule_files"] == ["/etc/prometheus/alerts.yaml"]
    assert (
        "compose/monitoring/alerts.yaml:/etc/prometheus/alerts.yaml:ro"
        in Path(ROOT / "compose/docker-compose.yaml").read_text()
    )


def test_the_operators_table_has_every_alert() -> None:
    document = (ROOT / "docs" / "operate.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", document.partition("## Alerts")[2], re.MULTILINE) == [
        rule["alert"] for rule in RULES
    ]
