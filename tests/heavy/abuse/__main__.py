"""Each attacker beside an honest client of another key, in front of a real gateway: what that one got, and the price.

`python -m tests.heavy.abuse [NAME …]`; with `--write` the table in docs/reliability.md is made anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import orjson

from gateway.wire.routes import NAMES
from tests.heavy.abuse import attackers, honest
from tests.support.paths import ROOT

# Seconds alone, and beside the attacker once that has begun.
ALONE, BEGINNING, BESIDE = 2.0, 1.5, 6.0
BOUND = 256 << 20
# The bars: milliseconds, and MB past the bound.
TURN, WORST, MORE = 50.0, 100.0, 64
# A busy machine is slow by the clock, too: a row is right that is so once.
TRIES = 3
DOCUMENT = ROOT / "docs/reliability.md"
BEGIN, END = "<!-- made by `python -m tests.heavy.abuse --write` -->\n", "<!-- end -->\n"

# What a gateway is set to beside the bound of memory.
SETTINGS: dict[str, dict[str, str]] = {
    "turns": {"GATEWAY_MAX_IN_FLIGHT": "8", "GATEWAY_MAX_QUEUE": "64"},
    "queue": {"GATEWAY_MAX_IN_FLIGHT": "8", "GATEWAY_MAX_QUEUE": "1024"},
    "shapes": {"GATEWAY_ROUTES": ",".join(NAMES)},
}
DEAD = {"health": [f"http://127.0.0.1:{port}" for port in range(1, 100)]}
# What the honest client asks for where calls have to take a while.
TEXT = {"turns": "hold:50", "queue": "hold:50"}


@dataclass
class Row:
    """One attacker: what the honest client got alone and beside it, and what that took of the gateway."""

    name: str
    alone: honest.Seen
    beside: honest.Seen
    answers: dict[str, int]
    turn: float
    cpu: float
    memory: float
    descriptors: int

    def faults(self) -> Iterator[str]:
        """What misses its bar."""
        alone, beside = self.alone, self.beside
        if beside.refused or beside.lost:
            yield f"{beside.refused} refused, {beside.lost} lost"
        if beside.median > 2 * alone.median:
            yield f"median {beside.median:.1f} ms, alone {alone.median:.1f}"
        if beside.worst > max(10 * alone.worst, WORST):
            yield f"worst {beside.worst:.0f} ms, alone {alone.worst:.0f}"
        if self.turn > TURN:
            yield f"a turn of {self.turn:.0f} ms"
        if self.memory > BOUND / 2**20 + MORE:
            yield f"{self.memory:.0f} MB"

    def line(self) -> str:
        """For the table."""
        said = (attackers.ATTACKS[self.name].__doc__ or "").rstrip(".")
        alone, beside = self.alone, self.beside
        return (
            f"| {said} | {alone.median:.1f} / {beside.median:.1f} | {alone.worst:.0f} / {beside.worst:.0f} "
            f"| {beside.refused} / {beside.lost} | {self.turn:.0f} | {100 * self.cpu:.0f} % | {self.memory:.0f} "
            f"| {self.descriptors} |"
        )


@contextmanager
def upstream(model: str) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.heavy.abuse.upstream", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, preexec_fn=_many_descriptors) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@contextmanager
def gateway(name: str, upstreams: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    keys = folder / "keys"
    hashes = {key.partition("-")[0]: hashlib.sha256(key.encode()).hexdigest() for key in (honest.KEY, attackers.KEY)}
    keys.write_text("".join(f"{name} {digest}\n" for name, digest in hashes.items()))
    given = {
        "GATEWAY_UPSTREAMS": ",".join([*upstreams, *DEAD.get(name, ())]),
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": "0",
        "GATEWAY_API_KEYS_FILE": str(keys),
        "GATEWAY_MAX_BUFFERED_BYTES": str(BOUND),
        "GATEWAY_LOG_LEVEL": "INFO",
        "GATEWAY_DRAIN_TIMEOUT": "0",
    } | SETTINGS.get(name, {})
    log = folder / "log"
    out = "/dev/full" if name == "disk" else log
    port = free_port()
    given["GATEWAY_PORT"] = str(port)
    with open(out, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.heavy.abuse.measured", str(folder / "turn")],
            env={**os.environ, **given},
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            preexec_fn=_few_descriptors if name == "descriptors" else _many_descriptors,
        )
    try:
        _wait_until_it_serves(port)
        yield process, port
    finally:
        process.kill()
        process.wait()


def _few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))


def _many_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _wait_until_it_serves(port: int) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        seen = asyncio.run(honest.calls(port, 0.1))
        if seen.first_tokens and not seen.refused and not seen.lost:
            return
        time.sleep(0.2)
    raise AssertionError("the gateway never served")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def peak_memory(pid: int) -> float:
    """In MB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def attack(name: str) -> Row:
    """One row."""
    text = TEXT.get(name, "Hi")
    with tempfile.TemporaryDirectory() as temporary, upstream("demo") as own, upstream("other") as others:
        folder = Path(temporary)
        with gateway(name, [own, others], folder) as (process, port):
            alone = asyncio.run(honest.calls(port, ALONE, text))
            command = [sys.executable, "-m", "tests.heavy.abuse.attackers", name, str(port), str(BEGINNING + BESIDE)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as attacker:
                assert attacker.stdout is not None
                time.sleep(BEGINNING)
                began, cpu = time.monotonic(), cpu_seconds(process.pid)
                beside = asyncio.run(honest.calls(port, BESIDE - 1, text))
                cpu = (cpu_seconds(process.pid) - cpu) / (time.monotonic() - began)
                descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
                answers = orjson.loads(attacker.stdout.read())
            turn = float((folder / "turn").read_text())
            return Row(name, alone, beside, answers, turn, cpu, peak_memory(process.pid), descriptors)


def write(rows: list[Row]) -> None:
    """The table, anew."""
    head = (
        "| Beside | Median, ms, alone / beside | Worst | Refused / lost | Longest turn, ms | CPU | Peak MB "
        "| Descriptors |\n|---|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(before + BEGIN + head + "".join(f"{row.line()}\n" for row in rows) + END + after)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("names", nargs=-1)
@click.option("--write", "writes", is_flag=True, help="Make the table in docs/reliability.md anew.")
def main(names: tuple[str, ...], writes: bool) -> None:
    rows, right = [], True
    for name in names or attackers.ATTACKS:
        for _ in range(TRIES):
            row = attack(name)
            faults = [*row.faults()]
            if not faults:
                break
        rows.append(row)
        right = right and not faults
        click.echo(row.line())
        click.echo(f"  {name}: {orjson.dumps(row.answers).decode()} {'; '.join(faults) or 'ok'}")
    if writes:
        write(rows)
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
