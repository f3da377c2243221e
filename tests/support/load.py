"""What the soak and the restarts share: upstreams that fail as told, clients that leave, and a count of both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.support.fake_vllm import DONE, EVENTS, MODEL, STREAM_END, STREAM_HEAD, chunk, completion, response

# What an upstream does with a call, and how often of a hundred.
NO_FAULTS = {"answer": 100}
FAULTS = {"answer": 76, "refuse": 8, "fail": 4, "reset": 4, "no done": 3, "hang up": 5}
_NUMBER = re.compile(rb"#(\d+)#")
_MODELS = b'{"object":"list","data":[{"id":"%b","object":"model"}]}' % MODEL.encode()


class Upstream:
    """A model server that dies and comes back, and counts what it generates."""

    def __init__(self, chance: random.Random, deeds: dict[str, int]) -> None:
        self.deeds = deeds
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
        number = _NUMBER.search(body)
        if number is None:
            writer.write(response("200 OK", _MODELS if b"/v1/models" in head else b"{}"))
            return True
        deed = self._chance.choices(list(self.deeds), list(self.deeds.values()))[0]
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
        # The part of the calls whose client leaves, and after how long at most.
        self.leave, self.patience = 0.0, 0.2
        self.outcomes: Counter[str] = Counter()
        self.sent = 0
        self.left_at: dict[bytes, float] = {}
        self._port = port
        self._chance = chance

    async def run(self, clients: int, go_on: Callable[[], bool]) -> None:
        """So many clients, call after call."""
        await asyncio.gather(*(self._client(go_on) for _ in range(clients)))

    async def _client(self, go_on: Callable[[], bool]) -> None:
        while go_on():
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._connection(go_on)

    async def _connection(self, go_on: Callable[[], bool]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            for _ in range(self._chance.randint(1, 20)):
                if not go_on() or not await self._call(reader, writer):
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
        if self._chance.random() < self.leave / 5:
            writer.write(head + body[:20])
            await asyncio.sleep(self._chance.uniform(0, 0.02))
            return self._left(number)
        writer.write(head + body)
        answer = asyncio.ensure_future(_read(reader))
        patience = self._chance.uniform(0, self.patience) if self._chance.random() < self.leave else 60
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


@contextlib.contextmanager
def gateway(
    upstreams: Sequence[str], port: int = 0, by: Sequence[str] = (), **settings: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A gateway process that listens, and its port; killed at the end where it still runs.

    `by` is a command that becomes the one that it is given, such as unshare.
    """
    own = {"GATEWAY_UPSTREAMS": ",".join(upstreams), "GATEWAY_HOST": "127.0.0.1", "GATEWAY_PORT": str(port)}
    own["GATEWAY_ALLOWED_HOSTS"] = "x,gateways"  # as the load calls it, and nginx
    command = [*by, sys.executable, "-m", "gateway", "serve"]
    with subprocess.Popen(
        command, env={**os.environ, **own, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        try:
            while (line := process.stdout.readline()) and b"listening on" not in line:
                continue
            found = re.search(rb"listening on http://[\d.]+:(\d+)", line)
            assert found, "the gateway did not start"
            threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()  # a full pipe would stop it
            yield process, int(found[1])
        finally:
            process.kill()


def memory_and_descriptors(pid: int) -> tuple[float, int]:
    """Memory in MB, and open descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found
    return int(found[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))
