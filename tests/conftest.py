"""Fixtures: a scripted vLLM and a gateway in front of it, and, once a session, the real vLLM."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, settings

from tests.support import gateway_process
from tests.support.examples import IN_CI, examples
from tests.support.fake_vllm import FakeVllm
from tests.support.gateway_process import Gateway, running
from tests.support.stack import Stack, started

# The machine's own settings must not reach the tests.
for name in list(os.environ):
    if name.startswith(("GATEWAY_", "LLM_", "OPEA_", "OTEL_")):
        del os.environ[name]

# Who runs the tests in the background has Ctrl-C's signal ignored, and so would have what they start; so has nohup the
# hangup's.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A slow machine is no failure: no example has a deadline, and drawing examples may take its time.
settings.register_profile(
    "ours",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=examples(300).max_examples,
    print_blob=IN_CI,
)
settings.load_profile("ours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real vLLM first: it takes most of a minute to start, in which the other processes run the rest."""
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with FakeVllm() as server:
        yield server


@pytest.fixture(params=["shortcut", "app"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every gateway of the test serves the data path in this way."""
    monkeypatch.setattr(gateway_process, "SHORTCUT", request.param == "shortcut")


@pytest.fixture
def gateway(fake: FakeVllm) -> Iterator[Gateway]:
    with running(fake.url) as started:
        yield started


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with gateway.client() as started:
        yield started


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    with started() as everything:
        yield everything
