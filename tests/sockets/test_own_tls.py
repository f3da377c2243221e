"""TLS on the gateway's own ports, on both ways in."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from gateway.config.environment import SettingsError
from gateway.config.load import load
from gateway.server.uvicorn_server import Server
from tests.support.fake_vllm import EVENTS, STREAM_END, STREAM_HEAD, FakeVllm, Hold, chunk, response
from tests.support.gateway_process import running
from tests.support.paths import AUTHORITY, CERTIFICATES
from tests.support.ports import free_port

GOOD = str(CERTIFICATES / "good.pem")
CHAT = "/v1/chat/completions"
WHOLE = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**WHOLE, "stream": True}


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=AUTHORITY)


def test_calls_are_answered_in_tls(fake: FakeVllm, way: None) -> None:
    with running(fake.url, tls_cert_file=GOOD) as gateway, gateway.client() as client:
        whole, again, stream = (client.post(CHAT, json=body) for body in (WHOLE, WHOLE, STREAM))
        assert (whole.status_code, whole.content) == (200, again.content)
        assert stream.content.endswith(b"data: [DONE]\n\n")
        assert client.get("/health").status_code == 200


def test_what_is_not_tls_is_not_answered(fake: FakeVllm, way: None) -> None:
    with running(fake.url, tls_cert_file=GOOD) as gateway:
        with socket.create_connection((gateway.host, gateway.port), timeout=20) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert b"HTTP" not in plain.recv(4096)
        old = trusting()
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection((gateway.host, gateway.port), timeout=20) as plain, pytest.raises(ssl.SSLError):
            old.wrap_socket(plain, server_hostname=gateway.host)
        with gateway.client() as client:
            assert client.get("/health").status_code == 200


def test_a_client_that_leaves_is_seen(fake: FakeVllm, way: None) -> None:
    with running(fake.url, tls_cert_file=GOOD) as gateway:
        fake.queue([b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {}\n\n", 30.0])
        with gateway.client() as client, client.stream("POST", CHAT, json=STREAM) as answer:
            next(answer.iter_raw())
        (line,) = gateway.log(1)
        assert line["outcome"] == "client_left"


def test_a_client_that_reads_nothing_is_let_go(fake: FakeVllm, way: None) -> None:
    with running(fake.url, tls_cert_file=GOOD, client_write_timeout=1) as gateway:
        piece = b"data: " + b"x" * 65_000 + b"\n\n"
        fake.queue([b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", *[piece] * 400, 30.0])
        with gateway.connect() as connection:
            body = b'{"model":"demo","messages":[],"stream":true}'
            connection.sendall(
                b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
                % (CHAT.encode(), len(body), body)
            )
            (line,) = gateway.log(1)
        assert line["outcome"] in ("timeout:client_write", "client_left")


@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", b""], ids=["no TLS", "nothing"])
def test_who_shakes_no_hands_at_the_end_neither_cuts_nor_holds_it(
    fake: FakeVllm, way: None, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    hold, ends, connected = Hold(), threading.Event(), threading.Event()
    on_tick = Server.on_tick

    async def until_they_have_connected(server: Server, counter: int) -> bool:
        if ending := await on_tick(server, counter):
            ends.set()
            connected.wait(10)
        return ending

    monkeypatch.setattr(Server, "on_tick", until_they_have_connected)
    fake.queue([STREAM_HEAD + chunk(EVENTS[0]), hold, *map(chunk, EVENTS[1:]), STREAM_END])
    with running(fake.url, tls_cert_file=GOOD, drain_timeout=20) as gateway:
        with gateway.client() as client, client.stream("POST", CHAT, json=STREAM) as answer:
            assert hold.reached.wait(10)
            gateway.signal()
            assert ends.wait(10)
            connections = [socket.create_connection((gateway.host, gateway.port)) for _ in range(3)]
            for connection in connections:
                connection.sendall(sent)
            connected.set()
            time.sleep(0.5)
            hold.release()
            assert answer.read() == b"".join(EVENTS)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    for connection in connections:
        connection.close()


def test_who_does_not_say_that_it_closes_does_not_hold_the_end(fake: FakeVllm, way: None) -> None:
    with running(fake.url, tls_cert_file=GOOD, drain_timeout=20) as gateway:
        idle = gateway.connect()
        idle.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        assert idle.recv(15) == b"HTTP/1.1 200 OK"
        gateway.signal()
        began = time.monotonic()
    assert time.monotonic() - began < 10
    with idle:
        while idle.recv(4096):  # what was left of its answer, and the end
            pass


def test_an_answer_that_closes_is_cut_for_nobody_who_reads_it(fake: FakeVllm, way: None) -> None:
    content = b" " * 30_000_000
    fake.queue([response("200 OK", content)])
    with running(fake.url, tls_cert_file=GOOD) as gateway, gateway.connect() as connection:
        connection.sendall(
            b"POST %b HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 30\r\n\r\n" % CHAT.encode()
            + b'{"model":"demo","messages":[]}'
        )
        got = 0
        while piece := connection.recv(1 << 16):
            if got < 400_000:
                time.sleep(0.1)
            got += len(piece)
    assert got > len(content)


def test_a_handshake_has_its_time(fake: FakeVllm) -> None:
    with (
        running(fake.url, tls_cert_file=GOOD, header_timeout=1) as gateway,
        socket.create_connection((gateway.host, gateway.port), timeout=10) as silent,
    ):
        assert silent.recv(1) == b""


def test_files_that_cannot_be_used_stop_the_start(tmp_path: Path) -> None:
    other = CERTIFICATES / "other.pem"
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-in", GOOD, "-aes128", "-passout", "pass:secret", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    mended = "name a certificate and its key in PEM."
    for cert, key, said in (
        (tmp_path / "no", None, f"GATEWAY_TLS_CERT_FILE {str(tmp_path / 'no')!r} cannot be used (No such file or dir"),
        (GOOD, other, f"GATEWAY_TLS_CERT_FILE {GOOD!r} with {str(other)!r} cannot be used (the key is not the cert"),
        (GOOD, locked, "no certificate and key without a password can be read there"),
        (__file__, None, f"(no certificate and key without a password can be read there): {mended}"),
        (None, GOOD, "GATEWAY_TLS_KEY_FILE needs a certificate: set GATEWAY_TLS_CERT_FILE, too."),
    ):
        with pytest.raises(SettingsError) as raised:
            load(tls_cert_file=cert and str(cert), tls_key_file=key and str(key))
        assert said in str(raised.value)


def test_the_certificate_is_read_again(fake: FakeVllm, tmp_path: Path) -> None:
    file, port = tmp_path / "tls.pem", free_port()
    shutil.copy(GOOD, file)
    environment = {
        "GATEWAY_PORT": str(port),
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_UPSTREAMS": fake.url,
        "GATEWAY_TLS_CERT_FILE": str(file),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve"], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    with process, httpx.Client(base_url=f"https://127.0.0.1:{port}", trust_env=False, verify=trusting()) as client:
        assert process.stdout is not None
        try:
            while f"listening on https://127.0.0.1:{port}" not in process.stdout.readline():
                pass
            shown = [until_shown(port)]
            assert client.get("/health").status_code == 200
            for content, said in (
                ((CERTIFICATES / "other.pem").read_text(), "certificate read again"),
                ("nonsense", "the certificate stays as it is: GATEWAY_TLS_CERT_FILE"),
            ):
                file.write_text(content)
                process.send_signal(signal.SIGHUP)
                while said not in process.stdout.readline():
                    pass
                shown.append(until_shown(port))
            assert client.get("/health").status_code == 200  # on the connection that was there before
        finally:
            process.terminate()
    assert process.returncode == 0
    assert shown[0] != shown[1] == shown[2]


def until_shown(port: int) -> str:
    """The certificate that the port shows, once it does."""
    end = time.monotonic() + 20
    while True:
        try:
            return ssl.get_server_certificate(("127.0.0.1", port), timeout=5)
        except OSError:
            assert time.monotonic() < end
