"""Talk in a real browser, in front of a scripted vLLM: what is asked, and how answers are shown, hostile ones too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from tests.heavy.browser.conftest import Open, Window, faults, sideways
from tests.support.fake_vllm import DONE, USAGE, FakeVllm, Step, completion, event, response, stream
from tests.support.gateway_process import running

INSTRUCTION = (
    "### You are a helpful, respectful and honest assistant. Answer the question from the search results, which come "
    "from the local knowledge base. Ignore what is not relevant to the question. If you do not know the answer, say so."
)
HOSTILE = """# <script>document.title = "owned"</script>

<img src="https://evil.example/a.png" onerror="document.title = 'owned'"> <b>bold</b>
<iframe src="//evil.example"></iframe>

![a picture](https://evil.example/b.png) and [click](javascript:document.title='owned'), [me](JaVaScRiPt:alert(1)),
[data](data:text/html,<script>1</script>), [here](/v1/status), [mail](mailto:a@b.example) <javascript:alert(1)>

[real](https://docs.vllm.ai/x "title") and https://vllm.ai/a_(b), `<script>`

| <script>a</script> | b |
|--|--|
| <svg onload=alert(1)> | [x](vbscript:y) |

```html" onclick="document.title='owned'
<script>document.title = "owned"</script>
```
"""
TOUR = """# One

### Two

Some **bold**, *italic*, ***both***, ~~struck~~, `code` and snake_case_names, 2 * 3 * 4, \\*plain\\*.
A second line.

- a
  - nested
- b
3. three
4. four

- [x] done
- [ ] open

| Left | Right |
|:--|--:|
| 1 | `a \\| b` |

> quoted
> > twice

---

```python
def f():
    return "**no bold**"
```
"""
TAGS = {"a", "button", "code", "div", "em", "h3", "p", "pre", "span", "strong"}
TAGS |= {"table", "tbody", "td", "th", "thead", "tr"}
# Marks that nothing ends: each is a beginning, and none of them may cost a look at all that follows.
UNENDED = [
    "**a ",
    "*a ",
    "_a ",
    "`a ``b ",
    "[",
    "[a](",
    "[a](b",
    "![",
    "~~a ",
    "> ",
    "- ",
    "* * ",
    "https://[",
    "<https://",
    "| a ",
    "\\",
]


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with FakeVllm() as server:
        yield server


@pytest.fixture
def talk(opened: Open, fake: FakeVllm) -> Iterator[Window]:
    with running(fake.url) as gateway:
        window = opened(gateway.url)
        window.page.wait_for_selector("#model option:nth-child(2)", state="attached")  # it is asked for these first
        yield window


def says(text: str, reasoning: str = "") -> list[Step]:
    """A stream of this text, in pieces."""
    pieces = [event({"content": text[at : at + 9]}) for at in range(0, len(text), 9)]
    thought = [event({"reasoning": reasoning})] if reasoning else []
    return stream([*thought, *pieces, event({"content": ""}, "stop"), event(None, usage=USAGE), DONE])


def sent(fake: FakeVllm, at: int = -1) -> dict[str, Any]:
    """A call's body as vLLM got it."""
    return dict(json.loads(fake.received[at].body))


def inside(window: Window, selector: str) -> list[str]:
    """The texts there."""
    return list(window.page.locator(f".turn:last-child .markdown {selector}").all_text_contents())


def test_a_conversation_goes_on_and_stays_in_its_tab(talk: Window, fake: FakeVllm, opened: Open) -> None:
    fake.queue(says("First."), says("Second."))
    talk.page.get_by_label("System prompt").fill("Be brief.")
    assert talk.gets("one") == "First."
    assert talk.gets("two") == "Second."
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "two"},
    ]
    assert sent(fake)["messages"] == said
    talk.page.reload()
    assert talk.page.locator(".said").all_text_contents() == ["one", "two"]
    assert talk.page.locator(".markdown").all_text_contents() == ["First.", "Second."]
    assert talk.page.get_by_label("System prompt").input_value() == "Be brief."
    assert talk.fact("finish") == "stop"
    talk.page.wait_for_selector("#model option:nth-child(2)", state="attached")
    fake.queue(says("Third."))
    assert talk.gets("three") == "Third."
    more = [{"role": "assistant", "content": "Second."}, {"role": "user", "content": "three"}]
    assert sent(fake)["messages"] == [*said, *more]
    assert opened(talk.url).page.locator(".turn").count() == 0  # another tab has its own


def test_a_question_may_be_edited_and_an_answer_retried(talk: Window, fake: FakeVllm) -> None:
    page = talk.page
    fake.queue(says("First."), says("Second."), says("Another."), says("Edited."))
    talk.gets("one")
    talk.gets("two")
    page.locator(".turn").last.get_by_role("button", name="Retry").click()
    talk.is_done()
    assert page.locator(".markdown").all_text_contents() == ["First.", "Another."]
    page.locator(".turn").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the question").fill("never")
    page.get_by_role("button", name="Cancel").click()
    assert page.locator(".said").first.text_content() == "one"
    page.locator(".turn").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the question").fill("uno")
    page.get_by_role("button", name="Ask again").click()
    talk.is_done()
    assert page.locator(".said").all_text_contents() == ["uno"]
    assert sent(fake)["messages"] == [{"role": "user", "content": "uno"}]
    assert talk.answer == "Edited."
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    page.reload()
    assert page.locator(".turn").count() == 0


def test_a_conversation_is_exported(talk: Window, fake: FakeVllm) -> None:
    fake.queue(says("**First.**"))
    talk.gets("one")
    saved = {}
    for name in ("Export .md", "Export .json"):
        with talk.page.expect_download() as download:
            talk.page.get_by_role("button", name=name).click()
        saved[download.value.suggested_filename] = download.value.path().read_text()
    assert saved["conversation.md"] == "## You\n\none\n\n## Answer\n\n**First.**\n"
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "**First.**"}]
    assert json.loads(saved["conversation.json"])["messages"] == messages


def test_settings_go_upstream(talk: Window, fake: FakeVllm) -> None:
    page = talk.page
    page.get_by_text("The same request").click()
    for label, value in (("Max tokens", "7"), ("Temperature", "0.5"), ("Top p", "0.25"), ("Seed", "0")):
        page.get_by_label(label).fill(value)
    page.get_by_label("Stop sequences").fill("END\n\\n\\n\n")
    talk.gets("one")
    wanted = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.25, "seed": 0, "stop": ["END", "\n\n"]}
    assert wanted.items() <= sent(fake).items()
    for form in ("#curl", "#python", "#simplified"):
        for value in ("0.25", "END", "seed", "one"):
            assert value in talk.text(form)


def test_reasoning_is_there_and_folded(talk: Window, fake: FakeVllm) -> None:
    fake.queue(says("Done.", reasoning="Let me <b>think</b>."))
    assert talk.gets("one") == "Done."
    assert talk.page.locator(".thoughts").is_hidden()
    talk.page.get_by_text("Reasoning").click()
    assert talk.page.locator(".thoughts").is_visible()
    assert talk.text(".thoughts") == "Let me <b>think</b>."
    fake.queue(says("Again."))
    talk.gets("two")
    assert "think" not in str(sent(fake)["messages"])


def pastes(window: Window, source: str, text: str) -> None:
    window.page.get_by_label("Source").fill(source)
    window.page.get_by_label("Text", exact=True).fill(text)
    window.page.get_by_role("button", name="Add text").click()


def brings(window: Window, kind: str, name: str, content: str) -> None:
    """Drops a file, or pastes it, as a browser tells that."""
    window.page.evaluate(
        """([kind, name, content]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(content, (one) => one.charCodeAt(0))], name));
          const options = { bubbles: true, cancelable: true };
          document.getElementById("user").dispatchEvent(kind === "drop"
            ? new DragEvent("drop", { ...options, dataTransfer: transfer })
            : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
        }""",
        [kind, name, content],
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_documents_are_context_and_are_cited_beside_the_answer(talk: Window, fake: FakeVllm, streaming: bool) -> None:
    page = talk.page
    page.get_by_label("Stream the answer").set_checked(streaming)
    page.get_by_text("Documents", exact=True).click()
    page.get_by_text("The same request").click()
    pastes(talk, "https://docs.vllm.ai/prefix", "Prefixes are kept.")
    pastes(talk, "", "javascript:alert(1) is no address.")
    brings(talk, "drop", "javascript:alert(1)", "dropped")
    brings(talk, "paste", "notes.md", "pasted")
    page.locator("#documents li").nth(3).wait_for()
    page.get_by_role("button", name="Remove pasted text 2").click()
    page.set_input_files("#files", {"name": "chosen.txt", "mimeType": "text/plain", "buffer": b"chosen"})
    page.locator("#documents li").nth(3).wait_for()
    fake.queue(says("Yes [1].") if streaming else [response("200 OK", completion("Yes [1]."))])
    assert talk.gets("Are they kept?") == "Yes [1]."
    documents = [
        ("https://docs.vllm.ai/prefix", "Prefixes are kept."),
        ("javascript:alert(1)", "dropped"),
        ("notes.md", "pasted"),
        ("chosen.txt", "chosen"),
    ]
    results = "\n\n".join(f"[{at}] {source}\n{text}" for at, (source, text) in enumerate(documents, 1))
    system, user = sent(fake)["messages"]
    assert system["content"] == f"{INSTRUCTION} ### Search results: {results} \n\n"
    assert user["content"] == "Are they kept?"
    sources = page.locator(".sources > li")
    assert [text.replace("Excerpt", " ") for text in sources.all_text_contents()] == [
        f"[{at}] {source} {text}" for at, (source, text) in enumerate(documents, 1)
    ]
    link = sources.first.get_by_role("link")
    assert (link.get_attribute("href"), link.get_attribute("rel")) == (documents[0][0], "noopener noreferrer")
    assert page.locator(".sources a").count() == 1
    answer, cited = page.locator(".answer-text").bounding_box(), page.locator(".sources").bounding_box()
    assert answer["x"] + answer["width"] <= cited["x"]  # beside it
    assert sources.first.get_by_text("Prefixes are kept.").is_hidden()
    sources.first.get_by_text("Excerpt").click()
    assert sources.first.get_by_text("Prefixes are kept.").is_visible()
    for form in ("#curl", "#python", "#simplified"):
        assert "reranked_docs" in talk.text(form)
        assert "Search results" in talk.text(form)
    assert faults(talk) == []
    page.reload()
    assert page.locator("#documents li").count() == 4
    assert page.locator(".sources > li").count() == 4


def test_a_document_that_is_no_text_is_refused_with_a_sentence(talk: Window) -> None:
    page = talk.page
    brings(talk, "drop", "image.png", "\x89PNG\x00")
    page.get_by_text("image.png is not text in UTF-8: save it as text first.").wait_for()
    page.set_input_files("#files", {"name": "long.txt", "mimeType": "text/plain", "buffer": b"a" * 2_500_000})
    page.get_by_text("long.txt has 2.5 MB: a document may have 1 MB.").wait_for()
    page.get_by_role("button", name="Add text").click()
    page.get_by_text("Paste a text first.").wait_for()
    assert page.locator("#documents li").count() == 0


def test_what_a_tab_cannot_keep_is_told(talk: Window, fake: FakeVllm) -> None:
    page = talk.page
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); }; }")
    talk.gets("one")
    assert "export it before you reload" in talk.text("#not-kept")


def test_markdown_is_shown(talk: Window, fake: FakeVllm) -> None:
    fake.queue(says(TOUR))
    talk.gets("one")
    shown = partial(inside, talk)
    assert (shown("h3"), shown("h4")) == (["One"], ["Two"])
    assert (shown("strong"), shown("p > em"), shown("s")) == (["bold", "both"], ["italic"], ["struck"])
    assert shown("strong > em") == ["both"]
    assert shown("p")[0].endswith("code and snake_case_names, 2 * 3 * 4, *plain*.\nA second line.")
    assert shown("p code") == ["code"]
    assert shown("ul ul li") == ["nested"]
    assert shown("ol li") == ["three", "four"]
    assert talk.page.locator(".markdown ol").get_attribute("start") == "3"
    assert shown("ul >> nth=-1") == ["☑ done☐ open"]
    assert (shown("th"), shown("td")) == (["Left", "Right"], ["1", "a | b"])
    assert talk.page.locator(".markdown td").last.evaluate("(cell) => getComputedStyle(cell).textAlign") == "right"
    assert shown("blockquote blockquote") == ["twice"]
    assert len(shown("hr")) == 1
    assert shown("pre") == ['def f():\n    return "**no bold**"']
    talk.page.locator(".code-block").get_by_role("button", name="Copy").click()
    talk.page.wait_for_function("() => document.getElementById('told').textContent === 'Code copied.'")
    assert talk.page.evaluate("navigator.clipboard.readText()") == 'def f():\n    return "**no bold**"'
    assert faults(talk) == []


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hostile_answer_stays_text(talk: Window, fake: FakeVllm, streaming: bool) -> None:
    page = talk.page
    page.get_by_label("Stream the answer").set_checked(streaming)
    fake.queue(says(HOSTILE) if streaming else [response("200 OK", completion(HOSTILE))])
    answer = talk.gets("one")
    assert page.title() == "vllm-gateway"
    made = page.evaluate("[...document.querySelectorAll('.markdown *')].map((one) => one.localName)")
    assert set(made) <= TAGS
    attributes = page.evaluate(
        "[...document.querySelectorAll('.markdown *')].flatMap((one) => [...one.attributes].map(({ name }) => name))"
    )
    assert set(attributes) <= {"class", "href", "rel", "tabindex", "target", "title", "type"}
    for text in ('<script>document.title = "owned"</script>', "<iframe", "[click](javascript:", "[here](/v1/status)"):
        assert text in answer
    links = {
        text: [page.locator(f".markdown a >> nth={at}").get_attribute(name) for name in ("href", "rel", "target")]
        for at, text in enumerate(inside(talk, "a"))
    }
    hrefs = {text: href for text, (href, _, _) in links.items()}
    assert hrefs == {
        "https://evil.example/a.png": "https://evil.example/a.png",
        "a picture": "https://evil.example/b.png",
        "real": "https://docs.vllm.ai/x",
        "https://vllm.ai/a_(b)": "https://vllm.ai/a_(b)",
    }
    assert {(rel, target) for _, rel, target in links.values()} == {("noopener noreferrer", "_blank")}
    # That nothing was fetched of any other host is what `opened` sees to.
    assert sideways(talk) == 0


@pytest.mark.timeout(120)
def test_marks_that_nothing_ends_are_shown_at_once(talk: Window) -> None:
    for mark in UNENDED:
        text = mark * (100_000 // len(mark))
        for shown in (text, text.replace(" ", "\n")):
            length = talk.page.evaluate(
                """(text) => {
                  const node = document.createElement("div");
                  showMarkdown(node, text);
                  return node.textContent.length;
                }""",
                shown,
            )
            assert length >= 0


def test_an_answer_that_grows_keeps_what_is_there(talk: Window) -> None:
    kept = talk.page.evaluate(
        """(text) => {
          const node = document.createElement("div");
          showMarkdown(node, text.slice(0, 40));
          const first = node.firstElementChild;
          const whole = document.createElement("div");
          for (let at = 41; at <= text.length; at += 1) showMarkdown(node, text.slice(0, at));
          showMarkdown(whole, text);
          return [node.firstElementChild === first, node.isEqualNode(whole)];
        }""",
        TOUR,
    )
    assert kept == [True, True]
