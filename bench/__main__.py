"""Runs the benchmark: every cell on every arm, in rounds, and writes what came of it to bench/results."""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from bench import arms as arms_
from bench import machine, report
from bench.arms import Arm, Missing
from bench.cells import Cell, Cells, Failed, Outcomes, prompt_67k
from bench.processes import rss_kb, signal_all

RESULTS = Path(__file__).parent / "results"
QUICK = ["vllm-router", "gateway", "gateway-plain"]
ALL = [
    "nginx",
    "vllm-router",
    "gateway",
    "gateway-plain",
    "gateway-keyed",
    "gateway-asgi",
    "gateway-simplified",
    "starlette-httpx",
    "litellm",
]
# Five rounds of everything, and then some more of what bars are set for, as a shared machine is noisy.
ROUNDS, OFTEN_ROUNDS, QUICK_ROUNDS = 5, 7, 4
# Then the gateway alone has one more, to see whether its memory grows; before it and after it are ten bursts.
BURSTS = 10
BURST = "open-2000"
# Delays take many turns, which leave no time for others after the first round.
DELAYS = "streams-300"
OFTEN = {
    "json-64": {"nginx", "vllm-router", "gateway", "gateway-plain", "gateway-keyed", "gateway-simplified"},
    "prompt-67k": {"vllm-router", "gateway", "gateway-plain"},
    "streams-100": {"vllm-router", "gateway", "gateway-plain", "gateway-simplified"},
    DELAYS: {"direct", "vllm-router", "gateway"},
}
# The slow ones have one round, and not every cell.
FOR_SLOW = {"json-1", "json-64", "prompt-67k", "leave-answer", "leave-wait"}
# A key is looked at once a request, whatever that asks for.
FOR_KEYED = {"json-64"}
# What a process has once grown to it keeps, so that only its first streams tell what they take.
ONCE = {BURST}


@click.command()
@click.option("--quick", is_flag=True, help="Three arms and the cells that matter most, in under two minutes.")
def main(quick: bool) -> None:
    """Compare this gateway with its peers on this machine, and write bench/results."""
    console = Console()
    # As Ctrl-C does, so that what was started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        arms_.need_tools()
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise Missing("The benchmark needs two cores: one for the gateways, one for the load.")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit if limit < 20_000 else 20_000, limit))
        names = QUICK if quick else ALL
        console.print(f"the gateway's Python: {_python()}", markup=False)
        # Off the core on which gateways are measured.
        os.sched_setaffinity(0, {cores[0]})
        samples, failures = _run(console, names, (cores[0], cores[-1]), quick=quick)
    except Missing as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(1)
    shown = ["direct", *names]
    console.print(report.table(samples, shown), report.bars_as_text(samples), sep="\n", markup=False, soft_wrap=True)
    if not quick:
        _write(samples, shown, failures)
        console.print(f"written to {RESULTS}")
    if failures:
        console.print("Failed:", *failures, sep="\n", style="red", markup=False)
        sys.exit(1)


def _run(
    console: Console, names: list[str], cores: tuple[int, int], *, quick: bool
) -> tuple[report.Samples, list[str]]:
    """What was measured, and the cells that failed, in words."""
    samples: report.Samples = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    failures: list[str] = []
    rounds = QUICK_ROUNDS if quick else OFTEN_ROUNDS
    with tempfile.TemporaryDirectory() as folder, arms_.running(names, Path(folder), cores) as (arms, mock):
        direct = Arm("direct", arms_.MOCK_PORT, mock)
        cells = _cells(Cells(Path(folder), cores[0]), quick=quick)
        for arm in arms.values():
            samples["idle"][arm.name]["rss_mb"] = [rss_kb(arm.pid) / 1024]
            # What does not run now must not take the core from what does.
            signal_all(arm.process, signal.SIGSTOP)
        # Drawn between two cells, not in them.
        with Progress(console=console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task("", total=rounds * len(cells))
            for number in range(rounds):
                for cell, work in cells.items():
                    progress.update(task, advance=1, description=f"round {number + 1}: {cell}", refresh=True)
                    order = [arm for arm in (direct, *arms.values()) if _wanted(arm.name, cell, number)]
                    first = number % max(len(order), 1)
                    order = [*order[first:], *order[:first]]
                    _add(samples, failures, cell, work(order))
        for name, megabytes in _at_rest(list(arms.values()), 16).items():
            samples["after"][name]["rss_mb"] = [megabytes]
        if quick:
            return samples, failures
        own = arms["gateway"]
        _bursts(samples, failures, "bursts", own, cells[BURST])
        for cell, work in cells.items():
            _add(samples, failures, f"{cell}, again", work([own]))
        _bursts(samples, failures, "bursts, again", own, cells[BURST])
    return samples, failures


def _bursts(samples: report.Samples, failures: list[str], when: str, arm: Arm, burst: Cell) -> None:
    for _ in range(BURSTS):
        _add(samples, failures, f"{BURST}, {when}", burst([arm]))
        samples[when][arm.name]["rss_mb"].append(_at_rest([arm], 2)[arm.name])


def _add(samples: report.Samples, failures: list[str], cell: str, outcomes: Outcomes) -> None:
    for arm, figures in outcomes.items():
        if isinstance(figures, Failed):
            failures.append(f"{arm}, {cell}: {figures}")
            continue
        for figure, turns in figures.items():
            samples[cell][arm][figure] += turns


def _wanted(arm: str, cell: str, number: int) -> bool:
    if arm in arms_.SLOW:
        return number == 0 and cell in FOR_SLOW
    if arm == "gateway-keyed" and cell not in FOR_KEYED:
        return False
    if number >= (1 if cell == DELAYS else ROUNDS):
        return arm in OFTEN.get(cell, ())
    return number == 0 or cell not in ONCE


def _at_rest(arms: list[Arm], seconds: float) -> dict[str, float]:
    """The arms' memory in MB, once they have had so long to tidy up: 16 s are enough for connections to end, too."""
    for arm in arms:
        signal_all(arm.process, signal.SIGCONT)
    time.sleep(seconds)
    for arm in arms:
        signal_all(arm.process, signal.SIGSTOP)
    return {arm.name: rss_kb(arm.pid) / 1024 for arm in arms}


def _cells(cells: Cells, *, quick: bool) -> dict[str, Cell]:
    chosen: dict[str, Cell] = {
        "json-64": cells.json(64),
        "prompt-67k": cells.json(32, prompt_67k()),
        "streams-100": cells.paced(100),
        DELAYS: cells.paced(300, turns=8 if quick else 16),
    }
    if not quick:
        # First, on processes that have held nothing yet.
        chosen = {BURST: cells.memory(2000)} | chosen
        chosen |= {
            # In one go: a request that is held up from turn to turn would be told as a delay.
            "json-1": cells.json(1, turns=1, seconds=1),
            "streams-flood": cells.flood(32, 200),
            "leave-answer": cells.leaving(after=0),
            "leave-wait": cells.leaving(after=0.2),
        }
    return chosen


def _write(samples: report.Samples, arms: list[str], failures: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    cpu, commit = machine.cpu(), machine.commit()
    python = _python()
    measured_on = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python of the gateway": python,
        "load before": os.getloadavg()[2],
        "commit": commit,
        "versions": {name: version(name) for name in ("uvicorn", "uvloop", "httptools", "starlette", "httpx", "orjson")}
        | {"vllm-router": "0.1.17", "litellm": "1.106.2", "nginx": _nginx_version()},
    }
    (RESULTS / "results.json").write_text(
        json.dumps({"machine": measured_on, "failures": failures, "samples": samples}, indent=1) + "\n"
    )
    line = f"{cpu}, {os.cpu_count()} cores, Linux {platform.release()}, {python}, nginx {_nginx_version()}"
    text = f"# Results\n\n{line}; commit {commit}. Medians, and (the quartiles) of all turns.\n\n"
    text += "".join(f"Failed: {failure}\n\n" for failure in failures)
    text += report.table(samples, arms) + "\n" + report.bars_as_text(samples) + "\n![chart](chart.svg)\n"
    (RESULTS / "README.md").write_text(text)
    (RESULTS / "chart.svg").write_text(report.chart(samples, arms, "One core each; shorter is better"))


def _python() -> str:
    """The interpreter of the gateway's arms, and where it is."""
    interpreter = arms_.python()
    told = subprocess.run([interpreter, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return f"{told} ({interpreter})"


def _nginx_version() -> str:
    told = subprocess.run(["/usr/sbin/nginx", "-v"], capture_output=True, text=True, check=False).stderr
    return told.rpartition("/")[2].strip()


if __name__ == "__main__":
    main()
