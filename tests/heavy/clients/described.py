"""The gateway does what its OpenAPI description says, for whatever schemathesis makes of that.

Not among the tests that `make test` finds; `make test-clients` runs it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
import pytest

from bench.arms import environment
from tests.support.fake_vllm import DONE, FakeVllm, Received, Step, event, response, stream
from tests.support.gateway_process import running

LOCK = Path(__file__).parent / "schemathesis.lock"
OURS = "^/(|v1/chat/completions|api/v1/ask|health|ping|metrics|openapi.json|v1/health_check|v1/statistics|v1/status)$"
ENDLESS = "^/v1/status/stream$"
GENERATE = "^/generate$"


class AnyCall(FakeVllm):
    """Answers every call with what is a chat completion and a completion, or a chunk of either."""

    def script_for(self, request: Received) -> Sequence[Step]:
        script = super().script_for(request)
        if request.header("x-request-id") is None:
            return script
        both = {"text": "It's.", "index": 0, "finish_reason": "stop"}
        if b'"stream":true' in request.body.replace(b" ", b""):
            chunk = orjson.loads(event({"content": "It's."})[6:])
            chunk["choices"][0] |= both
            return stream([b"data: " + orjson.dumps(chunk) + b"\n\n", DONE])
        choice = {**both, "message": {"role": "assistant", "content": "It's."}}
        return [response("200 OK", orjson.dumps({"id": "c", "choices": [choice]}))]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--include-path-regex", OURS], id="ours"),
        # Its stream is of no content type, and is a row of objects, as that server had it.
        pytest.param(
            [
                "--include-path-regex",
                GENERATE,
                "--exclude-checks",
                "content_type_conformance,response_schema_conformance",
            ],
            id="generate",
        ),
        # What is in a relayed call is vLLM's to judge.
        pytest.param(
            ["--exclude-path-regex", f"{OURS}|{GENERATE}|{ENDLESS}", "--exclude-checks", "negative_data_rejection"],
            id="relayed",
        ),
    ],
)
def test_whatever_fits_the_description_is_taken_and_what_does_not_is_refused(
    options: list[str], tmp_path: Path
) -> None:
    program = environment("schemathesis", LOCK, sys.executable) / "schemathesis"
    with AnyCall() as fake, running(fake.url) as gateway:
        done = subprocess.run(
            [program, "run", f"{gateway.url}/openapi.json", "--max-examples", "50", "--seed", "1", *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
