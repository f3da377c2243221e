"""Which files of a model are wanted."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.models import ModelError
from gateway.models.selection import FORMATS, RemoteFile, Wanted, check_path, select
from tests.models.conftest import FILES

LISTED = [RemoteFile(path, len(data), "0" * 40) for path, data in FILES.items()]
GOES_WITH_ANY = {
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "modeling_own.py",
    "chat_template.jinja",
    "empty.txt",
}


def chosen(*files: RemoteFile, **wanted: Any) -> set[str]:
    return {file.path for file in select(files or LISTED, Wanted(**wanted), "org/model")}


def test_without_a_word_all_files_are_wanted() -> None:
    assert chosen() == set(FILES)


@pytest.mark.parametrize(
    ("wanted", "weights"),
    [
        ("safetensors", {"model.safetensors", "model.safetensors.index.json"}),
        ("bin", {"pytorch_model.bin"}),
        ("pt", {"original/consolidated.00.pth"}),
    ],
)
def test_a_format_leaves_the_weights_of_others_out_and_keeps_all_else(wanted: str, weights: set[str]) -> None:
    assert chosen(format=wanted) == GOES_WITH_ANY | weights


@pytest.mark.parametrize("other", ["tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", "model.ckpt", "a.gguf"])
def test_what_other_frameworks_read_is_no_format_s(other: str) -> None:
    assert other not in chosen(*LISTED, RemoteFile(other, 1, "0" * 40), format="safetensors")


def test_a_tokenizer_is_one_whatever_its_ending() -> None:
    assert "tokenizer.bin" in chosen(*LISTED, RemoteFile("tokenizer.bin", 1, "0" * 40), format="safetensors")


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        ({"include": ["*.json"]}, {"config.json", "model.safetensors.index.json", "tokenizer.json"}),
        ({"include": ["*.json", "*.py"], "exclude": ["tok*", "*index*"]}, {"config.json", "modeling_own.py"}),
        ({"include": ["original/"]}, {"original/consolidated.00.pth"}),
        ({"include": ["*.p*"], "format": "pt"}, {"modeling_own.py", "original/consolidated.00.pth"}),
    ],
)
def test_patterns_are_the_hub_s_own(wanted: dict[str, object], files: set[str]) -> None:
    assert chosen(**wanted) == files


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"include": ["*.x", "*.y"]}, "No file of org/model matches --include '*.x' --include '*.y': it has chat_temp"),
        ({"exclude": ["*"]}, "No file of org/model matches --exclude '*': it has "),
        ({"format": "gguf"}, "org/model has no weights as gguf: its weights are bin and pt and safetensors."),
        ({"format": "gguf", "include": ["*.py"]}, "org/model has no weights as gguf: it has modeling_own.py."),
        ({"format": "bin", "include": ["*.index.json"]}, "org/model has no weights as bin: it has model.safeten"),
    ],
)
def test_nothing_to_fetch_is_an_error(wanted: dict[str, object], sentence: str) -> None:
    with pytest.raises(ModelError) as caught:
        chosen(**wanted)
    assert sentence in str(caught.value)


def test_a_model_without_files_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"^org/model has no files\.$"):
        select([], Wanted(), "org/model")


def test_every_format_has_a_name_of_the_command_line() -> None:
    assert list(FORMATS) == ["safetensors", "bin", "pt", "gguf"]


@pytest.mark.parametrize("path", ["", "/etc/x", "a//b", "../x", "a/../../x", "a/.", "a\\b", "a\0b", "a/"])
def test_a_hub_cannot_name_a_file_outside_of_the_model(path: str) -> None:
    with pytest.raises(ModelError, match="which is no path within a model"):
        check_path(path)


def test_a_path_within_the_model_is_fine() -> None:
    check_path("a/.b/c..d.json")
