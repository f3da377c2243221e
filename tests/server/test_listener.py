"""A listener that is closed resets nobody: who waits is accepted, who comes too late is refused."""

from __future__ import annotations

import errno
import select
import socket
import sys

import pytest

from gateway.server.listener import accept_the_last, listen


def connecting(port: int) -> socket.socket:
    """A client's socket that begins to connect and does not wait."""
    client = socket.socket()
    client.setblocking(False)
    assert client.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
    return client


def test_those_that_wait_are_accepted() -> None:
    with listen("127.0.0.1", 0) as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(20)]
        accepted = list(accept_the_last(listener))
    assert {one.getpeername() for one in accepted} == {client.getsockname() for client in clients}
    for one, client in zip(accepted, clients, strict=True):
        one.sendall(b"x")
        assert client.recv(1) == b"x"
        one.close()
        client.close()


@pytest.mark.skipif(sys.platform != "linux", reason="no other system can tell a listener to take no more")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_one_that_comes_between_the_last_look_and_the_close_is_refused_and_not_reset(host: str) -> None:
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        assert list(accept_the_last(listener)) == []
        client = socket.socket(listener.family)
        client.setblocking(False)
        assert client.connect_ex((host, port)) == errno.EINPROGRESS
        assert not select.select([], [client], [], 0.1)[1]
    with client:
        assert select.select([], [client], [], 10)[1]  # it has asked again
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


def test_a_client_that_comes_too_late_finds_the_one_that_listens_next() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        list(accept_the_last(listener))
        client = connecting(port)
    with client, listen("127.0.0.1", port) as next_one:
        next_one.settimeout(10)
        next_one.accept()[0].close()


def test_one_that_has_left_meanwhile_is_no_end_of_the_others() -> None:
    leaves = [ConnectionAbortedError()]

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            if leaves:
                raise leaves.pop()
            return super().accept()

    with Listener() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            (one,) = accept_the_last(listener)
            one.close()
