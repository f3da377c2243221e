"""A token server, and a vLLM that takes its tokens alone, both scripted and on real sockets."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, unquote_plus

import orjson

from tests.support.fake_vllm import FakeVllm, Received, Step, response

CLIENT, SECRET = "gate way:1", "s3cret+/%= äöü"
REFUSED = response("401 Unauthorized", b'{"error":"Unauthorized"}')


class TokenServer(FakeVllm):
    """Gives `token-1`, `token-2` and so on, each for `life`; queued scripts go first."""

    life: Any = 3600
    given = 0

    @property
    def settings(self) -> dict[str, str]:
        """What the gateway is told of it."""
        return {
            "upstream_token_url": f"{self.url}/token",
            "upstream_client_id": CLIENT,
            "upstream_client_secret": SECRET,
        }

    def script_for(self, request: Received) -> Sequence[Step]:
        with self.changed:
            self.received.append(request)
            self.changed.notify_all()
        return self._scripts.popleft() if self._scripts else [self.token()]

    def token(self) -> bytes:
        """An answer with the next one."""
        self.given += 1
        fields = {"access_token": f"token-{self.given}", "token_type": "bearer", "expires_in": self.life}
        return response("200 OK", orjson.dumps(fields), "cache-control: no-store")


def asked_by(request: Received) -> tuple[str, str, str]:
    """In which way a token was asked for, and by whom."""
    form = {name: values[0] for name, values in parse_qs(request.body.decode()).items()}
    assert (request.method, form.pop("grant_type")) == ("POST", "client_credentials")
    assert request.header("content-type") == "application/x-www-form-urlencoded"
    basic = re.fullmatch("Basic (.+)", request.header("authorization") or "")
    if basic is None:
        return "body", form["client_id"], form["client_secret"]
    assert not form
    user, password = base64.b64decode(basic[1]).decode("ascii").split(":")
    return "basic", unquote_plus(user), unquote_plus(password)


class GuardedVllm(FakeVllm):
    """Takes the `accepted` tokens alone, of its probes, too; the calls that it did not take are in `refused`."""

    def __init__(self, *accepted: str) -> None:
        super().__init__()
        self.accepted = set(accepted)
        self.refused: list[Received] = []

    def script_for(self, request: Received) -> Sequence[Step]:
        if (request.header("authorization") or "").removeprefix("Bearer ") in self.accepted:
            return super().script_for(request)
        if request.header("x-request-id") is not None:
            with self.changed:
                self.refused.append(request)
                self.changed.notify_all()
        return [REFUSED]
