"""`usage`: sums of a real gateway's log, in both of its formats and as Compose and Kubernetes show it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from gateway.commands.usage import Usage, UsageError, as_csv, as_table, read
from gateway.observability.request_log import Format
from tests.commands.test_cli import address, serving
from tests.support.fake_vllm import FakeVllm, response

KEYS = ("sk-4f7d0c9a2b6e81d35a", "sk-77aa0c9a2b6e81d3bb")
# Of both keys: two whole answers of the one, a stream that tells and one that is cut, and what vLLM refuses.
SUMS = {
    ("key-1", "demo"): ("2", "0", "62", "8", "0"),
    ("key-2", "demo"): ("1", "0", "31", "4", "0"),
    ("key-2", "no such"): ("1", "1", "0", "0", "0"),
    ("-", "-"): ("1", "1", "0", "0", "0"),
}


@pytest.fixture(scope="module", params=["json", "text"])
def lines(request: pytest.FixtureRequest) -> list[str]:
    """What a gateway logs of these calls, and of itself."""
    form: Format = request.param
    with (
        FakeVllm() as fake,
        serving(
            "--upstream", fake.url, "--port", "0", GATEWAY_API_KEYS=",".join(KEYS), GATEWAY_LOG_FORMAT=form
        ) as process,
        httpx.Client(trust_env=False, base_url=_address(process, form)) as client,
    ):
        call = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}

        def post(key: str | None, **more: object) -> None:
            headers = {"x-api-key": key} if key else {}
            client.post("/v1/chat/completions", json=call | more, headers=headers)

        post(KEYS[0])
        post(KEYS[0])
        post(KEYS[1], stream=True)
        fake.queue([response("404 Not Found", b'{"error":{"message":"no such model","code":404}}')])
        post(KEYS[1], model="no such")
        post(None)
        client.get("/v1/models", headers={"x-api-key": KEYS[0]})
        client.get("/nope")
        client.get("/health")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
    return out.splitlines()


def _address(process: subprocess.Popen[str], form: Format) -> str:
    if form == "json":
        return address(process)
    assert process.stdout is not None
    found = next(filter(None, (re.search(r"listening on (\S+),", line) for line in process.stdout)))
    return found[1]


def summed(usage: Usage) -> dict[tuple[str, str], tuple[str, ...]]:
    rows = csv.DictReader(io.StringIO(as_csv(usage)))
    return {(row.pop("key"), row.pop("model")): tuple(row.values())[1:] for row in rows}


STAMP = "2026-12-01T12:00:00.123456789Z "
PREFIXES = {
    "plain": "",
    "docker logs --timestamps": STAMP,
    "docker compose logs": "llm-vllm-microservice  | ",
    "docker compose logs --timestamps": f"llm-vllm-microservice  | {STAMP}",
    "docker compose --ansi always logs": "\x1b[36mllm-vllm-microservice  |\x1b[0m ",
    "kubectl logs --prefix": "[pod/gateway-5c9d7f-x2x8q/gateway] ",
    "kubectl logs --prefix --timestamps": f"[pod/gateway-5c9d7f-x2x8q/gateway] {STAMP}",
}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_calls_are_summed_however_their_lines_are_shown(lines: list[str], prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("".join(f"{prefix}{line}\n" for line in lines))

    usage = read([str(file)])
    assert (summed(usage), usage.unread) == (SUMS, 0)
    assert list(usage.notes()) == []


def test_the_day_is_the_calls_own(lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "log"
    others = [re.sub(r"\d{4}-\d\d-\d\dT", "2026-02-03T", line, count=1) for line in lines]
    file.write_text("\n".join([*lines, *others]))

    rows = [row.split(",") for row in as_csv(read([str(file)])).splitlines()]
    assert rows[0][:3] == ["day", "key", "model"]
    days = [row[0] for row in rows[1:]]
    assert days == sorted(days)
    assert sum(day == "2026-02-03" for day in days) == len(SUMS)
    assert len(days) == 2 * len(SUMS)


def test_files_packed_files_and_standard_input_are_read(lines: list[str], tmp_path: Path) -> None:
    log = "\r\n".join(lines).encode()
    (tmp_path / "log").write_bytes(log)
    (tmp_path / "log.1.gz").write_bytes(gzip.compress(log[:5000]) + gzip.compress(log[5000:]))
    argv = [sys.executable, "-m", "gateway", "usage", "--csv", str(tmp_path / "log"), str(tmp_path / "log.1.gz"), "-"]

    for piped in (log, gzip.compress(log)):
        done = subprocess.run(argv, input=piped, capture_output=True, check=True, timeout=30)
        assert done.stderr == b""
        (row,) = [row for row in csv.DictReader(io.StringIO(done.stdout.decode())) if row["key"] == "key-1"]
        assert (row["calls"], row["prompt_tokens"], row["completion_tokens"]) == ("6", "186", "24")


def test_the_table_has_the_sum_of_all(lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("\n".join(lines))

    head, *rows, total = as_table(read([str(file)]))
    assert head.split() == list(as_csv(read([str(file)])).splitlines()[0].split(","))
    assert len(rows) == len(SUMS)
    assert total.split() == ["all", "5", "2", "93", "12", "0"]
    assert len({len(row) for row in (head, *rows, total)}) == 1


def test_lines_that_are_cut_or_of_others_are_counted_and_told(lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "log"
    (whole,) = [line for line in lines if "key-2" in line and "no such" not in line]
    others = ["INFO 12-01 12:17:05 [api_utils.py:286] non-default args: {'host': '127.0.0.1'}", "", '{"a": 1}', "[]"]
    cut = [whole[:at] for at in range(40, len(whole.partition("outcome")[0]), 7)]
    file.write_text("\n".join([*others, *cut, *lines]))

    usage = read([str(file)])
    assert summed(usage) == SUMS
    assert usage.unread == len(others) - 1 + len(cut)
    assert list(usage.notes()) == [
        f"{usage.unread} lines are no lines of a gateway's log, or cut: the first is line 1 of {file}."
    ]


JSON = {
    "time": "2026-12-01T10:00:00.000Z",
    "method": "POST",
    "status": 200,
    "bytes": 1,
    "outcome": "done",
    "key": None,
    "model": "m",
}


def of(*calls: dict[str, object]) -> Usage:
    usage = Usage()
    for number, call in enumerate(calls, 1):
        usage.take(json.dumps(JSON | call), number, "log")
    return usage


def test_estimates_are_marked() -> None:
    usage = of(
        {"key": "a", "prompt_tokens": 3, "completion_tokens": 4, "tokens_estimated": True},
        {"key": "a", "prompt_tokens": 1, "completion_tokens": 0, "tokens_estimated": False},
    )
    assert summed(usage) == {("a", "m"): ("2", "0", "4", "4", "7")}


def test_a_log_without_keys_or_tokens_is_told() -> None:
    assert list(of({}, {}).notes()) == [
        "No call names a key, as the gateway had none: set GATEWAY_API_KEYS_FILE to tell callers apart.",
        "No call tells its tokens: they failed, or the model servers report no usage.",
    ]


@pytest.mark.parametrize("wrong", [{"prompt_tokens": "3"}, {"key": 1}, {"model": ["m"]}, {"time": "today"}])
def test_fields_of_other_kinds_are_no_call(wrong: dict[str, object]) -> None:
    usage = of(wrong)
    assert (usage.sums, usage.unread) == ({}, 1)


def test_what_a_client_calls_its_model_drives_no_terminal_and_no_spreadsheet() -> None:
    usage = of({"model": "=1+1"}, {"model": "a\x1b[31m\n,b"})
    assert "\x1b" not in "".join(as_table(usage))
    assert {row["model"] for row in csv.DictReader(io.StringIO(as_csv(usage)))} == {"'=1+1", "a\x1b[31m\n,b"}
    assert all("\n" not in row for row in as_table(usage))


def packed(data: bytes) -> bytes:
    return gzip.compress(data * 1000, mtime=0)  # the same in each process that collects the tests


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"log cannot be read \(No such file or directory\): name logs that can"),
        (packed(b"hello")[:-9], r"log cannot be read \(Compressed file ended"),
        (packed(b"hello")[:12] + b"\xff" * 40, r"log cannot be read \(Error"),
        (b"root:x:0\n", r"There is no call in .*: 1 lines are none of its log's"),
        (b"", r"There is no call in .*: 0 lines"),
    ],
    ids=["missing", "cut", "damaged", "another's", "empty"],
)
def test_what_is_no_log_is_a_sentence(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "log"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        read([str(file)])


def test_the_command_ends_with_1_where_there_is_nothing_to_sum() -> None:
    argv = [sys.executable, "-m", "gateway", "usage", "/no/such"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("vllm-gateway: /no/such cannot be read")
