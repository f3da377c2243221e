"""Debian's Chromium, driven by Playwright, and a real vLLM with a gateway in front of it."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.arms import environment
from tests.heavy.restarts import Vllm
from tests.support.gateway_process import Gateway, running

CHROMIUM = Path("/usr/bin/chromium")
# What Chromium would look up of its own accord, and what a machine without a screen or a GPU lacks.
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--no-first-run",
]


@dataclass
class Window:
    """A page of the gateway's: `complaints` are what the browser's console says, and must be read by the test."""

    page: Any
    url: str
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def hear(self, said: Any) -> None:
        """What the console says."""
        if said.type in ("error", "warning"):
            self.complaints.append(f"{said.text} ({said.location['url']})")

    def watches(self) -> None:
        """Shows how all is."""
        self.page.get_by_role("tab", name="Watch").click()
        self.page.locator("#state .serving").wait_for()

    def asks(self, question: str) -> None:
        """As a person would."""
        self.page.get_by_label("Message").fill(question)
        self.page.get_by_role("button", name="Send").click()

    def text(self, selector: str) -> str:
        """What is shown there now."""
        return str(self.page.text_content(selector))

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return self.text(".turn:last-child .markdown")

    def fact(self, name: str) -> str:
        """What is told of the last answer under this name."""
        return self.text(f".turn:last-child .facts .{name}")

    def is_done(self) -> None:
        """Wait until the answer has ended."""
        self.page.wait_for_selector(".turn:last-child .answer[aria-busy=false]")
        self.page.wait_for_selector("#send:visible")

    def gets(self, question: str) -> str:
        """Asks, and returns the answer once it has ended."""
        self.asks(question)
        self.is_done()
        return self.answer

    def has_failed(self) -> str:
        """The sentence of an answer that is an error; the browser's own word on it is no complaint."""
        alert = self.page.locator(".turn:last-child").get_by_role("alert")
        alert.wait_for()
        self.complaints.clear()
        return str(alert.text_content())


Open = Callable[..., Window]


@pytest.fixture(scope="session")
def home() -> Path:
    """An environment of the browser's driver and of OpenAI's client, made once; of the same Python as this one."""
    return environment("browser", Path(__file__).parent / "browser.lock", sys.executable).parent


@pytest.fixture(scope="session")
def browser(home: Path) -> Iterator[Any]:
    site.addsitedir(sysconfig.get_path("purelib", vars={"base": str(home)}))
    from playwright.sync_api import sync_playwright

    assert CHROMIUM.exists(), "Chromium is needed: install it (Debian: apt install chromium)"
    with sync_playwright() as playwright:
        # Root's would not start with its sandbox.
        sandbox = os.geteuid() != 0
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS, chromium_sandbox=sandbox)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a gateway's page; at the end no console may have complained, and no other host have been asked."""
    windows: list[Window] = []

    def open_page(url: str, **options: Any) -> Window:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", "timezone_id": "UTC", **options}
        )
        context.set_default_timeout(60_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        window = Window(context.new_page(), url)
        windows.append(window)
        window.page.on("console", window.hear)
        window.page.on("pageerror", lambda error: window.complaints.append(str(error)))
        window.page.on("request", lambda request: window.asked.append(request.url))
        window.page.goto(f"{url}/")
        return window

    yield open_page
    for window in windows:
        window.page.context.close()
        assert window.complaints == []
        assert [url for url in window.asked if not url.startswith((f"{window.url}/", "data:"))] == []


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    started = Vllm(tmp_path_factory.mktemp("vllm"))
    with started.running():
        yield started


@pytest.fixture(scope="session")
def front(vllm: Vllm) -> Iterator[Gateway]:
    """The gateway in front of it."""
    with running(vllm.url, drain_timeout=1) as gateway:
        yield gateway


@pytest.fixture
def window(opened: Open, front: Gateway) -> Window:
    return opened(front.url)


def sideways(window: Window) -> int:
    """How many pixels the page is wider than what shows it."""
    return int(window.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def faults(window: Window) -> list[str]:
    """What axe finds, be it only moderate, or advice."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(window.page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found]
