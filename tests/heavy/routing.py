"""What routing by prefix finds in the caches of real vLLM, by their own counters.

Not among the tests that `make test` finds; `make test-routing` runs it.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import click
import httpx
import orjson
import pytest

from gateway.modelserver.vllm_process import DEMO_NAME
from gateway.pool.upstream_pool import Upstream, UpstreamPool
from tests.heavy.restarts import Vllm
from tests.support.load import gateway

CHAT = "/v1/chat/completions"
CONTEXTS, CALLS, AT_ONCE = 20, 200, 8
# Each with other contexts, in another order; the figures are their means.
SEEDS = (1, 2, 3)
# In tokens: vLLM's attention on the CPU asks for a multiple of 32. In blocks: of a prompt the template, which all have,
# and the context; half of the contexts, two for each call that runs, and one that vLLM never gives out.
BLOCK, SHARED, OWN = 32, 3, 35
HALF = SHARED + CONTEXTS // 2 * OWN + 2 * AT_ONCE + 1
# The demo model's chat template shows it what is behind the last "question:", which is why that word is not here.
TEMPLATE = (
    "### You are a helpful, respectful and honest assistant. Answer the question from the search results, which come "
    "from the local knowledge base. Ignore what is not relevant to the question. If you do not know the answer, say "
    "so. ### Search results: \n\n"
)
# Each of one token.
WORDS = ("the", "a", "of", "to", "in", "and", "that", "is", "for", "with", "policy", "server", "model", "data")


class Engine(Vllm):
    """A vLLM whose cache has so many blocks, tells what it found there, and can be emptied."""

    def __init__(self, folder: Path, blocks: int) -> None:
        super().__init__(folder, "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(blocks))

    def forget(self) -> None:
        """Its cache is empty; as long as a call holds blocks it says no."""
        until = time.monotonic() + 20
        while not httpx.post(f"{self.url}/reset_prefix_cache", trust_env=False).json()["success"]:
            assert time.monotonic() < until, "vLLM's cache stays in use"
            time.sleep(0.05)

    def counted(self) -> Counter[str]:
        """So far, in tokens: `queries`, those of prompts, and `hits`, those of them that the cache had."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False, timeout=20).text
        found = re.findall(r"^vllm:prefix_cache_(queries|hits)_total\{.*\} (\S+)$", text, re.MULTILINE)
        return Counter({name: int(float(value)) for name, value in found})


@dataclass(frozen=True)
class Run:
    """The part of the prompts' tokens that caches had, the busiest one's part of all tokens, and calls by how."""

    hits: float
    busiest: float
    routed: Counter[str]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    """Two whose caches hold half of the contexts each, and one that holds all."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")  # which has /reset_prefix_cache
        made = [Engine(tmp_path_factory.mktemp("vllm"), blocks) for blocks in (HALF, HALF, 2 * HALF)]
        for started in [pool.submit(stack.enter_context, one.running()) for one in made]:
            started.result()
        yield made


def body(context: int, number: int, *, stream: bool = False) -> bytes:
    """The call of this number: about this context, behind what all share."""
    chance = random.Random(context)
    text = " ".join(chance.choices(WORDS, k=1100))
    said = f"{TEMPLATE}Document {context}: {text}.\n\n### Asked: what does line {number} say?"
    call = {"model": DEMO_NAME, "messages": [{"role": "user", "content": said}], "max_tokens": 1, "stream": stream}
    return orjson.dumps({**call, "stream_options": {"include_usage": True}} if stream else call)


def contexts(urls: Sequence[str], seed: int) -> list[int]:
    """So many that each of these is the first place of as many.

    Hashing gives each server its part of many contexts. Of twenty one of two may have thirteen, more than it holds:
    what is lost then is lost to chance and says nothing of the rule.
    """
    pool = UpstreamPool(tuple(Upstream.from_url(url) for url in urls), by_prefix=True)
    homes: dict[str, list[int]] = {}
    for upstream in pool:
        upstream.state = "serving"
        pool.set_models(upstream, (DEMO_NAME,))
        homes[upstream.url] = []
    for number in range(CALLS):
        pool.key_of(DEMO_NAME, None, body(-number, 0))  # until it has learned what all share
    for context in itertools.count(1000 * seed):
        home = pool.select(DEMO_NAME, 0, key=pool.key_of(DEMO_NAME, None, body(context, 0)))
        assert home is not None
        if len(homes[home.url]) < CONTEXTS // len(urls):
            homes[home.url].append(context)
        if sum(map(len, homes.values())) == CONTEXTS:
            break
    return list(itertools.chain(*homes.values()))


def run(engines: Sequence[Engine], order: Sequence[int], *, gateways: int = 1, routing: str, stream: bool) -> Run:
    """A call about each context of this order, by gateways that have just started to vLLM that know nothing."""
    for one in engines:
        one.forget()
    before = [one.counted() for one in engines]
    with contextlib.ExitStack() as stack:
        urls = [one.url for one in engines]
        ports = [stack.enter_context(gateway(urls, GATEWAY_ROUTING=routing))[1] for _ in range(gateways)]
        clients = [
            stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60))
            for port in ports
        ]
        for client in clients:
            wait_until_all_serve(client)

        def call(number: int) -> int:
            content = body(order[number], number, stream=stream)
            answer = clients[number % gateways].post(CHAT, content=content)
            assert answer.status_code == 200, answer.text
            found = re.search(rb'"prompt_tokens":(\d+)', answer.content)
            assert found, answer.text
            return int(found[1])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            tokens = list(pool.map(call, range(len(order))))
        told = "".join(client.get("/metrics").text for client in clients)
    assert {count // BLOCK for count in tokens} == {SHARED + OWN}
    until = time.monotonic() + 20
    while True:
        counted = [one.counted() - had for one, had in zip(engines, before, strict=True)]
        queries = [one["queries"] for one in counted]
        if sum(queries) == sum(tokens):
            break
        assert time.monotonic() < until, f"vLLM counts {queries} tokens of prompts, and told callers of {sum(tokens)}"
        time.sleep(0.05)
    routed: Counter[str] = Counter()
    for how, count in re.findall(r'^gateway_routed_total\{how="(\w+)"\} (\S+)$', told, re.MULTILINE):
        routed[how] += int(float(count))
    return Run(sum(one["hits"] for one in counted) / sum(tokens), max(queries) / sum(tokens), routed)


def wait_until_all_serve(client: httpx.Client) -> None:
    until = time.monotonic() + 20
    while any(one["state"] != "serving" for one in client.get("/v1/status").json()["upstreams"]):
        assert time.monotonic() < until, "an upstream never serves"
        time.sleep(0.02)


def test_two_caches_behind_the_gateway_find_what_one_of_twice_the_size_finds(
    engines: list[Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    halves, whole = engines[:2], engines[2:]
    found: dict[str, list[Run]] = {}
    for seed in SEEDS:
        order = contexts([one.url for one in halves], seed) * (CALLS // CONTEXTS)
        random.Random(seed).shuffle(order)
        for name, arm in {
            "one with all": run(whole, order, routing="prefix", stream=False),
            "two": run(halves, order, routing="prefix", stream=False),
            "two, by two gateways": run(halves, order, routing="prefix", stream=False, gateways=2),
            "two, by load alone": run(halves, order, routing="least", stream=False),
            # Where each waits for its prompt to be computed, eight cost as much as a place down.
            "two, in streams": run(halves, order, routing="prefix", stream=True),
        }.items():
            found.setdefault(name, []).append(arm)
    (best, *others) = (mean(one.hits for one in runs) for runs in found.values())
    with capsys.disabled():
        click.echo(f"\n\n{'vLLM':22}{'hits':>6}{'of one':>8}{'busiest':>9}  calls by how")
        for name, runs in found.items():
            hits, busiest = (mean(getattr(one, figure) for one in runs) for figure in ("hits", "busiest"))
            routed = sum((one.routed for one in runs), Counter[str]())
            how = ", ".join(f"{count} {how}" for how, count in routed.most_common() if count)
            click.echo(f"{name:22}{hits:6.3f}{hits / best:8.3f}{busiest:9.2f}  {how}")
    by_prefix, by_two_gateways, by_load, in_streams = (hits / best for hits in others)
    assert by_load <= 0.8, "so many hits by load alone say that this shows nothing"
    assert by_prefix >= 0.95
    assert in_streams >= 0.85
    assert by_two_gateways >= 0.90
