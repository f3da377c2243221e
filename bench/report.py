"""The figures as a table, as the bars that must hold, and as a chart."""

from __future__ import annotations

from statistics import mean, median, quantiles

from bench import svg

# cell -> arm -> figure -> one value a turn; 0 where the machine stood still for all of it
Samples = dict[str, dict[str, dict[str, list[float]]]]

FIGURES = (
    ("json-64", "cpu_us_per_request", "CPU per JSON request, 64 connections", "µs"),
    ("prompt-67k", "cpu_us_per_request", "CPU per request, 67 KB prompt", "µs"),
    ("streams-100", "cpu_us_per_event", "CPU per event, 100 paced streams", "µs"),
    ("streams-300", "cpu_us_per_event", "CPU per event, 300 paced streams", "µs"),
    ("streams-flood", "cpu_us_per_event", "CPU per event, as fast as they come", "µs"),
    ("json-64", "requests_per_s", "JSON requests, 64 connections", "/s"),
    ("json-1", "p50_ms", "latency p50, 1 connection", "ms"),
    ("json-1", "p99_ms", "latency p99, 1 connection", "ms"),
    ("streams-300", "delay_p50_ms", "event delay p50, 300 paced streams", "ms"),
    ("streams-300", "delay_p99_ms", "event delay p99, 300 paced streams", "ms"),
    ("streams-300", "first_token_p50_ms", "first token p50, 300 streams", "ms"),
    ("streams-300", "first_token_p99_ms", "first token p99, 300 streams", "ms"),
    ("streams-flood", "events_per_s", "events, as fast as they come", "/s"),
    ("open-2000", "kb_per_stream", "memory per open stream, 2,000", "KB"),
    ("leave-answer", "closed_max_ms", "client leaves its answer: upstream closed", "ms"),
    ("leave-wait", "closed_max_ms", "client leaves before the first token: closed", "ms"),
    ("idle", "rss_mb", "memory, idle", "MB"),
    ("after", "rss_mb", "memory after the run", "MB"),
)


# The least difference of two delays that means something, in milliseconds.
_TELLABLE = 0.01


def value(samples: Samples, cell: str, arm: str, figure: str) -> float | None:
    """The median of the turns; None where it was not measured."""
    turns = _turns(samples, cell, figure, arm)
    return median(turns) if turns else None


def _turns(samples: Samples, cell: str, figure: str, arm: str) -> list[float]:
    return samples.get(cell, {}).get(arm, {}).get(figure, [])


def table(samples: Samples, arms: list[str]) -> str:
    """Markdown: medians, and in brackets the quartiles; of times also what an arm adds to `direct`."""
    lines = ["| | " + " | ".join(arms) + " |", "|---|" + "--:|" * len(arms)]
    for cell, figure, text, unit in FIGURES:
        found = [samples.get(cell, {}).get(arm, {}).get(figure) for arm in arms]
        if not any(found):
            continue
        shown = [f"{svg.short(median(turns))}{_spread(turns)}" if turns else "-" for turns in found]
        lines.append(f"| {text}, {unit} | " + " | ".join(shown) + " |")
        direct = value(samples, cell, "direct", figure)
        if unit == "ms" and direct is not None and not cell.startswith("leave"):
            shown = [f"{median(turns) - direct:+.3g}" if turns else "-" for turns in found]
            lines.append("| ... added | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _spread(turns: list[float]) -> str:
    if len(turns) == 1:
        return ""
    first, _, third = _quartiles(turns)
    return f" ({first:.3g}-{third:.3g})"


def _quartiles(turns: list[float]) -> list[float]:
    return quantiles(turns, n=4, method="inclusive") if len(turns) > 1 else turns * 3


def bars(samples: Samples) -> list[tuple[str, float, float, float]]:
    """What must hold: its name, the value, the most that it may be, and the goal beyond that."""

    found: list[tuple[str, float, float, float]] = []

    def bar(name: str, most: float, goal: float, is_: float | None) -> None:
        if is_ is not None:
            found.append((name, is_, most, goal))

    def of(arms: list[float], peers: list[float]) -> float | None:
        """Of what was measured right after one another, turn by turn."""
        turns = list(zip(arms, peers, strict=False))
        return median(one / other for one, other in turns if one and other) if turns else None

    def ratio(cell: str, figure: str, arm: str, peer: str) -> float | None:
        return of(_turns(samples, cell, figure, arm), _turns(samples, cell, figure, peer))

    def added(arm: str) -> list[float]:
        """What an arm adds to the delay, in milliseconds a turn."""
        direct = value(samples, "streams-300", "direct", "delay_p99_ms") or 0
        # No less than the load can tell: what is lost in the machine's noise counts as that, for a peer as for us.
        return [max(turn - direct, _TELLABLE) for turn in _turns(samples, "streams-300", "delay_p99_ms", arm)]

    request, event = "cpu_us_per_request", "cpu_us_per_event"
    own, plain, simplified, router = "gateway", "gateway-plain", "gateway-simplified", "vllm-router"
    bursts, again = (_turns(samples, when, "rss_mb", own) for when in ("bursts", "bursts, again"))
    bar("CPU per JSON request, of vllm-router's", 0.45, 0.4, ratio("json-64", request, own, router))
    bar("CPU per event at 100 streams, of vllm-router's", 0.88, 0.8, ratio("streams-100", event, own, router))
    bar("CPU per 67 KB request, of vllm-router's", 0.48, 0.4, ratio("prompt-67k", request, own, router))
    bar("added event delay p99 at 300 streams, of vllm-router's", 1.0, 0.7, of(added(own), added(router)))
    bar("memory per open stream, KB", 25, 10, value(samples, "open-2000", own, "kb_per_stream"))
    bar("memory idle, MB", 60, 45, value(samples, "idle", own, "rss_mb"))
    bar("memory after the run, MB", 60, 45, value(samples, "after", own, "rss_mb"))
    # The mean of ten, as each differs from the next by a megabyte or three.
    bar("memory after a second run, of the first's", 1.02, 1.0, mean(again) / mean(bursts) if again else None)
    bar("CPU per JSON request, of nginx's", 1.9, 1.6, ratio("json-64", request, own, "nginx"))
    bar("simplified whole, of our own relay's", 1.4, 1.3, ratio("json-64", request, simplified, own))
    bar("simplified stream per event, of our own relay's", 1.5, 1.5, ratio("streams-100", event, simplified, own))
    bar("CPU per JSON request with a key, of that without", 1.1, 1.1, ratio("json-64", request, "gateway-keyed", own))
    naive = ratio("json-64", request, own, "starlette-httpx")
    bar("CPU per JSON request, of plain Starlette + httpx's", 1 / 40, 1 / 40, naive)
    bar("CPU per JSON request, of the gateway's in plain Python", 0.78, 0.7, ratio("json-64", request, own, plain))
    idle, idle_plain = (value(samples, "idle", arm, "rss_mb") for arm in (own, plain))
    if idle is not None and idle_plain is not None:
        bar("memory idle, more than in plain Python, MB", 1.5, 1.0, idle - idle_plain)
    return found


def bars_as_text(samples: Samples) -> str:
    """Markdown: which hold."""
    lines = ["| must hold | is | at most | goal | |", "|---|--:|--:|--:|---|"]
    for name, is_, most, goal in bars(samples):
        verdict = "holds" if is_ <= most else "**misses**"
        lines.append(f"| {name} | {is_:.3g} | {most:.3g} | {goal:.3g} | {verdict} |")
    return "\n".join(lines) + "\n"


_CHARTED = {
    ("json-64", "cpu_us_per_request"),
    ("prompt-67k", "cpu_us_per_request"),
    ("streams-100", "cpu_us_per_event"),
    ("streams-300", "delay_p50_ms"),
    ("open-2000", "kb_per_stream"),
}
_COLOURS = {"gateway": "#0b7a4b", "nginx": "#6b7280", "vllm-router": "#b45309"}


def chart(samples: Samples, arms: list[str], title: str) -> str:
    """An SVG: a group a figure, a bar an arm; shorter is better."""
    groups = []
    for cell, figure, name, unit in FIGURES:
        if (cell, figure) not in _CHARTED:
            continue
        found = {arm: value(samples, cell, arm, figure) for arm in arms if arm != "direct"}
        known = {arm: one for arm, one in found.items() if one is not None}
        if "gateway" in known:
            most = min(max(known.values()), 5 * sorted(known.values())[len(known) // 2])
            groups.append(svg.Group(f"{name} ({unit})", known, most))
    return svg.chart(title, groups, _COLOURS)
