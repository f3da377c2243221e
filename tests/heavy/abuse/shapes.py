"""What bodies of random JSON take of the gateway's CPU: by their length, and beside plain text of that length.

`python -m tests.heavy.abuse.shapes [--seed N] [--shapes N]`. Each shape goes to one of the routes, with random values
in one of the fields that the gateway reads or in one that it does not, up to the longest body and the most values that
it takes.
"""

from __future__ import annotations

import random
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import orjson

from tests.heavy.abuse.__main__ import TURN, gateway, upstream
from tests.heavy.abuse.attackers import CHAT, MIB, MODEL, post

SIZES = (15 * MIB // 4, 15 * MIB)
# Of what is let in; a refused one is refused by its bytes.
VALUES, CONTAINERS = 1_000_000, 100_000
# The bar: of plain text's CPU.
OF_TEXT = 3.0
TRIES = 3

# A body's beginning and end for each place where values can stand.
_CHAT = b'{"model":"other","messages":['
PLACES: tuple[tuple[str, bytes, bytes], ...] = (
    (CHAT, _CHAT + b'{"role":"user","content":', b"}]}"),
    (CHAT, _CHAT + b'{"role":"user","content":"q"}],"stop":', b"}"),
    (CHAT, b'{"metadata":', b',"model":"other","messages":[{"role":"user","content":"q"}]}'),
    (CHAT, b'{"messages":{"user":"q"},"model":"other","logit_bias":', b"}"),
    (CHAT, b'{"messages":{"user":', b'},"model":"other"}'),
    (CHAT, b'{"model":"other","data":{"user_prompt":"q","reranked_docs":', b"}}"),
    (f"{CHAT}/batch", b'{"model":"other","messages":', b"}"),
    ("/v1/completions", b'{"model":"other","prompt":', b"}"),
    ("/v1/responses", b'{"model":"other","input":', b"}"),
    ("/v1/messages", _CHAT + b'{"role":"user","content":', b'}],"max_tokens":1}'),
    ("/v1/embeddings", b'{"model":"other","input":', b"}"),
    ("/v1/rerank", b'{"model":"other","query":"q","documents":', b"}"),
    ("/v1/score", b'{"model":"other","text_1":"q","text_2":', b"}"),
    ("/pooling", b'{"model":"other","input":', b"}"),
    ("/classify", b'{"model":"other","input":', b"}"),
    ("/tokenize", b'{"model":"other","prompt":', b"}"),
    ("/generate", b'{"prompt":"q","stop":', b"}"),
    ("/api/v1/ask", b'{"question":"q","context":', b"}"),
)
_SCALARS = (
    b"0",
    b"-1.5e3",
    b"true",
    b"null",
    b"12345678901",
    b'""',
    b'"a"',
    b'"url"',
    b'"model"',
    b'"https://x/y.png"',
)
_PIECES = (
    "a",
    "word ",
    "\\n",
    '\\"',
    "\\\\",
    "\\u0041",
    "\\ud83d\\ude00",
    "é",
    "語",
    "😀",
    "{",
    "}]",
    ",",
    ":[",
    "url",
    "//",
)


def _text(draw: random.Random, longest: int) -> bytes:
    return b'"' + "".join(draw.choices(_PIECES, k=draw.randint(0, longest))).encode() + b'"'


def _value(draw: random.Random, depth: int) -> bytes:
    kind = draw.randrange(6 if depth else 3)
    if kind == 0:
        return draw.choice(_SCALARS)
    if kind <= 2:
        return _text(draw, draw.choice((2, 20, 2000)))
    inside = [_value(draw, depth - 1) for _ in range(draw.randint(0, 4))]
    if kind == 3:
        return b"[" + b",".join(inside) + b"]"
    return b"{" + b",".join(_text(draw, 3) + b":" + value for value in inside) + b"}"


def _counted(value: bytes) -> tuple[int, int]:
    """How many values a text of JSON has, those that stand for others among them, and how many of those."""
    values, containers, left = 0, 0, [orjson.loads(value)]
    while left:
        one = left.pop()
        values += 1
        if isinstance(one, list | dict):
            containers += 1
            left.extend(one.values() if isinstance(one, dict) else one)
            values += len(one) if isinstance(one, dict) else 0
    return values, containers


def _many(draw: random.Random, room: int) -> bytes:
    """Values of about so many bytes, no more than are let in; where those are short, a text fills the rest."""
    units = [_value(draw, draw.randint(0, 4)) for _ in range(draw.randint(1, 5))]
    spaced = draw.choice((b",", b",", b", ", b",\n    "))
    named = draw.random() < 0.3
    unit = spaced.join(units)
    values, containers = map(sum, zip(*map(_counted, units), strict=True))
    share = room / (15 * MIB)
    most = min(0.9 * share * VALUES / (values + len(units) * named), 0.9 * share * CONTAINERS / max(1, containers))
    count = max(1, min(int(most), (room - 100) // (len(unit) + 4 + 12 * len(units) * named)))
    if named:
        inside = spaced.join(
            b'"k%d":%b' % (number, one) for number, one in enumerate(one for _ in range(count) for one in units)
        )
    else:
        inside = spaced.join([unit] * count)
    rest = room - len(inside)
    if rest > 100:
        piece = draw.choice(_PIECES).encode()
        inside += b",%b" % (b'"rest":' * named) + b'"' + piece * ((rest - 20) // len(piece)) + b'"'
    return b"{" + inside + b"}" if named else b"[" + inside + b"]"


def shape(seed: int, size: int) -> tuple[str, bytes]:
    """A route and a body for it."""
    draw = random.Random(seed)
    route, before, after = draw.choice(PLACES)
    room = size - len(before) - len(after)
    if draw.random() < 0.3:
        piece = "".join(draw.choices(_PIECES, k=draw.randint(1, 8))).encode()
        inside = b'"' + piece * ((room - 2) // len(piece)) + b'"'
    else:
        inside = _many(draw, room)
    return route, before + inside + after


def plain(size: int) -> tuple[str, bytes]:
    """A prompt as people write it, in the simplified form: it has to be read and written anew."""
    before, after = b'{"model":"other","messages":{"user":"', b'"}}'
    return CHAT, before + b"word " * ((size - len(before) - len(after)) // 5) + after


def cpu(pid: int) -> float:
    """Milliseconds of all threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e6


@dataclass
class Taken:
    """What a body took, in milliseconds of CPU, and how it was answered."""

    milliseconds: float
    status: str


def send(pid: int, port: int, route: str, body: bytes) -> Taken:
    """The least of some tries."""
    found = []
    for _ in range(TRIES):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            before = cpu(pid)
            connection.sendall(post(body, route, "connection: close\r\n"))
            answer = b""
            while piece := connection.recv(1 << 16):
                answer = answer or piece
            found.append(Taken(cpu(pid) - before, answer[9:12].decode()))
    return min(found, key=lambda taken: taken.milliseconds)


def check(seed: int, measure: Callable[[str, bytes], Taken], text: dict[int, float]) -> bool:
    """Whether a shape keeps the bar at each length, and so takes no more than in line with it."""
    kept = True
    for size in SIZES:
        route, body = shape(seed, size)
        taken = measure(route, body)
        kept = kept and taken.milliseconds <= OF_TEXT * text[size]
        said = f"{taken.milliseconds:5.0f} ms, {taken.milliseconds / text[size]:.1f} of plain text's"
        click.echo(f"shape {seed}, {size:8} bytes: {said}; {taken.status} {route} {body[:50]!r}…")
    return kept


def run(seeds: Iterable[int]) -> bool:
    """Whether these shapes keep the bars at a gateway of their own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        upstream("demo") as own,
        upstream(MODEL) as others,
        gateway("shapes", [own, others], Path(folder)) as (process, port),
    ):
        measure = partial(send, process.pid, port)
        text = {size: measure(*plain(size)).milliseconds for size in SIZES}
        click.echo("".join(f"plain text, {size:8} bytes: {taken:.0f} ms\n" for size, taken in text.items()))
        kept = [check(seed, measure, text) for seed in seeds]
        turn = float((Path(folder) / "turn").read_text())
    click.echo(f"the longest turn: {turn:.0f} ms")
    return all(kept) and turn <= TURN


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--seed", default=0)
@click.option("--shapes", default=24)
def main(seed: int, shapes: int) -> None:
    # On a busy machine caches are others', too.
    sys.exit(0 if any(run(range(seed, seed + shapes)) for _ in range(TRIES)) else 1)


if __name__ == "__main__":
    main()
