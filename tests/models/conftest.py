"""A hub on loopback with a model, and a cache for what is fetched from it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import close_session

from gateway.commands import models
from gateway.models import hub, places
from tests.support import whole_hub
from tests.support.whole_hub import WholeHub

NAME = "org/model"
# A model of each kind of file.
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": random.Random(1).randbytes(3_000_000),
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": random.Random(2).randbytes(100_000),
    "original/consolidated.00.pth": random.Random(3).randbytes(1000),
    "tokenizer.json": b'{"a": 1}',
    "tokenizer.model": b"pieces",
    "modeling_own.py": b"pass\n",
    "chat_template.jinja": b"{{ messages }}",
    "empty.txt": b"",
}

Download = Callable[..., Path]


@pytest.fixture
def serving() -> Iterator[WholeHub]:
    with whole_hub.serving() as started:
        started.models[NAME] = dict(FILES)
        yield started
    close_session()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache in which downloads land, and a folder of their own to be in."""
    monkeypatch.setattr(places, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "SHORTEST_WAIT", 0.01)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return tmp_path / "cache"


@pytest.fixture
def download(serving: WholeHub, cache: Path) -> Download:
    """Downloads, and gives what is said at the end: where it is."""

    def run(name: str = NAME, environ: dict[str, str] | None = None, **given: Any) -> Path:
        options = models.DownloadOptions(
            **{
                "model": name,
                "revision": "main",
                "include": (),
                "exclude": (),
                "format": None,
                "max_workers": 4,
                "local_dir": None,
                "tarfile_name": None,
                "save_as_tarfile": False,
                "gzip": False,
                **given,
            }
        )
        said: list[str] = []
        models.download(options, {"HF_ENDPOINT": serving.url, **(environ or {})}, said.append)
        (where,) = said
        return Path(where)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but hidden ones, by their paths in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


def partials(folder: Path) -> list[Path]:
    """What has come of files that are not whole."""
    return sorted(folder.rglob("*.incomplete"))
