"""A model's config.json and headers, of a folder and of a hub on loopback."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.sizing.architecture import read_architecture
from gateway.sizing.checkpoint import read_checkpoint
from gateway.sizing.safetensors import BadCheckpoint, Tensor
from tests.support import checkpoints as known
from tests.support import model_hub
from tests.support.checkpoints import header_of, tensors_of, write_checkpoint
from tests.support.model_hub import COMMIT, Hub
from tests.support.ports import free_port

TINY = tensors_of(known.TINY)
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with model_hub.serving() as serving:
        yield serving


def of_hub(hub: Hub, name: str = "org/model", revision: str | None = None, **environ: str) -> list[Tensor]:
    return read_checkpoint(name, revision, {"HF_ENDPOINT": hub.url, **environ}).tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_read_without_a_network(tmp_path: Path, shards: int) -> None:
    folder = write_checkpoint(tmp_path / "model", known.TINY, TINY, shards=shards)
    # The same weights once more, as some makers give them.
    (folder / "consolidated.safetensors").write_bytes(header_of(TINY))
    read = read_checkpoint(str(folder), None, {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert sorted(read.tensors) == sorted(TINY)
    assert read_architecture(read.config) == read_architecture(known.TINY)


def test_of_a_hub_only_config_index_and_headers_are_fetched(hub: Hub, tmp_path: Path) -> None:
    tensors = tensors_of(known.LLAMA_8B)
    hub.folders["org/model"] = write_checkpoint(tmp_path, known.LLAMA_8B, tensors, shards=30)
    assert sorted(of_hub(hub)) == sorted(tensors)

    asked = [path for path in hub.asked if not path.startswith("/cdn")]
    assert len(asked) <= 30 + 6
    assert len(set(asked)) == len(asked)
    # What came after config.json is of the commit that config.json is of.
    assert {path.split("/")[4] for path in asked[1:]} == {COMMIT}
    # Of 15 GiB.
    assert hub.sent < 300_000


def test_a_header_that_is_longer_than_usual_takes_one_more_request(hub: Hub, tmp_path: Path) -> None:
    many = [Tensor(f"model.layers.0.part{number:0100}", "BF16", (1,)) for number in range(5000)]
    hub.folders["org/model"] = write_checkpoint(tmp_path, known.TINY, many)
    assert of_hub(hub) == many
    assert len([path for path in hub.asked if not path.startswith("/cdn")]) == 4


def test_a_hub_that_sends_whole_files_is_left_when_the_header_is_there(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.folders["org/model"] = write_checkpoint(tmp_path, known.LLAMA_8B, tensors_of(known.LLAMA_8B), shards=2)
    assert len(of_hub(hub)) == len(tensors_of(known.LLAMA_8B))
    # What the sockets between them hold, of 15 GiB.
    assert hub.sent < 64 * 1024 * 1024


def test_the_token_goes_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.folders["org/model"] = write_checkpoint(tmp_path, known.TINY, TINY)
    hub.gated = {"org/model"}
    assert of_hub(hub, HF_TOKEN="hf_secret")
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("name", "revision", "environ", "sentence"),
    [
        ("org/other", None, {}, "org/other on {hub} is not to be had (401): the name is wrong, or it is restricted"),
        ("org/other", None, {"HF_TOKEN": "hf_x"}, "or HF_TOKEN may not read it."),
        ("org/model", "v9", {}, "org/model on {hub} has no revision v9: name a branch, a tag or a commit."),
        ("org/model", "../..", {}, "The revision '../..' is no branch, tag or commit."),
        ("org/gated", None, {}, "org/gated on {hub} is gated: accept its terms on the hub, and set HF_TOKEN"),
        ("org/none", None, {}, "org/none on {hub} has no config.json"),
        ("org/bin", None, {}, "org/bin on {hub} has no safetensors files"),
        (
            "org/lost",
            None,
            {},
            f"{INDEX} names model-00002-of-00002.safetensors, but org/lost on {{hub}} does not",
        ),
        ("no-such-folder", None, {}, "Unknown model 'no-such-folder': there is no such folder"),
        ("org/model", None, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so that org/model is not asked for"),
        ("org/model", None, {"HF_TOKEN": "hf_x\u00e9"}, "HF_TOKEN is no token: "),
        ("org/model", None, {"HF_ENDPOINT": "http://hub:port"}, "cannot be reached for org/model (InvalidURL)"),
    ],
)
def test_what_a_hub_does_not_have_is_told(
    hub: Hub, tmp_path: Path, name: str, revision: str | None, environ: dict[str, str], sentence: str
) -> None:
    hub.folders["org/model"] = write_checkpoint(tmp_path / "model", known.TINY, TINY)
    hub.folders["org/gated"] = hub.folders["org/model"]
    hub.gated = {"org/gated"}
    hub.folders["org/none"] = tmp_path
    hub.folders["org/bin"] = tmp_path / "bin"
    hub.folders["org/bin"].mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")
    hub.folders["org/lost"] = write_checkpoint(tmp_path / "lost", known.TINY, TINY, shards=2)
    (tmp_path / "lost" / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(BadCheckpoint) as caught:
        read_checkpoint(name, revision, {"HF_ENDPOINT": hub.url, **environ})
    assert sentence.format(hub=hub.url) in str(caught.value)
    assert "hf_x" not in str(caught.value)


def test_a_hub_that_is_ill_or_away_is_told(hub: Hub) -> None:
    hub.status = 503
    with pytest.raises(BadCheckpoint, match=r"answers 503 for config.json of org/model: try again later"):
        of_hub(hub)
    with pytest.raises(BadCheckpoint, match=r"cannot be reached for org/model \(ConnectError\): see HF_ENDPOINT"):
        read_checkpoint("org/model", None, {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"})


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (b"", "it has 0 bytes. Fetch it again."),
        (struct.pack("<Q", 2**60) + b"{}", f"its header would have {2**60} bytes"),
        (struct.pack("<Q", 4) + b"[[]]", "its header is not the JSON that it should be"),
        (header_of([Tensor("a", "BF16", (1 << 41,))]), "its header is not the JSON that it should be"),
        (header_of([Tensor("a", "BF16", (-1,))]), "its header is not the JSON that it should be"),
        (struct.pack("<Q", 400) + b"{}", "cut short: it has 10 bytes of 408"),
        (struct.pack("<Q", 0), "its header would have 0 bytes"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_told(hub: Hub, tmp_path: Path, header: bytes, sentence: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(known.TINY))
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(BadCheckpoint) as caught:
        read_checkpoint(str(tmp_path), None, {})
    assert sentence in str(caught.value)

    hub.folders["org/model"] = tmp_path
    with pytest.raises(BadCheckpoint, match=r"^model\.safetensors (is no safetensors file|of org/model is cut short)"):
        of_hub(hub)


def test_a_type_that_is_not_known_is_told(tmp_path: Path) -> None:
    told = json.dumps({"a": {"dtype": "F13", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(told)) + told)
    with pytest.raises(BadCheckpoint, match="a tensor of the type 'F13'"):
        read_checkpoint(str(tmp_path), None, {})


def test_a_folder_that_lacks_something_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"it has no config\.json"):
        read_checkpoint(str(tmp_path), None, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match="has no safetensors files"):
        read_checkpoint(str(tmp_path), None, {})
    write_checkpoint(tmp_path, known.TINY, TINY)
    with pytest.raises(BadCheckpoint, match="which has no revision main"):
        read_checkpoint(str(tmp_path), "main", {})
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(len(header_of(TINY)) + 10)
    with pytest.raises(BadCheckpoint, match=r"is cut short: it has \d+ bytes of \d+"):
        read_checkpoint(str(tmp_path), None, {})
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(header_of([]))
    with pytest.raises(BadCheckpoint, match=r"config\.json is no JSON"):
        read_checkpoint(str(tmp_path), None, {})


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_an_index_that_is_none_is_told(tmp_path: Path, index: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(BadCheckpoint, match="has no weight_map of tensors and their files"):
        read_checkpoint(str(tmp_path), None, {})


def test_a_shard_that_is_missing_in_a_folder_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, known.TINY, TINY, shards=2)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match=r"names model-00001-of-00002\.safetensors, but it is not in"):
        read_checkpoint(str(tmp_path), None, {})
