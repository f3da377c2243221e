"""The commands that move models, as they are typed: usage, exit statuses, and what is told without the extra."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import whole_hub
from tests.support.paths import ROOT

# A Python without the extra, whatever is installed here.
WITHOUT = """
import sys
for name in ("boto3", "huggingface_hub", "yaml"):
    sys.modules[name] = None
from gateway.__main__ import main
main()
"""


def run(folder: Path, *arguments: str, code: str | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "gateway"]
    given = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:1", **environ}
    return subprocess.run(
        [sys.executable, *program, *arguments], cwd=folder, env=given, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("command", "library"),
    [
        ("download org/model", "huggingface_hub"),
        ("upload . s3://models", "boto3"),
        ("serving-template org/model --image x", "yaml"),
    ],
)
def test_without_the_extra_it_says_how_to_install_it(tmp_path: Path, command: str, library: str) -> None:
    done = run(tmp_path, *command.split(), code=WITHOUT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"vllm-gateway: `{command.split()[0]}` needs {library}, which is not installed: "
        "pip install 'vllm-gateway[models]'.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("download", "Missing argument 'ORG/NAME'"),
        ("serving-template org/model", "Missing option '--image'"),
        ("upload", "Missing argument 'FILE|FOLDER'"),
        ("upload .", "Missing argument 's3://BUCKET[/PREFIX]'"),
        ("download org/model --format onnx", "'onnx' is not one of 'safetensors', 'bin', 'pt', 'gguf'"),
        ("download org/model --max-workers 0", "0 is not in the range 1<=x<=64"),
        ("download org/model --gzip", "--tarfile-name and --gzip are for --save-as-tarfile."),
        ("download org/model --tarfile-name x", "--tarfile-name and --gzip are for --save-as-tarfile."),
        ("download org/model --local-dir x --save-as-tarfile", "are two places: leave one of them out."),
    ],
)
def test_wrong_usage_is_told_before_anything_is_done(tmp_path: Path, arguments: str, sentence: str) -> None:
    done = run(tmp_path, *arguments.split())
    assert done.returncode == 2
    assert sentence in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_one_sentence_and_status_1(tmp_path: Path) -> None:
    done = run(tmp_path, "download", "org", HF_HUB_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert done.stderr == "vllm-gateway: Unknown model 'org': a hub's name is ORG/NAME.\n"
    assert list(tmp_path.iterdir()) == []


def test_offline_is_told_as_what_it_is(tmp_path: Path) -> None:
    done = run(tmp_path, "download", "org/model", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert done.stderr == "vllm-gateway: HF_HUB_OFFLINE is set, so that org/model is not asked for: unset it.\n"


def test_serve_imports_nothing_that_moves_models() -> None:
    look = (
        "import sys, gateway.cli, gateway.commands.serve, gateway.app; print(sorted(name for name in sys.modules "
        "if name.split('.')[0] in ('boto3', 'botocore', 'huggingface_hub', 'yaml', 'tarfile') "
        "or name.startswith(('gateway.models.', 'gateway.commands.models'))))"
    )
    done = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_document_shows_what_a_download_says(tmp_path: Path) -> None:
    (shown,) = re.findall(
        r"^```console\n\$ vllm-gateway (download .*\n(?:.*\n)*?)```$",
        (ROOT / "docs/models.md").read_text(),
        re.MULTILINE,
    )
    command, _, said = shown.partition("\n")
    with whole_hub.serving() as hub:
        hub.models["demo/tiny-llama"] = {f"{name}.json": b"{}" for name in ("config", "b", "c", "d", "tokenizer")} | {
            "model.safetensors": bytes(2_880_000)
        }
        done = run(tmp_path, *command.split(), HF_ENDPOINT=hub.url, HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = f"{done.stderr}{done.stdout}".replace(str(tmp_path), "/home/me/.cache/huggingface/hub")
    # In a pipe quarters of the way are told, as far as there is time for them.
    told = re.sub(r"(Looking|Downloading).*: \d+ %\n(?=\1)", "", told)
    commit = re.compile("[0-9a-f]{40}")
    assert commit.sub("", told) == commit.sub("", said)
