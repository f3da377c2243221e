"""The page in a real browser, in front of the real vLLM: to talk, to stop, to watch, on a desk and on a phone.

Not among the tests that `make test` finds; `make test-browser` runs it, with talk.py and watch.py before it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.heavy.browser.conftest import Open, Window, faults, sideways
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
  const turns = document.getElementById("turns");
  const note = () => window.seen.push(turns.querySelector(".markdown")?.textContent ?? "");
  new MutationObserver(note).observe(turns, { childList: true, characterData: true, subtree: true });
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


def test_an_answer_comes_with_its_figures(window: Window, front: Gateway) -> None:
    page = window.page
    page.wait_for_selector("#model option:nth-child(2)", state="attached")
    page.get_by_label("Model", exact=True).select_option("demo-model")
    page.get_by_label("System prompt").fill("You are a helpful assistant.")
    assert window.gets(QUESTION).startswith(ANSWER)
    assert window.fact("finish") == "stop"
    assert re.fullmatch(r"\d+ ms|\d\.\d\d s", window.fact("first-token"))
    for figure in ("speed", "prompt-tokens", "answer-tokens"):
        assert float(window.fact(figure).replace(",", "")) > 0
    line = next(line for line in iter(lambda: front.log(1)[0], None) if line["path"] == "/v1/chat/completions")
    assert window.fact("request-id") == line["request_id"]


def test_an_answer_is_shown_as_it_comes(window: Window) -> None:
    window.page.evaluate(RECORD)
    endless(window)
    window.asks(QUESTION)
    window.page.wait_for_function("() => new Set(window.seen).size > 10")
    assert window.page.locator(".answer[aria-busy=true]").count() == 1
    window.page.keyboard.press("Escape")
    window.is_done()
    seen = window.page.evaluate("window.seen")
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))


def test_an_answer_may_come_whole(window: Window) -> None:
    window.page.get_by_label("Stream the answer").uncheck()
    window.page.get_by_label("Max tokens").fill("5")
    assert ANSWER.startswith(window.gets(QUESTION)[:10])
    assert (window.fact("finish"), window.fact("answer-tokens")) == ("length", "5")


def test_stop_frees_the_upstream(window: Window, vllm: Vllm) -> None:
    endless(window)
    window.asks(QUESTION)
    wait_for_work(window, vllm, 1, 20)
    window.page.wait_for_function("() => document.querySelector('.markdown').textContent.length > 20")
    window.page.get_by_role("button", name="Stop").click()
    wait_for_work(window, vllm, 0, 3)
    window.is_done()
    assert window.fact("finish") == "stopped"
    assert window.page.get_by_role("alert").count() == 0


def test_an_error_is_read_out_in_the_gateways_words_and_may_be_retried(window: Window) -> None:
    window.page.get_by_label("Temperature").fill("-1")
    window.asks(QUESTION)
    window.page.get_by_role("alert").wait_for()
    (complaint,) = window.complaints
    assert "400" in complaint  # the browser's own word on any such answer
    assert window.has_failed() == "400: temperature must be a number of at least 0, but it is -1."
    assert re.fullmatch(r"[0-9a-f]{32}", window.fact("request-id"))
    window.page.get_by_label("Temperature").fill("")
    window.page.get_by_role("button", name="Retry").click()
    window.is_done()
    assert window.page.get_by_role("alert").count() == 0
    assert window.answer.startswith(ANSWER)
    assert window.page.locator(".turn").count() == 1


@pytest.mark.parametrize("streaming", [True, False])
def test_what_is_copied_asks_the_same(window: Window, home: Path, streaming: bool) -> None:
    page = window.page
    page.get_by_label("System prompt").fill('It\'s "quoted" \\ and\non two lines: ä €.')
    page.get_by_label("Stream the answer").set_checked(streaming)
    page.get_by_text("The same request").click()
    answers = [window.gets("Who are you?"), window.gets(QUESTION)]
    assert answers[0] != answers[1]
    for title, command in (
        ("curl", ["bash", "-c"]),
        ("OpenAI client", [str(home / "bin" / "python"), "-c"]),
        ("Simplified form", ["bash", "-c"]),
    ):
        page.get_by_role("button", name=f"Copy {title}").click()
        page.wait_for_function("(text) => document.getElementById('told').textContent === text", arg=f"{title} copied.")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert "Who are you?" in copied  # of a conversation it is all
        ended = subprocess.run([*command, copied], capture_output=True, text=True, timeout=60, check=True)
        printed = ended.stdout
        if title == "OpenAI client":
            assert len(copied.splitlines()) == 4
        elif streaming:
            chunks = [json.loads(line[6:]) for line in printed.splitlines() if line.startswith("data: {")]
            printed = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        else:
            printed = json.loads(printed)["choices"][0]["message"]["content"]
        assert printed.strip() == answers[1].strip() != "", title


def test_all_of_it_works_by_keyboard(window: Window, vllm: Vllm) -> None:
    page, keys = window.page, window.page.keyboard

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))

    order = []
    for _ in range(6):
        keys.press("Tab")
        order.append(focused())
    assert order == ["talk-tab", "What is vLLM?", "What is Deep Learning?", "Who are you?", "user", "send"]
    page.get_by_label("Message").focus()
    endless(window)
    keys.type("Who are you?")
    keys.press("Shift+Enter")
    keys.press("Enter")
    wait_for_work(window, vllm, 1, 20)
    assert window.text(".said") == "Who are you?\n"
    keys.press("Escape")
    wait_for_work(window, vllm, 0, 3)
    window.is_done()
    endless(window, now=False)
    keys.type("Who are you?")
    keys.press("Enter")
    window.is_done()
    assert "Demo" in window.answer
    page.get_by_role("tab", name="Talk").focus()
    keys.press("ArrowRight")
    assert focused() == "watch-tab"
    page.locator("#state .serving").wait_for()
    keys.press("ArrowRight")
    assert focused() == "talk-tab"
    assert page.locator("#watch-panel").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened: Open, front: Gateway, scheme: str) -> None:
    window = opened(front.url, color_scheme=scheme, reduced_motion="reduce")
    assert faults(window) == []
    window.page.get_by_text("Documents", exact=True).click()
    window.page.get_by_text("The same request").click()
    window.page.get_by_label("Temperature").fill("-1")
    window.asks(QUESTION)
    window.has_failed()
    window.page.get_by_label("Temperature").fill("0")
    window.gets(QUESTION)
    assert faults(window) == []
    window.page.get_by_role("tab", name="Watch").click()
    window.page.locator("#errors li").first.wait_for()
    assert faults(window) == []


@pytest.mark.parametrize("width", [320, 360])
def test_a_phone_shows_it_without_scrolling_sideways(opened: Open, front: Gateway, width: int) -> None:
    window = opened(front.url, viewport={"width": width, "height": 640}, has_touch=True)
    window.gets(QUESTION)
    for closed in ("Settings", "Documents", "The same request"):
        window.page.get_by_text(closed, exact=True).tap()
    assert sideways(window) == 0
    window.page.get_by_role("tab", name="Watch").tap()
    window.page.locator("#upstreams li").wait_for()
    assert sideways(window) == 0


def test_a_watch_shows_what_runs_and_what_failed(window: Window, opened: Open, front: Gateway) -> None:
    watch = opened(f"{front.url}")
    watch.page.get_by_role("tab", name="Watch").click()
    with another_client(front.url):
        watch.page.wait_for_function(
            """() => [...document.querySelectorAll("#upstreams dt")].some(
              (name) => name.textContent === "Running" && name.nextSibling.textContent === "1")"""
        )
        watch.page.wait_for_function(
            """() => [...document.querySelectorAll("#figures li")].some(
              (one) => one.textContent.startsWith("Tokens/s") && parseInt(one.children[1].textContent) > 1)"""
        )
        assert watch.text("#models tbody tr") == "demo-model1 of 110"
        assert "a prompt" not in watch.text("body")
    window.page.get_by_label("Temperature").fill("-1")
    window.asks(QUESTION)
    window.has_failed()
    watch.page.get_by_text(window.fact("request-id")).wait_for()
    shown = watch.text("#errors li")
    for part in ("400", "bad_request", "temperature must be a number of at least 0, but it is -1."):
        assert part in shown


def test_where_keys_are_set_it_asks_for_one_and_keeps_it_in_memory(opened: Open, vllm: Vllm) -> None:
    with running(vllm.url, api_keys=SECRET) as gateway:
        window = opened(gateway.url)
        page = window.page
        key = page.get_by_label("API key")
        key.wait_for()
        assert page.evaluate("document.activeElement.id") == "key"
        assert page.get_by_role("alert").count() == 0
        assert window.text("#version") == ""
        key.fill(SECRET[::-1])
        key.press("Enter")
        page.get_by_role("alert").wait_for()
        assert page.get_by_role("alert").text_content() == "The key that was sent is none of this gateway's."
        assert len(window.complaints) == 2
        window.complaints.clear()
        key.fill(SECRET)
        key.press("Enter")
        page.wait_for_selector("#model option:nth-child(2)", state="attached")
        assert key.is_hidden()
        page.get_by_text("The same request").click()
        assert window.gets(QUESTION).startswith(ANSWER)
        assert "$KEY" in window.text("#curl")
        assert "OPENAI_API_KEY" in window.text("#python")
        page.get_by_role("tab", name="Watch").click()
        page.get_by_text(vllm.url).wait_for()
        assert window.text("#keys tbody tr").startswith("key-1")
        kept = "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}, location.href])"
        assert ANSWER in page.evaluate(kept)
        assert SECRET not in page.content() + page.evaluate(kept)
        page.reload()
        key.wait_for()
        window.complaints.clear()


def test_a_gateway_that_has_gone_is_told_of(opened: Open, vllm: Vllm) -> None:
    with running(vllm.url) as gateway:
        window = opened(gateway.url)
        window.watches()
    window.page.get_by_text("The gateway does not answer. Trying again").wait_for()
    window.page.get_by_role("tab", name="Talk").click()
    window.asks(QUESTION)
    assert window.has_failed() == "The gateway does not answer."


def test_pictures_for_the_readme(opened: Open, front: Gateway) -> None:
    window, watch = (opened(front.url, viewport={"width": 1280, "height": 800}) for _ in range(2))
    watch.watches()
    window.page.get_by_label("Temperature").fill("-1")
    window.asks(QUESTION)
    window.has_failed()
    window.page.get_by_label("Temperature").fill("0")
    for question in ["Who are you?", "What is vLLM?", QUESTION] * 4:
        window.gets(question)
    window.page.get_by_role("button", name="New conversation").click()
    for question in ("What is vLLM?", QUESTION):
        window.gets(question)
    window.page.evaluate("scrollTo(0, 0)")
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
    # A probe that was under way when it died says that its answer broke off; the next one cannot connect any more.
    window.page.locator("#upstreams .card > .note").get_by_text("it refuses connections", exact=True).wait_for()
    assert window.text("#state") == "Unavailable: no upstream is serving"
