"""What the gateway takes at rest, by how many addresses its name has: `python -m bench.at_rest`, as root.

In a network and with a resolv.conf of its own, so that c-ares asks a name server as it does anywhere. Prints a table's
rows: upstreams, percent of a core, memory in MB.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import httpx

from bench.processes import cpu_us, rss_kb, stop
from tests.support.name_server import name_server

COUNTS = (1, 8, 50, 200, 1000)
PORT, GATEWAY = 8000, 9000
# Until all serve, and until their first probes are over; and what is measured then, in seconds.
_READY, _SETTLES, _MEASURED = 120, 10, 30
_NAMESPACE = 'ip link set lo up && mount --bind "$0" /etc/resolv.conf && exec "$@"'
_BODIES = {
    b"/health": b"",
    b"/v1/models": b'{"object":"list","data":[{"id":"demo","object":"model","max_model_len":40960}]}',
    b"/tokenize": b'{"count":1,"max_model_len":40960,"tokens":[90],"token_strs":null}',
    b"/metrics": b"",
}


class Server(asyncio.Protocol):
    """All model servers: one that answers probes, on every loopback address."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not asserted: uvloop's transports are no subclasses of asyncio's.
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """A probe is one read."""
        body = _BODIES.get(data.split(b" ", 2)[1])
        status = b"404 Not Found" if body is None else b"200 OK"
        self.transport.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(body or b""), body or b"")
        )


async def serve(count: int) -> None:
    """The name server and the model servers, until they are killed."""
    addresses = [f"127.0.{1 + number // 250}.{1 + number % 250}" for number in range(count)]
    async with name_server({b"pods.example": addresses}, port=53):
        await (await asyncio.get_running_loop().create_server(Server, "0.0.0.0", PORT)).serve_forever()


def measure(count: int) -> str:
    """A row of the table."""
    servers = subprocess.Popen([sys.executable, "-m", "bench.at_rest", "serve", str(count)], start_new_session=True)
    environ = {**os.environ, "GATEWAY_UPSTREAMS": f"dns+http://pods.example:{PORT}", "GATEWAY_PORT": str(GATEWAY)}
    command = [sys.executable, "-m", "gateway", "serve"]
    gateway = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait(count)
        time.sleep(_SETTLES)
        before = cpu_us(gateway.pid)
        time.sleep(_MEASURED)
        share = (cpu_us(gateway.pid) - before) / _MEASURED / 1e4
        return f"| {count} | {share:.2f} | {rss_kb(gateway.pid) / 1024:.1f} |"
    finally:
        stop(gateway)
        stop(servers)


def _wait(count: int) -> None:
    until = time.monotonic() + _READY
    while True:
        try:
            told = httpx.get(f"http://127.0.0.1:{GATEWAY}/v1/health_check", trust_env=False, timeout=5).json()
            if [one["state"] for one in told["upstreams"]] == ["serving"] * count:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > until:
            raise SystemExit(f"{count} upstreams do not serve within {_READY} s")
        time.sleep(0.5)


def main(arguments: list[str]) -> None:
    """Measure each number in a namespace of its own."""
    match arguments:
        case ["serve", count]:
            asyncio.run(serve(int(count)))
        case ["measure", count]:
            sys.stdout.write(measure(int(count)) + "\n")
        case _:
            with tempfile.TemporaryDirectory() as folder:
                conf = Path(folder) / "resolv.conf"
                conf.write_text("nameserver 127.0.0.1\n")
                for count in arguments or map(str, COUNTS):
                    command = [sys.executable, "-m", "bench.at_rest", "measure", count]
                    isolated = ["unshare", "--net", "--mount", "sh", "-c", _NAMESPACE, str(conf)]
                    subprocess.run([*isolated, *command], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
