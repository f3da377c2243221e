"""The figures as tables, as the bars that must hold, and as a chart."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from bench import svg
from bench.routing.cost import Costs
from bench.routing.memory import Memory
from bench.routing.simulation import Figures

# By workload, number of gateways and policy: one a seed.
Results = dict[tuple[str, int, str], list[Figures]]

# Who waits longer than this for a first token is not served any more, in seconds.
_OVERLOADED = 20.0
_COLOURS = {"gateway": "#0b7a4b", "least": "#6b7280", "vllm-router": "#b45309"}


@dataclass(frozen=True, slots=True)
class Bar:
    """What must hold."""

    name: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def table(results: Results, gateways: int) -> str:
    """Markdown: medians of the seeds, a line a policy and a column a workload."""
    workloads = list(dict.fromkeys(workload for workload, _, _ in results))
    policies = list(dict.fromkeys(policy for _, _, policy in results))
    lines = [f"| {_among(gateways)} | " + " | ".join(workloads) + " |", "|---|" + "--:|" * len(workloads)]
    for policy in policies:
        cells = [_cell(results[workload, gateways, policy]) for workload in workloads]
        lines.append(f"| {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _among(gateways: int) -> str:
    return "1 gateway" if gateways == 1 else f"{gateways} gateways"


def _median(seeds: list[Figures], figure: str) -> float:
    return median([float(getattr(one, figure)) for one in seeds])


def _cell(seeds: list[Figures]) -> str:
    hits = f"{_median(seeds, 'hits'):.2f}" if _median(seeds, "hits") else "-"
    times = [_milliseconds(_median(seeds, figure)) for figure in ("p50", "p99")]
    return f"{hits}, {'/'.join(times)}, {_median(seeds, 'busiest'):.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f}" if seconds <= _OVERLOADED else "> 20 s"


def costs_table(costs: Costs) -> str:
    """Markdown: microseconds, a line a size and a number of upstreams, and what a key's are of the least load's two."""
    loads, keyed = ("before", "least"), ("common", "all hot")
    kinds = (*loads, "common", "template", "all hot")
    titles = [*kinds, *[f"{kind} / {load}" for kind in keyed for load in loads]]
    lines = ["| body | upstreams | " + " | ".join(titles) + " |", "|---|--:|" + "--:|" * len(titles)]
    for (size, upstreams), found in costs.items():
        cells = [f"{found[kind]:.1f}" if kind in found else "-" for kind in kinds]
        cells += [f"{found[kind] / found[load]:.2f}" for kind in keyed for load in loads]
        lines.append(f"| {size} | {upstreams} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def bars(results: Results, costs: Costs, memory: dict[str, Memory]) -> list[Bar]:
    """All of them, of what was measured."""
    found = []
    for gateways in dict.fromkeys(number for _, number, _ in results):
        own = {name: seeds for (name, *of), seeds in results.items() if of == [gateways, "gateway"]}
        least = results["unique", gateways, "least"]
        slower = median(one.p99 / other.p99 for one, other in zip(own["unique"], least, strict=True))
        busiest = max(_median(seeds, "busiest") for seeds in own.values())
        found += [
            Bar(f"rag1, {_among(gateways)}: hits", _median(own["rag1"], "hits"), 0.9, at_least=True),
            Bar(f"rag1, {_among(gateways)}: first token's p99, s", _median(own["rag1"], "p99"), 2),
            Bar(f"hot, {_among(gateways)}: hits", _median(own["hot"], "hits"), 0.97, at_least=True),
            Bar(f"unique, {_among(gateways)}: first token's p99, of least's", slower, 1.6),
            Bar(f"any, {_among(gateways)}: calls of the busiest upstream, of the mean", busiest, 1.5),
        ]
    found += _bars_of_costs(costs)
    most, since_full, since_steady = (max(bytes_held) / 1e6 for bytes_held in zip(*memory.values(), strict=True))
    return [
        *found,
        Bar("held for calls, MB", most, 3),
        Bar("held more than after 20,000 calls, MB", since_full, 0.5),
        Bar("held more than after 40,000 calls, MB", since_steady, 0.01),
    ]


def _bars_of_costs(costs: Costs) -> list[Bar]:
    """Of the dearest size. Between two, a choice by load is one comparison: a key cannot be as cheap as that."""
    found = []
    for upstreams in dict.fromkeys(number for _, number in costs):
        among = f"a choice among {upstreams} upstreams"
        sizes = [one for (_, number), one in costs.items() if number == upstreams]
        if upstreams > 2:
            dearest = max(one["common"] / one["before"] for one in sizes)
            found.append(Bar(f"{among}, common, of that by load before", dearest, 1))
        more = max(one["common"] - one["least"] for one in sizes)
        found.append(Bar(f"{among}, common, µs more than by load", more, 1.5))
        found.append(Bar(f"{among}, all hot, µs", max(one["all hot"] for one in sizes), 20))
    return found


def bars_as_text(bars: list[Bar]) -> str:
    """Markdown: which hold."""
    lines = ["| must hold | is | bound | |", "|---|--:|--:|---|"]
    for bar in bars:
        sign, verdict = "≥" if bar.at_least else "≤", "holds" if bar.holds else "**misses**"
        lines.append(f"| {bar.name} | {bar.value:.3g} | {sign} {bar.bound:g} | {verdict} |")
    return "\n".join(lines) + "\n"


def chart(results: Results) -> str:
    """An SVG: what comes of prompts as RAG has them, for each policy, with one gateway and with three."""
    groups = []
    for gateways in dict.fromkeys(number for _, number, _ in results):
        of = {policy: seeds for (*what, policy), seeds in results.items() if what == ["rag1", gateways]}
        hits = {policy: _median(seeds, "hits") for policy, seeds in of.items()}
        p99 = {policy: _median(seeds, "p99") for policy, seeds in of.items()}
        groups.append(svg.Group(f"{_among(gateways)}: hits, of those of one cache (longer is better)", hits, 1))
        groups.append(svg.Group(f"{_among(gateways)}: first token's p99, s (shorter is better)", p99, 5))
    return svg.chart("RAG over eight simulated vLLM (rag1)", groups, _COLOURS)
