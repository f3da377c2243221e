"""The page in a real browser: to ask, to stop, to watch, by hand and by keyboard, on a desk and on a phone.

Not among the tests that `make test` finds; `make test-browser` runs it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.heavy.browser.conftest import Open, Window
from tests.heavy.restarts import Vllm
from tests.support.gateway_process import Gateway, running
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
QUESTION = "What is Deep Learning?"
ANSWER = "Deep learning is a branch of machine learning"
SECRET = "sk-4f7d0c9a2b6e81d35a"
# Each text that the answer ever showed.
RECORD = """() => {
  window.seen = [];
  const answer = document.getElementById("answer");
  const note = () => window.seen.push(answer.textContent);
  new MutationObserver(note).observe(answer, { childList: true, characterData: true, subtree: true });
}"""

MORE = """() => {
  window.asks = window.fetch;
  const more = (body) => JSON.stringify({ ...JSON.parse(body), ignore_eos: true, max_new_tokens: 4000 });
  window.fetch = (path, { body, ...rest }) => window.asks(path, body ? { ...rest, body: more(body) } : rest);
}"""


def endless(window: Window, now: bool = True) -> None:
    """Its questions are answered for thousands of tokens, whatever the model thinks of it; or no more."""
    window.page.evaluate(MORE if now else "() => { window.fetch = window.asks; }")


@contextlib.contextmanager
def another_client(url: str) -> Iterator[None]:
    """It has one answer streamed after the other: a page that is drawn late finds it at work, too."""
    left = threading.Event()
    call = {"messages": {"user": "a prompt that nobody else is to see"}, "max_new_tokens": 1000, "ignore_eos": True}

    def ask() -> None:
        while not left.is_set():
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=call | {"streaming": True}) as answer:
                for _ in answer.iter_raw():
                    if left.is_set():
                        break

    with ThreadPoolExecutor() as threads:
        asks = threads.submit(ask)
        try:
            yield
        finally:
            left.set()
        asks.result()


def wait_for_work(window: Window, vllm: Vllm, count: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while (found := vllm.at_work()) != count:
        assert time.monotonic() < until, f"vLLM works on {found} requests, not on {count}"
        window.page.wait_for_timeout(250)  # each look takes the gateway's own thread a while


def sideways(window: Window) -> int:
    """How many pixels the page is wider than what shows it."""
    return int(window.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


def faults(window: Window) -> list[str]:
    """What axe finds to be serious or worse."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(window.page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")]


def test_an_answer_comes_token_by_token(window: Window, front: Gateway) -> None:
    page = window.page
    page.wait_for_selector("#model option:nth-child(2)", state="attached")
    page.get_by_label("Model").select_option("demo-model")
    page.get_by_label("System").fill("You are a helpful assistant.")
    page.evaluate(RECORD)
    window.asks(QUESTION)
    window.is_done()
    shown = window.text("#answer")
    seen = page.evaluate("window.seen")
    assert shown.startswith(ANSWER)
    assert len(set(seen)) > 10
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    assert window.text("#finish") == "stop"
    assert re.fullmatch(r"\d+ ms|\d\.\d\d s", window.text("#first-token"))
    for figure in ("#speed", "#prompt-tokens", "#answer-tokens"):
        assert float(window.text(figure).replace(",", "")) > 0
    line = next(line for line in iter(lambda: front.log(1)[0], None) if line["path"] == "/v1/chat/completions")
    assert window.text("#request-id") == line["request_id"]


def test_an_answer_may_come_whole(window: Window) -> None:
    window.page.get_by_label("Streaming").uncheck()
    window.page.get_by_label("Max tokens").fill("5")
    window.asks(QUESTION)
    window.is_done()
    assert ANSWER.startswith(window.text("#answer")[:10])
    assert (window.text("#finish"), window.text("#answer-tokens")) == ("length", "5")


def test_stop_frees_the_upstream(window: Window, vllm: Vllm) -> None:
    endless(window)
    window.asks(QUESTION)
    wait_for_work(window, vllm, 1, 20)
    window.page.wait_for_function("() => document.getElementById('answer').textContent.length > 20")
    window.page.get_by_role("button", name="Stop").click()
    wait_for_work(window, vllm, 0, 3)
    window.is_done()
    assert window.text("#finish") == "stopped"
    assert window.page.locator("#error").is_hidden()


def test_an_error_is_read_out_in_the_gateways_words(window: Window) -> None:
    window.page.get_by_label("Temperature").fill("-1")
    window.asks(QUESTION)
    alert = window.page.get_by_role("alert")
    alert.wait_for()
    assert alert.text_content() == "400: temperature must be a number of at least 0, but it is -1."
    assert re.fullmatch(r"[0-9a-f]{32}", window.text("#request-id"))
    (complaint,) = window.complaints
    assert "400" in complaint  # the browser's own word on any such answer
    window.complaints.clear()
    window.page.get_by_label("Temperature").fill("")
    window.asks(QUESTION)
    window.is_done()
    assert alert.is_hidden()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("name", "command"), [("curl", ["bash", "-c"]), ("Python", [sys.executable, "-c"])])
def test_what_is_copied_asks_the_same(window: Window, name: str, command: list[str], streaming: bool) -> None:
    page = window.page
    page.get_by_label("System").fill('It\'s "quoted" \\ and\non two lines: ä €.')
    page.get_by_label("Streaming").set_checked(streaming)
    window.asks(QUESTION)
    window.is_done()
    page.get_by_role("button", name=f"Copy {name}").click()
    page.get_by_text(f"{name} copied.").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    ended = subprocess.run([*command, copied], capture_output=True, text=True, timeout=60, check=True)
    printed = ended.stdout
    if name == "curl" and streaming:
        chunks = [json.loads(line[6:]) for line in printed.splitlines() if line.startswith("data: {")]
        printed = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    elif name == "curl":
        printed = json.loads(printed)["text"]
    assert printed.strip() == window.text("#answer").strip() != ""


def test_all_of_it_works_by_keyboard(window: Window, vllm: Vllm) -> None:
    page, keys = window.page, window.page.keyboard

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id"))

    order = []
    for _ in range(8):
        keys.press("Tab")
        order.append(focused())
    assert order == ["talk-tab", "system", "user", "model", "tokens", "temperature", "streaming", "send"]
    endless(window)
    keys.press("Enter")
    wait_for_work(window, vllm, 1, 20)
    assert focused() == "stop"
    keys.press("Escape")
    wait_for_work(window, vllm, 0, 3)
    window.is_done()
    assert focused() == "send"
    endless(window, now=False)
    page.get_by_label("User").focus()
    keys.press("ControlOrMeta+a")
    keys.type("Who are you?")
    keys.press("ControlOrMeta+Enter")
    page.locator("#finish").get_by_text("stop", exact=True).wait_for()
    assert "Demo" in window.text("#answer")
    for _ in range(2):
        keys.press("Shift+Tab")
    assert focused() == "talk-tab"
    keys.press("ArrowRight")
    assert focused() == "watch-tab"
    page.locator("#state .serving").wait_for()
    keys.press("ArrowRight")
    assert focused() == "talk-tab"
    assert page.locator("#watch-panel").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(opened: Open, front: Gateway, scheme: str) -> None:
    window = opened(front.url, viewport={"width": 320, "height": 640}, color_scheme=scheme, has_touch=True)
    window.asks(QUESTION)
    window.is_done()
    assert sideways(window) == 0
    window.page.get_by_role("tab", name="Watch").tap()
    window.page.locator("#upstreams li").wait_for()
    assert sideways(window) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened: Open, front: Gateway, scheme: str) -> None:
    window = opened(front.url, color_scheme=scheme, reduced_motion="reduce")
    assert faults(window) == []
    window.asks("")  # as an error looks
    window.page.get_by_role("alert").wait_for()
    window.complaints.clear()
    assert faults(window) == []
    window.page.get_by_role("tab", name="Watch").click()
    window.page.locator("#errors li").first.wait_for()
    assert faults(window) == []


def test_a_watch_shows_what_runs_and_what_failed(window: Window, opened: Open, front: Gateway) -> None:
    watch = opened(f"{front.url}")
    watch.page.get_by_role("tab", name="Watch").click()
    with another_client(front.url):
        watch.page.wait_for_function(
            """() => [...document.querySelectorAll("#upstreams dt")].some(
              (name) => name.textContent === "vLLM runs" && name.nextSibling.textContent === "1")"""
        )
        watch.page.wait_for_function(
            """() => [...document.querySelectorAll("#figures li")].some(
              (one) => one.textContent.startsWith("Tokens a second") && parseInt(one.children[1].textContent) > 1)"""
        )
        assert "a prompt" not in watch.text("body")
    window.page.get_by_label("Temperature").fill("-1")
    window.asks(QUESTION)
    window.page.get_by_role("alert").wait_for()
    window.complaints.clear()
    watch.page.get_by_text(window.text("#request-id")).wait_for()
    assert "answered with an error" in watch.text("#errors li")


def test_where_keys_are_set_it_asks_for_one_and_keeps_it_in_memory(opened: Open, vllm: Vllm) -> None:
    with running(vllm.url, api_keys=SECRET) as gateway:
        window = opened(gateway.url)
        page = window.page
        key = page.get_by_label("Key")
        key.wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.get_by_role("alert").count() == 0
        key.fill(SECRET[::-1])
        key.press("Enter")
        page.get_by_role("alert").wait_for()
        assert page.get_by_role("alert").text_content() == "The key that was sent is none of this gateway's."
        assert window.complaints.pop()
        assert window.complaints.pop()
        assert window.complaints == []
        key.fill(SECRET)
        key.press("Enter")
        page.wait_for_selector("#model option:nth-child(2)", state="attached")
        assert key.is_hidden()
        window.asks(QUESTION)
        window.is_done()
        assert window.text("#answer").startswith(ANSWER)
        page.get_by_role("tab", name="Watch").click()
        page.get_by_text(vllm.url).wait_for()
        assert "$KEY" in window.text("#curl")
        kept = "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}, location.href])"
        assert SECRET not in page.content() + page.evaluate(kept)
        page.reload()
        key.wait_for()
        window.complaints.clear()


def test_a_gateway_that_has_gone_is_told_of(opened: Open, vllm: Vllm) -> None:
    with running(vllm.url) as gateway:
        window = opened(gateway.url)
        window.watches()
    window.page.get_by_text("The gateway does not answer: trying again").wait_for()
    window.page.get_by_role("tab", name="Talk").click()
    window.asks(QUESTION)
    window.page.get_by_role("alert").wait_for()
    assert window.text("#error") == "The gateway does not answer."
    window.complaints.clear()


def test_pictures_for_the_readme(opened: Open, front: Gateway) -> None:
    window, watch = (opened(front.url, viewport={"width": 980, "height": 700}) for _ in range(2))
    watch.watches()
    window.page.get_by_label("Temperature").fill("-1")
    window.asks(QUESTION)
    window.page.get_by_role("alert").wait_for()
    window.complaints.clear()
    window.page.get_by_label("Temperature").fill("0")
    for question in ["Who are you?", "What is vLLM?", QUESTION] * 4:
        window.asks(question)
        window.is_done()
    window.page.screenshot(path=DOCS / "page-talk.png")
    endless(window)
    window.asks(QUESTION)
    watch.page.wait_for_timeout(3000)
    # Chromium draws what is behind another page when it finds the time: up to 25 s late, when the answer has ended.
    watch.page.bring_to_front()
    watch.page.screenshot(path=DOCS / "page-watch.png")


def test_a_killed_upstream_is_shown_within_three_seconds(window: Window, vllm: Vllm) -> None:
    """The last one: there is no vLLM after it."""
    window.watches()
    vllm.kill("api_server")
    window.page.locator("#upstreams").get_by_text("down", exact=True).wait_for(timeout=3000)
    assert window.text("#upstreams .why") == "it refuses connections"
    assert window.text("#state") == "Unavailable: no upstream serves"
