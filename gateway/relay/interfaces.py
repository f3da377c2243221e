"""What an exchange acts on, and what it is told by: the client's side, the upstream's, and the periodic work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from gateway.admission.keys import Key
from gateway.admission.owners import Owner
from gateway.pool.upstream_pool import Upstream
from gateway.wire.errors import GatewayError
from gateway.wire.heads import AnswerHead


class Client(Protocol):
    """The side that asked; each adapter does its own framing.

    `address` is that of the connection's other end, empty where it has none, and `owner` is whose it is. `chunk` takes
    a piece that is framed as one HTTP chunk, where the answer, once begun, goes out in these.
    """

    address: str
    owner: Owner
    chunk: Callable[[bytes], None] | None

    def start(self, head: AnswerHead, length: bytes | None, request_id: str) -> None:
        """The answer's head; comes with the first byte of its body, or its end. `length` as in content-length."""

    def body(self, data: bytes) -> None:
        """A piece of the answer."""

    def end(self) -> None:
        """The answer is complete."""

    def whole(self, head: AnswerHead, content: bytes, request_id: str) -> None:
        """All of the answer at once."""

    def abort(self) -> None:
        """The answer breaks off: the connection closes without a clean end."""

    def is_gone(self) -> bool:
        """Whether nothing can reach it any more."""


class UploadingClient(Client, Protocol):
    """A client whose request can be waited with."""

    def pause(self) -> None:
        """Read no more of the request."""

    def resume(self) -> None:
        """Read on."""


class Connection(Protocol):
    """One connection to an upstream, lent to one exchange at a time."""

    reused: bool

    def send(self, request: bytes | bytearray) -> None:
        """The whole request, head and body, or a piece of an upload."""

    def send_pieces(self, pieces: Iterable[bytes | bytearray]) -> None:
        """The whole of a large request, none of which is copied where it can go out at once."""

    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Read again."""

    def release(self) -> None:
        """Done with it: to the idle ones where it can serve again."""

    def unsent(self) -> int:
        """How many bytes of the request the upstream has yet to take."""

    def discard(self) -> None:
        """Close it at once; what the upstream still does for this request is not wanted."""


class Caller(Protocol):
    """The exchange as connections see it: what they tell it."""

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
        """What was done for it has failed by no fault of an upstream's: a bug of ours, or a shortage."""


class Transport(Protocol):
    """Where connections come from."""

    def connect(self, upstream: Upstream, exchange: Caller, *, fresh: bool) -> None:
        """Call `upstream_connected` or `upstream_unreachable`, now or later; `fresh` reuses none."""


class Credentials(Protocol):
    """What the upstreams are shown.

    `value` is that of the Authorization header: empty where none is needed, None where there is none yet.
    """

    value: str | None

    def renew(self, refused: str | None, told: Callable[[GatewayError | None], None]) -> bool:
        """An upstream refused this value; False where there can be no other.

        Else `told` is called, now or later: with None once there is one, or with what the client is to be told.
        """


class Call(Protocol):
    """The exchange as the periodic work and the queue see it. No time limit of it can have passed before `deadline`."""

    request_id: str
    model: str | None
    key: Key | None
    upstream: Upstream | None
    started_at: float
    deadline: float

    def check_timeouts(self) -> None:
        """End it if a limit has passed, or set `deadline` to when one may."""

    def try_admit(self) -> bool:
        """There may be room upstream; True if it was taken."""

    def give_way(self) -> None:
        """End: too many wait."""

    def fail(self, error: GatewayError) -> None:
        """End with this."""
