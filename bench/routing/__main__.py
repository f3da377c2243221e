"""Runs the simulation: every workload by every policy, what a choice costs and what is held; writes bench/results."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from random import Random

import click
from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.routing import report
from bench.routing.cost import Costs, costs
from bench.routing.memory import CALLS, memory
from bench.routing.policies import POLICIES
from bench.routing.servers import MEMORY, SERVERS
from bench.routing.simulation import cached_by_one, figures, simulate
from bench.routing.workloads import WORKLOADS

RESULTS = Path(__file__).parent.parent / "results"
SEEDS, QUICK_SEEDS = (1, 2, 3, 4, 5), (1,)
QUICK = ["least", "gateway"]
QUICK_CALLS = 60_000
GATEWAYS = (1, 3)
# Seconds that caches fill and gateways learn, and that are looked at.
WARM_UP, MEASURED = 55, 50


@click.command()
@click.option("--quick", is_flag=True, help="One seed and two policies, in half a minute.")
def main(quick: bool) -> None:
    """Compare this gateway's routing with its peers' on simulated servers, and write bench/results.

    Ends with 1 where a bar is missed.
    """
    console = Console()
    # First, as what the simulation leaves in memory makes all slower.
    cost = costs()
    held = memory(QUICK_CALLS if quick else CALLS)
    results = _run(console, QUICK if quick else list(POLICIES), QUICK_SEEDS if quick else SEEDS)
    bars = report.bars(results, cost, held)
    text = _text(results, cost, bars)
    console.print(text, markup=False, soft_wrap=True)
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        on = f"{machine.cpu()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
        head = f"# Routing\n\n{on}; commit {machine.commit()}. Medians of {len(SEEDS)} seeds.\n\n"
        (RESULTS / "routing.md").write_text(f"{head}{text}\n![chart](routing.svg)\n")
        (RESULTS / "routing.svg").write_text(report.chart(results))
        console.print(f"written to {RESULTS}")
    sys.exit(not all(bar.holds for bar in bars))


def _run(console: Console, policies: list[str], seeds: tuple[int, ...]) -> report.Results:
    results: report.Results = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(WORKLOADS) * len(seeds) * len(policies) * len(GATEWAYS))
        for workload, make in WORKLOADS.items():
            for seed in seeds:
                calls = list(make(Random(seed), WARM_UP + MEASURED))
                by_one = cached_by_one(calls, WARM_UP, SERVERS * MEMORY)
                for policy in policies:
                    for number in GATEWAYS:
                        progress.update(task, advance=1, description=f"{workload}, seed {seed}: {policy}")
                        random = Random(seed)
                        gateways = [POLICIES[policy](random) for _ in range(number)]
                        found = figures(simulate(calls, gateways, random), WARM_UP, by_one)
                        results.setdefault((workload, number, policy), []).append(found)
    return results


def _text(results: report.Results, cost: Costs, bars: list[report.Bar]) -> str:
    """All but the chart, in Markdown."""
    tables = [report.table(results, number) for number in GATEWAYS]
    return "\n".join(
        [
            "Of each policy: tokens that caches had, of those that one cache with all the memory would have had; "
            "the first token's median and 99th centile, ms; calls of the busiest upstream, of the mean.\n",
            *tables,
            report.bars_as_text(bars),
            "Microseconds a choice of this gateway: by load alone, as it was before prompts had keys and as it is; by "
            "a prompt's key, where prompts begin differently, where a template of 1.3 KB stands before each, and where "
            "all of it is popular; and what these are of those.\n",
            report.costs_table(cost),
        ]
    )


if __name__ == "__main__":
    main()
