"""Metrics by model and by key: which values their labels have, and for how long."""

from __future__ import annotations

import hashlib
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gateway.admission.admission_queue import AdmissionQueue
from gateway.admission.arrivals import Arrivals
from gateway.admission.buffers import Buffers
from gateway.observability.labels import MOST, Labels
from gateway.observability.metrics import Metrics
from gateway.observability.own_version import own_build
from gateway.pool.upstream_pool import UpstreamPool
from tests.support.fake_vllm import FakeVllm, Hold, completion, response
from tests.support.gateway_process import running
from tests.support.paths import ROOT
from tests.support.recorders import FakeClock

CHAT = "/v1/chat/completions"
SECRETS = {name: f"sk-4f7d0c9a2b6e81d35a-{name}" for name in ("one", "two")}


def test_a_label_has_known_names_at_most_so_many_and_each_for_an_hour_more() -> None:
    clock, known, dropped = FakeClock(), ["a", "b"], list[str]()
    labels = Labels(lambda: known, clock.time, dropped.append)
    assert [labels.take(name) for name in ("a", "made-up", None, "b")] == ["a", "unknown", "unknown", "b"]
    assert labels == {"a": "a", "b": "b"}
    known[:] = ["b", *map(str, range(MOST))]
    taken = [labels.take(str(number)) for number in range(MOST)]
    assert taken == [*map(str, range(MOST - 2)), "other", "other"]
    clock.now += 3599
    labels.tidy()
    assert dropped == []
    clock.now += 2
    labels.tidy()
    assert dropped == ["a"]
    assert labels.take(str(MOST - 1)) == str(MOST - 1)
    clock.now += 1e6
    labels.tidy()
    assert dropped == ["a"]


def test_keys_and_models_have_figures_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    lines = [f"{name} {hashlib.sha256(key.encode()).hexdigest()}" for name, key in SECRETS.items()]
    file.write_text(f"{lines[0]} 2\n{lines[1]} in-flight=1\n")
    hold = Hold()
    with FakeVllm(models=("demo", "other")) as fake:
        fake.queue([response("200 OK", completion())], [hold, response("200 OK", completion())])
        with running(fake.url, api_keys_file=str(file)) as gateway, gateway.client() as client:

            def ask(name: str, model: str = "demo") -> int:
                call = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
                headers = {"authorization": f"Bearer {SECRETS[name]}"}
                return client.post(CHAT, json=call, headers=headers).status_code

            def told() -> str:
                return client.get("/metrics", headers={"x-api-key": SECRETS["one"]}).text

            assert (ask("one"), client.post(CHAT, json={}).status_code) == (200, 401)
            with ThreadPoolExecutor(2) as pool:
                first = pool.submit(ask, "two", "other")
                assert hold.reached.wait(10)
                second = pool.submit(ask, "two")
                until = time.monotonic() + 10
                while 'gateway_key_waiting{key="two"} 1.0' not in (now := told()):
                    assert time.monotonic() < until, now
                hold.release()
                assert (first.result(), second.result()) == (200, 200)
            assert [ask("one"), ask("one"), ask("one", "made-up")] == [200, 429, 429]
            text = told()
    assert 'gateway_key_in_flight{key="two"} 2.0' in now
    assert 'gateway_model_in_flight{model="other"} 1.0' in now
    assert 'gateway_model_waiting{model="demo"} 1.0' in now
    for line in (
        'gateway_key_requests_total{key="one",status="2xx"} 2.0',
        'gateway_key_requests_total{key="one",status="4xx"} 2.0',
        'gateway_key_requests_total{key="two",status="2xx"} 2.0',
        'gateway_key_limited_total{key="one"} 2.0',
        'gateway_key_tokens_total{key="one",kind="completion"} 8.0',
        'gateway_tokens_total{kind="completion",model="other",source="reported"} 4.0',
        'gateway_request_seconds_count{model="other"} 1.0',
        'gateway_key_in_flight{key="two"} 0.0',
    ):
        assert f"\n{line}\n" in text
    assert re.search(rf'^gateway_info\{{build="{own_build()}",version="[^"]+"\}} 1.0$', text, re.MULTILINE)
    assert not [line for line in text.splitlines() if "made-up" in line or SECRETS["one"] in line]


def no_figures() -> Metrics:
    """Of a gateway that has had no call."""
    nothing: set[Any] = set()
    queue: AdmissionQueue[Any] = AdmissionQueue(0)
    buffers = Buffers(1)
    return Metrics(
        UpstreamPool(()),
        nothing,
        queue,
        Arrivals(1, buffers, lambda: 0.0),
        buffers,
        lambda: 0.0,
        lambda: 0,
        {},
        tuple,
        lambda: None,
    )


def test_a_scrape_has_each_family_in_a_turn_of_its_own() -> None:
    """As those of very many keys and models would be one long turn together."""
    scrape, turns = no_figures().text().__await__(), 0
    text = b""
    while True:
        try:
            next(scrape)
        except StopIteration as end:
            text = end.value
            break
        turns += 1
    assert turns == text.count(b"# HELP gateway_") + text.count(b"# HELP process_")


def test_the_table_of_metrics_is_made_from_them() -> None:
    rows = ["| Metric | Type | Labels | Meaning |", "|---|---|---|---|"]
    for family in no_figures().collect():
        labels = ", ".join(f"`{label}`" for label in vars(family)["_labelnames"])
        name = f"{family.name}_total" if family.type == "counter" else family.name
        rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    made = "\n".join(rows)
    assert made in (ROOT / "docs/metrics.md").read_text(), f"put this into docs/metrics.md:\n{made}"
