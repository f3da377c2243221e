"""The benchmark's report says what was measured; the measuring itself is run by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import report
from tests.support.paths import ROOT


def samples(gateway: float, router: float) -> report.Samples:
    cells: report.Samples = {}
    for arm, one in (("gateway", gateway), ("vllm-router", router)):
        cells.setdefault("json-64", {})[arm] = {"cpu_us_per_request": [one, one * 9, one]}
    for arm, one in (("direct", 1.0), ("gateway", 1.0 + gateway), ("vllm-router", 1.0 + router)):
        cells.setdefault("streams-300", {})[arm] = {"delay_p99_ms": [one * 50, one, one / 2]}
    return cells


def test_a_bar_is_held_by_the_median_of_what_was_measured_side_by_side() -> None:
    found = samples(gateway=40, router=100)
    # The machine was slower by half in two rounds of three, for both.
    for arm in ("gateway", "vllm-router"):
        figures = found["json-64"][arm]["cpu_us_per_request"]
        found["json-64"][arm]["cpu_us_per_request"] = [figures[0], figures[0] * 1.5, figures[0] * 1.5]
    bars = {name: (is_, most) for name, is_, most, _ in report.bars(found)}
    assert bars == {
        "CPU per JSON request, of vllm-router's": (0.4, 0.45),
        "added event delay p99 at 300 streams, of vllm-router's": (0.4, 1.0),
    }


def test_a_turn_in_which_the_machine_stood_still_is_left_out() -> None:
    found = samples(gateway=50, router=100)
    found["json-64"]["vllm-router"]["cpu_us_per_request"][0] = 0
    found["json-64"]["gateway"]["cpu_us_per_request"][1] = 0
    assert report.bars(found)[0][:2] == ("CPU per JSON request, of vllm-router's", 0.5)


@pytest.mark.parametrize(("again", "verdict"), [([57, 54, 58], "| 1 | 1.02 | 1 | holds |"), ([60, 57, 59], "misses")])
def test_memory_has_grown_when_the_mean_of_several_looks_has(again: list[float], verdict: str) -> None:
    looks = {"bursts": [55.0, 58.0, 56.0], "bursts, again": again}
    found: report.Samples = {when: {"gateway": {"rss_mb": turns}} for when, turns in looks.items()}
    (line,) = report.bars_as_text(found).splitlines()[2:]
    assert line.startswith("| memory after a second run, of the first's |")
    assert verdict in line


def test_a_bar_that_is_missed_is_said_to_be() -> None:
    assert "**misses**" not in report.bars_as_text(samples(gateway=40, router=100))
    assert report.bars_as_text(samples(gateway=70, router=100)).count("**misses**") == 1


def test_the_table_shows_medians_and_spread_and_a_dash_for_what_was_not_measured() -> None:
    table = report.table(samples(gateway=50, router=100), ["direct", "gateway"])
    assert "| CPU per JSON request, 64 connections, µs | - | 50 (50-250) |" in table
    assert "67 KB" not in table


def test_the_chart_is_well_formed_and_names_the_arms() -> None:
    chart = report.chart(samples(gateway=50, router=100), ["direct", "gateway", "vllm-router"], "A <title>")
    texts = [element.text for element in ElementTree.fromstring(chart).iter() if element.tag.endswith("text")]
    assert {"A <title>", "gateway", "vllm-router", "50", "100"} <= set(texts)
    assert "direct" not in texts


@pytest.mark.parametrize(
    ("gateway", "router", "is_"), [(0.5, -0.1, 50), (-0.1, 0.5, 0.02), (-0.1, -0.2, 1), (0.5, 1, 0.5)]
)
def test_a_peer_that_adds_no_delay_is_not_left_out(gateway: float, router: float, is_: float) -> None:
    delays = {"direct": 1.0, "gateway": 1.0 + gateway, "vllm-router": 1.0 + router}
    arms = {arm: {"delay_p99_ms": [one]} for arm, one in delays.items()}
    found: report.Samples = {"streams-300": arms}
    ((name, ratio, *_),) = report.bars(found)
    assert name.startswith("added event delay")
    assert ratio == pytest.approx(is_)


def test_two_that_want_an_environment_at_once_get_the_same(tmp_path: Path) -> None:
    (tmp_path / "empty.lock").touch()
    script = "import sys, pathlib as p, bench.arms as a; print(a.environment('x', p.Path(sys.argv[1]), sys.executable))"
    command = [sys.executable, "-c", script, str(tmp_path / "empty.lock")]
    given = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [one.communicate(timeout=60) for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert len({out.splitlines()[-1] for out, _ in said}) == 1
    assert sum(out.count("installing") for out, _ in said) == 1
