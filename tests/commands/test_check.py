"""`check` inside a container."""

from __future__ import annotations

import pytest

from gateway.commands.check import check
from gateway.config.secrets import read_secrets
from gateway.config.settings import Settings


@pytest.mark.parametrize(
    ("url", "in_container", "warned"),
    [
        ("http://localhost:9", True, True),
        ("http://127.0.0.1:9", True, True),
        ("http://localhost:9", False, False),
        ("http://no.such.invalid:9", True, False),
    ],
)
def test_an_upstream_at_localhost_inside_a_container_is_warned_of(url: str, in_container: bool, warned: bool) -> None:
    said: list[str] = []
    settings = Settings(GATEWAY_UPSTREAMS=(url,))

    assert not check(settings, read_secrets(settings), [], said.append, in_container=in_container)

    assert any("the container itself" in line for line in said) == warned
