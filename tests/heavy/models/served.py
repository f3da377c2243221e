"""The demo model's whole way: from a hub into a tarball and a bucket, and from there to answers of the real vLLM.

Not among the tests that `make test` finds; `make test-models` runs it.
"""

from __future__ import annotations

from pathlib import Path

from tests.heavy.models.conftest import NAME, Server, gateway
from tests.support.stack import Stack, started
from tests.support.whole_hub import WholeHub

# What the demo model is started with where `up` does not know that it is one.
SMALL = {
    "VLLM_DTYPE": "float32",
    "VLLM_EAGER": "true",
    "VLLM_MAX_MODEL_LEN": "4096",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_WAIT_POLICY": "passive",
    # Nobody is there.
    "HF_ENDPOINT": "http://127.0.0.1:1",
}


def answers(stack: Stack, model: str) -> None:
    call = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
    with stack.gateway() as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [model]
        answer = client.post("/v1/chat/completions", json=call)
        assert answer.status_code == 200, answer.text
        text = answer.json()["choices"][0]["message"]["content"]
    # What it was made to say.
    assert text.startswith("My name is Demo")


def test_a_tarball_of_a_hub_is_served_offline(hub: WholeHub, tmp_path: Path) -> None:
    environ = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = gateway(tmp_path, "download", NAME, "--save-as-tarfile", "--gzip", **environ)
    assert (done.returncode, done.stdout) == (0, "tiny-llama.tar.gz\n"), done.stderr
    tarball = tmp_path / "tiny-llama.tar.gz"
    with started(LLM_VLLM_MODEL_NAME=str(tarball), **SMALL) as stack:
        assert "Unpacking the model: 100 %" in stack.said
        answers(stack, NAME)


def test_a_folder_in_a_bucket_is_streamed(rclone: Server, hub: WholeHub, tmp_path: Path) -> None:
    environ = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = rclone.run("download", NAME, **environ)
    assert done.returncode == 0, done.stderr
    sent = rclone.run("upload", Path(done.stdout.strip()), "s3://models")
    assert sent.returncode == 0, sent.stderr
    address = sent.stdout.strip()
    assert address == f"s3://models/models/tiny-llama/{hub.commit(NAME)[:7]}"
    bucket = rclone.environ() | {"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}
    aws = {name: value for name, value in bucket.items() if name.startswith(("AWS_", "RUNAI_"))}
    # vLLM keeps its configuration by the address: another folder than an earlier test's.
    with started(LLM_VLLM_MODEL_NAME=address, VLLM_CACHE_ROOT=str(tmp_path / "vllm"), **aws, **SMALL) as stack:
        answers(stack, address)
