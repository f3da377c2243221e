"""A mixed load with random faults and leavings against a gateway process; ends with a count in which nothing is lost.

`python -m tests.soak --seconds 60`. All on loopback; the seed is printed and can be given again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import click
import httpx

from tests.fake_vllm import DONE, EVENTS, MODEL, STREAM_END, STREAM_HEAD, chunk, completion, response

CLIENTS = 40
LEAVE = 0.25
# What an upstream does with a call, and how often of a hundred.
DEEDS = {"answer": 76, "refuse": 8, "fail": 4, "reset": 4, "no done": 3, "hang up": 5}
NUMBER = re.compile(rb"#(\d+)#")
MODELS = b'{"object":"list","data":[{"id":"%b","object":"model"}]}' % MODEL.encode()


class Upstream:
    """A model server that dies and comes back, and counts what it generates."""

    def __init__(self, chance: random.Random) -> None:
        self.begun: Counter[bytes] = Counter()
        self.closed_at: dict[bytes, float] = {}
        self.running: set[bytes] = set()
        self._chance = chance
        self._port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        """Listen; on the same port each time."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self._port

    def die(self) -> None:
        """Listen no more, and cut all connections."""
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1])) if length else b""
                if not await self._answer(head, body, reader, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _answer(
        self, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        number = NUMBER.search(body)
        if number is None:
            writer.write(response("200 OK", MODELS if b"/v1/models" in head else b"{}"))
            return True
        deed = self._chance.choices(list(DEEDS), list(DEEDS.values()))[0]
        if deed == "refuse":
            writer.write(response("503 Service Unavailable", b"{}", "retry-after: 1"))
        elif deed == "fail":
            writer.write(response("500 Internal Server Error", b"{}"))
        if deed in ("refuse", "fail", "hang up"):
            return deed != "hang up"
        # Whatever is read now is the end of the connection: vLLM, too, stops generating then.
        watch = asyncio.ensure_future(reader.read(1))
        work = asyncio.ensure_future(self._generate(number[1], deed, b'"stream":true' in body, writer))
        try:
            await asyncio.wait((watch, work), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            self.closed_at[number[1]] = time.monotonic()
            return False
        finally:
            self.running.discard(number[1])
            work.cancel()
            watch.cancel()
            await asyncio.gather(watch, work, return_exceptions=True)

    async def _generate(self, number: bytes, deed: str, stream: bool, writer: asyncio.StreamWriter) -> bool:
        self.begun[number] += 1
        self.running.add(number)
        await asyncio.sleep(self._chance.uniform(0, 0.1))
        if not stream:
            content = response("200 OK", completion())
            writer.write(content[:-10] if deed == "reset" else content)
            return deed != "reset"
        writer.write(STREAM_HEAD)
        for event in EVENTS[:-1] * 2:
            writer.write(chunk(event))
            await asyncio.sleep(self._chance.uniform(0, 0.02))
            if deed == "reset":
                return False
        writer.write((b"" if deed == "no done" else chunk(DONE)) + STREAM_END)
        return True


class Load:
    """The clients, and what became of each call."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self.outcomes: Counter[str] = Counter()
        self.sent = 0
        self.left_at: dict[bytes, float] = {}
        self._port = port
        self._chance = chance

    async def run(self, until: float) -> None:
        """One client, call after call."""
        while time.monotonic() < until:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._connection(until)

    async def _connection(self, until: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            for _ in range(self._chance.randint(1, 20)):
                if time.monotonic() > until or not await self._call(reader, writer):
                    break
        finally:
            writer.transport.abort()

    async def _call(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """True if the connection can take another one."""
        self.sent += 1
        number = b"%d" % self.sent
        stream = b"true" if self._chance.random() < 0.7 else b"false"
        body = b'{"model":"%b","messages":[{"role":"user","content":"#%b#"}],"stream":%b}'
        body %= (MODEL.encode(), number, stream)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        if self._chance.random() < LEAVE / 5:
            writer.write(head + body[:20])
            await asyncio.sleep(self._chance.uniform(0, 0.02))
            return self._left(number)
        writer.write(head + body)
        answer = asyncio.ensure_future(_read(reader))
        patience = self._chance.uniform(0, 0.2) if self._chance.random() < LEAVE else 60
        try:
            outcome = await asyncio.wait_for(asyncio.shield(answer), patience)
        except TimeoutError:
            answer.cancel()
            return self._left(number)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            # A whole answer that broke off upstream breaks off here: nothing else may.
            cut = isinstance(error, asyncio.IncompleteReadError) and stream == b"false" and error.partial
            self.outcomes["cut" if cut else "lost"] += 1
            return False
        self.outcomes[outcome] += 1
        return not outcome.startswith("refused: 408")

    def _left(self, number: bytes) -> bool:
        self.outcomes["left"] += 1
        self.left_at[number] = time.monotonic()
        return False


async def _read(reader: asyncio.StreamReader) -> str:
    """What an answer says, in a word; raises where it breaks off."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head[9:12])
    if length := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
        await reader.readexactly(int(length[1]))
        return "answered" if status == 200 else f"refused: {status}"
    content = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        content += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    if not content.endswith(DONE):
        return "lost"
    return "answered with an error event" if b'data: {"error"' in content else "answered"


def _state(pid: int) -> tuple[float, int]:
    """Memory in MB, and open descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found
    return int(found[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


async def _soak(seconds: float, seed: int) -> bool:
    chance = random.Random(seed)
    upstreams = [Upstream(chance) for _ in range(2)]
    urls = [f"http://127.0.0.1:{await one.start()}" for one in upstreams]
    environment = {**os.environ, "GATEWAY_UPSTREAMS": ",".join(urls), "GATEWAY_HOST": "127.0.0.1", "GATEWAY_PORT": "0"}
    command = [sys.executable, "-m", "gateway", "serve"]
    gateway = await asyncio.to_thread(
        subprocess.Popen, command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert gateway.stdout is not None
    try:
        while (line := gateway.stdout.readline()) and b"listening on" not in line:
            continue
        found = re.search(rb"listening on http://[\d.]+:(\d+)", line)
        assert found, "the gateway did not start"
        drain = asyncio.get_running_loop().run_in_executor(None, gateway.stdout.read)
        return await _load(upstreams, gateway, int(found[1]), seconds, chance, drain)
    finally:
        gateway.kill()
        gateway.wait()


async def _load(
    upstreams: list[Upstream],
    gateway: subprocess.Popen[bytes],
    port: int,
    seconds: float,
    chance: random.Random,
    drain: asyncio.Future[bytes],
) -> bool:
    await asyncio.sleep(2)
    idle, descriptors = _state(gateway.pid)
    load = Load(port, chance)
    until = time.monotonic() + seconds
    clients = [asyncio.create_task(load.run(until)) for _ in range(CLIENTS)]
    early = 0.0
    while time.monotonic() < until:
        await asyncio.sleep(min(5, seconds / 8))
        if not early and until - time.monotonic() < seconds / 2:
            early, _ = _state(gateway.pid)
        one = chance.choice(upstreams)
        one.die()
        await asyncio.sleep(0.5)
        await one.start()
        click.echo(f"{max(0, until - time.monotonic()):4.0f} s left, {load.sent} calls", err=True)
    await asyncio.gather(*clients)
    await asyncio.sleep(8)  # until idle connections are over
    late, left_open = _state(gateway.pid)
    async with httpx.AsyncClient(trust_env=False) as client:
        metrics = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    gateway.terminate()
    await drain
    return _report(load, upstreams, metrics, (idle, early, late), (descriptors, left_open), gateway.wait())


def _report(
    load: Load,
    upstreams: list[Upstream],
    metrics: str,
    memory: tuple[float, float, float],
    descriptors: tuple[int, int],
    status: int,
) -> bool:
    counted = sum(int(float(count)) for count in re.findall(r"gateway_requests_total{.*chat.*} (\S+)", metrics))
    begun: Counter[bytes] = sum((one.begun for one in upstreams), Counter())
    closed = {number: at for one in upstreams for number, at in one.closed_at.items()}
    late = sorted(closed[number] - at for number, at in load.left_at.items() if number in closed)
    for outcome, count in sorted(load.outcomes.items()):
        click.echo(f"{outcome:40} {count:8}")
    rows = [
        ("calls sent", load.sent, sum(load.outcomes.values()), "= all of the above"),
        ("calls counted by the gateway", counted, load.sent, "= sent"),
        ("lost", load.outcomes["lost"], 0, "="),
        ("generated twice", sum(count > 1 for count in begun.values()), 0, "="),
        ("still generating", sum(len(one.running) for one in upstreams), 0, "="),
        ("in flight", int("gateway_in_flight 0.0" not in metrics), 0, "="),
        ("descriptors", descriptors[1], descriptors[0] + 2, "at most (idle + 2)"),
        ("leaving to closed upstream, p99, ms", late[int(len(late) * 0.99)] * 1000 if late else 0, 100, "at most"),
        ("memory, MB", memory[2], memory[1] * 1.05 + 1, f"at most (half way + 5 %; idle {memory[0]:.1f})"),
        ("exit status of the gateway", status, 0, "="),
    ]
    right = True
    for name, is_, bar, how in rows:
        holds = is_ <= bar if how.startswith("at most") else is_ == bar
        right = right and holds
        click.echo(f"{name:40} {is_:8.6g} {how} {bar:.6g}{'' if holds else '  MISSED'}")
    return right


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="How long the load lasts.")
@click.option("--seed", default=lambda: random.randrange(1 << 30), help="To see the same again.")
def main(seconds: float, seed: int) -> None:
    """Load a gateway with calls, faults and leavings, and count what became of them."""
    click.echo(f"seed {seed}", err=True)
    sys.exit(0 if asyncio.run(_soak(seconds, seed)) else 1)


if __name__ == "__main__":
    main()
