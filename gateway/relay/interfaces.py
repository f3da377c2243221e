"""The interfaces between an exchange and its surroundings: the client, the upstream and the periodic work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from gateway.admission.keys import Key
from gateway.admission.owners import Owner
from gateway.pool.upstream_pool import Upstream
from gateway.wire.errors import GatewayError
from gateway.wire.heads import AnswerHead


class Client(Protocol):
    """The client of a call; each adapter does its own framing.

    `address` is the address of the connection's peer, empty if it has none, and `owner` is its owner. `chunk` takes a
    piece that is framed as one HTTP chunk; None if the answer, once begun, is not sent in chunks.
    """

    address: str
    owner: Owner
    chunk: Callable[[bytes], None] | None

    def start(self, head: AnswerHead, length: bytes | None, request_id: str) -> None:
        """The answer's head, given with the first byte of its body or its end. `length` is the content-length."""

    def body(self, data: bytes) -> None:
        """A piece of the answer."""

    def end(self) -> None:
        """The answer is complete."""

    def whole(self, head: AnswerHead, content: bytes, request_id: str) -> None:
        """The whole answer at once."""

    def abort(self) -> None:
        """The answer is cut short: the connection closes without a clean end."""

    def is_gone(self) -> bool:
        """Whether nothing can reach the client any more."""


class UploadingClient(Client, Protocol):
    """A client whose reading of the request can be paused."""

    def pause(self) -> None:
        """Stop reading the request."""

    def resume(self) -> None:
        """Continue reading the request."""


class Connection(Protocol):
    """One connection to an upstream, lent to one exchange at a time."""

    reused: bool

    def send(self, request: bytes | bytearray) -> None:
        """The whole request, head and body, or a piece of an upload."""

    def send_pieces(self, pieces: Iterable[bytes | bytearray]) -> None:
        """The whole of a large request, without a copy of the part that can be sent at once."""

    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Read again."""

    def release(self) -> None:
        """The exchange is done: keep the connection with the idle ones if it can be reused."""

    def unsent(self) -> int:
        """How many bytes of the request the upstream has not taken yet."""

    def discard(self) -> None:
        """Close the connection at once; the upstream's further work on this request is not wanted."""


class Caller(Protocol):
    """The exchange as connections see it: the events that they report."""

    def upstream_connected(self, connection: Connection) -> None: ...

    def upstream_unreachable(self, why: str, *, timed_out: float | None = None) -> None: ...

    def upstream_head(self, head: AnswerHead, length: bytes | None) -> None: ...

    def upstream_body(self, data: bytes) -> None: ...

    def upstream_chunk(self, chunk: bytes, size: int) -> None: ...

    def upstream_end(self) -> None: ...

    def upstream_answer(self, head: AnswerHead, content: bytes) -> None: ...

    def upstream_lost(self, why: str, *, answered: bool) -> None: ...

    def upstream_paused(self) -> None: ...

    def upstream_resumed(self) -> None: ...

    def crashed(self, error: BaseException) -> None:
        """Work for the exchange failed without fault of an upstream: a bug of the gateway's, or a shortage."""


class Transport(Protocol):
    """The source of connections."""

    def connect(self, upstream: Upstream, exchange: Caller, *, fresh: bool) -> None:
        """Call `upstream_connected` or `upstream_unreachable`, now or later; `fresh` reuses no connection."""


class Credentials(Protocol):
    """The gateway's credentials for the upstreams.

    `value` is the value of the Authorization header: empty if none is needed, None if there is none yet.
    """

    value: str | None

    def renew(self, refused: str | None, told: Callable[[GatewayError | None], None]) -> bool:
        """An upstream refused this value; False if there can be no other value.

        Otherwise `told` is called, now or later: with None once there is a new value, or with the client's error.
        """


class Call(Protocol):
    """The exchange as the periodic work and the queue see it. None of its time limits can pass before `deadline`."""

    request_id: str
    model: str | None
    key: Key | None
    upstream: Upstream | None
    started_at: float
    deadline: float

    def check_timeouts(self) -> None:
        """End the call if a limit has passed, or set `deadline` to when one may pass."""

    def try_admit(self) -> bool:
        """There may be room upstream; True if it was taken."""

    def give_way(self) -> None:
        """End the call: too many wait."""

    def fail(self, error: GatewayError) -> None:
        """End the call with this error."""
