"""Instructions of a request and of an event, as callgrind counts them: `make count`, which needs valgrind.

The gateway is called by hand, with no sockets: these are its own instructions, the interpreter's and the libraries',
and none of the kernel's. They are the same on a busy machine. Plain Python's are counted, and those of the package as
it is compiled for the image, both with the distribution's Python, which is built as those of the images are.
"""

from __future__ import annotations

import gc
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click
import uvloop

from bench import arms
from bench.cells import body
from gateway.upstream import connections
from tests.support.by_hand import Ends, gateway_by_hand, post
from tests.support.fake_vllm import EVENTS, chunk, completion, response
from tests.support.paths import ROOT

# At most so many, plain and compiled: what was counted, and a thirtieth for another build of Python.
BOUNDS = {
    "request": (172_000, 106_000),
    "keyed": (182_000, 114_000),
    "simplified": (220_000, 140_000),
    "event": (6_400, 2_300),
}
_KEY = "sk-4f7d0c9a2b6e81d35a"
# Of both there are whole batches of what has ended, sixteen each.
_WARMING, _COUNTED = 64, 160
_ANSWER = response("200 OK", completion())


def _take(ends: Ends) -> deque[bytes | bytearray]:
    """Have both ends take what is written with no work of their own; the last of it for the client is kept."""
    kept, dropped = deque[bytes | bytearray](maxlen=1), deque[bytes | bytearray](maxlen=0)
    for sink, taken in ((ends.to_client, kept), (ends.to_upstream, dropped)):
        vars(sink).update(write=taken.append, is_closing=bool, get_write_buffer_size=int)
    ends.upstream.send = dropped.append
    return kept


def _count(work: Callable[[], None]) -> None:
    """Do it again and again between two calls that nothing else makes: callgrind begins to count at each."""
    for _ in range(_WARMING):
        work()
    # As the server does once it has started.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    os.getppid()
    for _ in range(_COUNTED):
        work()
    os.getpgrp()


async def _work(what: str) -> None:
    """What is counted, in this process."""
    keyed = what == "keyed"
    # Under callgrind seconds pass between two calls.
    connections.IDLE_FOR = math.inf
    async with gateway_by_hand(**{"GATEWAY_API_KEYS": (_KEY,)} if keyed else {}) as ends:
        more = f"Authorization: Bearer {_KEY}\r\n" if keyed else ""
        call = post(body(simplified=what == "simplified").encode(), more)
        client, upstream = ends.client.data_received, ends.upstream.data_received

        def request() -> None:
            client(call)
            upstream(_ANSWER)

        request()
        assert ends.to_client.written.startswith(b"HTTP/1.1 200 OK")
        written = _take(ends)
        if what != "event":
            _count(request)
            assert written[-1].startswith(b"HTTP/1.1 200 OK")
            return
        ends.begin_stream()
        upstream(chunk(EVENTS[0]))
        event = chunk(EVENTS[1])
        _count(partial(upstream, event))
        assert written[-1] == event
        ends.end_stream()


def counted(python: Path, package: Path) -> dict[str, float]:
    """Instructions of one of each, by this interpreter, with the package that is in this folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        command += ["--dump-before=getppid", "--dump-before=getpgrp", str(python), "-m", "tests.heavy.instructions"]
        # Names that are hashed alike, so that one run is as another.
        own = {"PYTHONPATH": os.pathsep.join(map(str, (package, ROOT))), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [*command, "--worker"], env={**os.environ, **own}, capture_output=True, text=True, cwd=folder, check=False
        )
        if done.returncode:
            raise arms.Missing(f"callgrind failed; it said:\n{done.stderr[-3000:]}")
        # Every second is of what comes before.
        return {what: _total(Path(folder, f"out.{2 * number}")) for number, what in enumerate(BOUNDS, 1)}


def _total(file: Path) -> float:
    found = re.search(r"^totals: (\d+)", file.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / _COUNTED


@click.command()
@click.option("--worker", is_flag=True, help="Do the work that is counted, in this process.")
def main(worker: bool) -> None:
    """Count all, and fail where one is above its bound."""
    if worker:
        for what in BOUNDS:
            uvloop.run(_work(what))
        return
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is missing: install it (Debian: apt install valgrind).")
    try:
        python = arms.environment_of_ours() / "python"
        packages = {"plain": ROOT, "compiled": arms.compiled_package()}
        with ThreadPoolExecutor() as pool:
            runs = {way: pool.submit(counted, python, package) for way, package in packages.items()}
            found = {way: run.result() for way, run in runs.items()}
    except arms.Missing as error:
        sys.exit(str(error))
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    click.echo(f"Instructions with the distribution's {version}:")
    missed = []
    for what, bounds in BOUNDS.items():
        line = f"{what:10}"
        for way, bound in zip(packages, bounds, strict=True):
            line += f"  {way} {found[way][what]:9,.0f} (at most {bound:7,})"
            if found[way][what] > bound:
                missed.append(f"{what}, {way}")
        click.echo(line)
    if missed:
        sys.exit(f"Above their bounds: {'; '.join(missed)}.")


if __name__ == "__main__":
    main()
