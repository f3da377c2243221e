"""Downloads from a hub on loopback: what comes, what is fetched again, what is checked, and what is told."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download

from gateway.models import ModelError
from gateway.models import download as steps
from gateway.models.hashes import is_whole
from gateway.models.places import commit_of
from tests.models.conftest import FILES, NAME, Download, contents, partials
from tests.support.whole_hub import Refusal, WholeHub, oid

WEIGHTS = "model.safetensors"
INFO, TREE = f"/api/models/{NAME}/revision/main", f"/api/models/{NAME}/tree"


def resolve(hub: WholeHub, path: str) -> str:
    return f"/{NAME}/resolve/{hub.commit(NAME)}/{path}"


def fails(download: Download, **given: object) -> str:
    with pytest.raises(ModelError) as caught:
        download(**given)
    return str(caught.value)


def test_the_cache_is_the_library_s(serving: WholeHub, download: Download, cache: Path) -> None:
    where = download()
    commit = serving.commit(NAME)
    assert where == cache / "models--org--model" / "snapshots" / commit
    assert contents(where) == FILES
    # Offline, by the name of the branch, as vLLM asks for it.
    assert snapshot_download(NAME, cache_dir=cache, local_files_only=True) == str(where)
    assert hf_hub_download(NAME, "tokenizer.json", cache_dir=cache, local_files_only=True) == str(
        where / "tokenizer.json"
    )
    assert all(not os.path.isabs(os.readlink(path)) for path in where.rglob("*") if path.is_symlink())
    assert not partials(cache)
    assert commit_of(where) == commit


def test_a_folder_has_the_files_by_their_names(serving: WholeHub, download: Download, tmp_path: Path) -> None:
    where = download(local_dir=tmp_path / "folder")
    assert where == tmp_path / "folder"
    assert contents(where) == FILES
    assert commit_of(where) == serving.commit(NAME)
    # The library takes it for its own, and asks for no file again.
    serving.asked.clear()
    snapshot_download(NAME, revision=serving.commit(NAME), local_dir=where, endpoint=serving.url)
    assert serving.files_asked() == []


@pytest.mark.parametrize("local", [False, True])
def test_what_is_there_is_not_fetched_again(serving: WholeHub, download: Download, tmp_path: Path, local: bool) -> None:
    given = {"local_dir": tmp_path / "folder"} if local else {}
    where = download(**given)
    serving.asked.clear()
    assert download(**given) == where
    assert serving.files_asked() == []


def test_a_commit_and_a_branch_are_the_same_model(serving: WholeHub, download: Download, cache: Path) -> None:
    assert download(revision=serving.commit(NAME)) == download()
    assert (cache / "models--org--model/refs/main").read_text() == serving.commit(NAME)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("path", FILES)
def test_a_wrong_byte_is_found_in_a_file_of_any_size(
    serving: WholeHub, download: Download, cache: Path, tmp_path: Path, path: str, local: bool
) -> None:
    if not FILES[path]:
        return
    serving.wrong[path] = len(FILES[path]) // 2
    where = {"local_dir": tmp_path / "folder"} if local else {}
    assert f"{path} of {NAME} is damaged" in fails(download, **where)
    # Nothing that looks like a model, nor of the wrong bytes.
    assert not list(cache.rglob("config.json"))
    assert not (tmp_path / "folder" / "config.json").exists()
    assert not (tmp_path / "folder" / path).exists()
    assert not [one for one in tmp_path.rglob(f"*{oid(path, FILES[path])}*") if one.suffix != ".lock"]
    serving.wrong.clear()
    assert contents(download(**where)) == FILES


@pytest.mark.parametrize("path", [WEIGHTS, "tokenizer.json"])
def test_what_was_damaged_on_the_disk_is_fetched_again(
    serving: WholeHub, download: Download, tmp_path: Path, path: str
) -> None:
    for given in ({}, {"local_dir": tmp_path / "folder"}):
        where = download(**given)
        damaged = bytearray(FILES[path])
        damaged[-1] ^= 1
        (where / path).write_bytes(damaged)
        serving.asked.clear()
        assert contents(download(**given)) == FILES
        assert [name for name, _ in serving.files_asked()] == [path]


def test_a_connection_that_is_cut_goes_on_within_the_file(serving: WholeHub, download: Download) -> None:
    serving.cuts[WEIGHTS] = [1_000_000, 500_000, 1]
    assert contents(download()) == FILES
    parts = [part for path, part in serving.files_asked() if path == WEIGHTS]
    assert parts == [None, "bytes=1000000-", "bytes=1500000-", "bytes=1500001-"]
    assert serving.sent == sum(map(len, FILES.values()))


def test_a_hub_that_brings_nothing_any_more_is_given_up(serving: WholeHub, download: Download, cache: Path) -> None:
    serving.cuts[WEIGHTS] = [1_000_000, *[0] * 20]
    told = fails(download)
    assert told.startswith(f"The hub {serving.url} breaks off while {WEIGHTS} of {NAME} is fetched (RemoteProtocol")
    # What has come is kept, and the next one goes on from there.
    (partial,) = partials(cache)
    assert partial.read_bytes() == FILES[WEIGHTS][:1_000_000]
    serving.cuts.clear()
    serving.sent = 0
    assert contents(download()) == FILES
    assert serving.sent <= len(FILES[WEIGHTS]) - 1_000_000 + sum(map(len, FILES.values())) - len(FILES[WEIGHTS])


def test_a_hub_without_ranges_sends_all_once_more(serving: WholeHub, download: Download) -> None:
    serving.ranges = False
    serving.cuts[WEIGHTS] = [1_000_000]
    assert contents(download()) == FILES


def test_a_hub_without_ranges_that_always_breaks_off_is_given_up(serving: WholeHub, download: Download) -> None:
    serving.ranges = False
    serving.cuts[WEIGHTS] = [1_000_000] * 50
    assert "breaks off while" in fails(download)
    assert len(serving.cuts[WEIGHTS]) >= 40


def test_a_part_that_does_not_fit_any_more_is_begun_anew(serving: WholeHub, download: Download, cache: Path) -> None:
    partial = cache / "models--org--model/blobs" / f"{oid(WEIGHTS, FILES[WEIGHTS])}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * (len(FILES[WEIGHTS]) + 1))
    assert contents(download()) == FILES


def test_a_part_with_other_bytes_is_found_by_the_hash(serving: WholeHub, download: Download, cache: Path) -> None:
    partial = cache / "models--org--model/blobs" / f"{oid(WEIGHTS, FILES[WEIGHTS])}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"x" * 1000)
    assert "is damaged" in fails(download)
    assert contents(download()) == FILES


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_asked_again(serving: WholeHub, download: Download, status: int) -> None:
    # The library asks for the listing again by itself, after seconds.
    listing = [f"{TREE}/{serving.commit(NAME)}"] if status == 503 else []
    for path in (INFO, *listing, resolve(serving, WEIGHTS)):
        serving.refusals[path] = [Refusal(status), Refusal(status)]
    assert contents(download()) == FILES


def test_what_does_not_pass_is_told(serving: WholeHub, download: Download) -> None:
    serving.refusals[INFO] = [Refusal(503)] * 9
    assert fails(download) == f"The hub {serving.url} answers 503 for {NAME}: try again later."
    serving.refusals = {resolve(serving, WEIGHTS): [Refusal(429)] * 9}
    assert fails(download) == f"The hub {serving.url} is asked too often (429): try again later, or with HF_TOKEN."
    assert len(serving.refusals[resolve(serving, WEIGHTS)]) == 4
    serving.refusals = {INFO: [Refusal(429, retry_after="9000")] * 9}
    assert "is asked too often (429)" in fails(download)
    assert len(serving.refusals[INFO]) == 8


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"name": "org/other"}, "org/other on {hub} is not to be had (401): the name is wrong, or it is restricted,"),
        ({"name": "org/other", "environ": {"HF_TOKEN": "hf_x"}}, "the name is wrong, or HF_TOKEN may not read it."),
        ({"name": "model"}, "Unknown model 'model': a hub's name is ORG/NAME."),
        ({"name": "../.."}, "Unknown model '../..': a hub's name is ORG/NAME."),
        ({"revision": "v9"}, f"{NAME} on {{hub}} has no revision v9: name a branch, a tag or a commit."),
        ({"revision": "a/../.."}, "The revision 'a/../..' is no branch, tag or commit."),
        ({"name": "org/gated"}, "org/gated on {hub} is gated: accept its terms on {hub}/org/gated, and set HF_TOKEN"),
        ({"name": "org/gated", "environ": {"HF_TOKEN": "hf_x"}}, "org/gated on {hub} is gated, and not yet open to"),
        ({"environ": {"HF_TOKEN": "hf_x y"}}, "HF_TOKEN is no token: "),
        ({"environ": {"HF_ENDPOINT": "http://127.0.0.1:1"}}, "The hub http://127.0.0.1:1 cannot be reached for"),
        ({"format": "gguf"}, "has no weights as gguf"),
        ({"include": ("*.x",)}, "matches --include '*.x'"),
    ],
)
def test_what_cannot_be_fetched_is_a_sentence(
    serving: WholeHub, download: Download, tmp_path: Path, given: dict[str, object], sentence: str
) -> None:
    serving.models["org/gated"] = dict(FILES)
    serving.gated = {"org/gated"}
    told = fails(download, **given)
    assert sentence.format(hub=serving.url) in told
    assert "hf_x" not in told
    assert serving.files_asked() == []
    assert list(tmp_path.rglob("*.*")) == []


def test_the_token_opens_a_gated_model(serving: WholeHub, download: Download) -> None:
    serving.gated = {NAME}
    assert contents(download(environ={"HF_TOKEN": "hf_may"})) == FILES


@pytest.mark.parametrize(("status", "code"), [(401, ""), (403, "GatedRepo"), (403, ""), (404, "EntryNotFound")])
def test_a_file_that_is_refused_is_told(serving: WholeHub, download: Download, status: int, code: str) -> None:
    serving.refusals[resolve(serving, WEIGHTS)] = [Refusal(status, code)]
    assert ("is gated" if code == "GatedRepo" else f"is not to be had ({status})") in fails(download)
    assert contents(download()) == FILES


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    serving: WholeHub, download: Download, tmp_path: Path
) -> None:
    serving.sizes[WEIGHTS] = 10**17
    for given in ({}, {"local_dir": tmp_path / "folder"}, {"save_as_tarfile": True}):
        needed = "200.00 PB" if "save_as_tarfile" in given else "100.00 PB"
        told = fails(download, **given)
        assert told.startswith(f"{needed} are needed on the disk of {tmp_path}")
        assert re.search(r", but \d+\.\d\d [GT]B are free: ", told)
    assert serving.files_asked() == []
    assert list(tmp_path.rglob("*.*")) == []


def test_what_is_there_already_is_not_needed_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    # Each fits alone, and the two together do not.
    steps.check_disk([(tmp_path / "a", free * 2 // 3)])
    with pytest.raises(ModelError, match="are needed on the disk"):
        steps.check_disk([(tmp_path / "a", free * 2 // 3), (tmp_path / "b", free * 2 // 3)])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_than_the_list_says_is_refused(
    serving: WholeHub, download: Download, change: int
) -> None:
    serving.sizes["tokenizer.json"] = len(FILES["tokenizer.json"]) + change
    assert "has " in (told := fails(download))
    assert "by the hub's list, but it is sent as 8: download again." in told


@pytest.mark.parametrize("path", ["../evil.json", "/evil.json", "a/../../evil.json"])
def test_a_hub_cannot_write_outside_of_its_model(
    serving: WholeHub, download: Download, tmp_path: Path, path: str
) -> None:
    serving.models[NAME][path] = b"evil"
    assert "which is no path within a model" in fails(download)
    assert "which is no path within a model" in fails(download, local_dir=tmp_path / "deep" / "folder")
    assert list(tmp_path.rglob("evil*")) == []


def test_a_file_of_somebody_s_own_is_not_overwritten(serving: WholeHub, download: Download, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("my own")
    assert fails(download, local_dir=folder) == (
        f"{folder}/config.json exists, and no hub has it: remove it, or name another folder."
    )
    assert contents(folder) == {"config.json": b"my own"}
    assert serving.files_asked() == []


def test_a_folder_follows_its_model_to_another_revision(serving: WholeHub, download: Download, tmp_path: Path) -> None:
    folder = download(local_dir=tmp_path / "folder")
    serving.models[NAME]["config.json"] = json.dumps({"new": True}).encode()
    serving.models[NAME][WEIGHTS] = FILES[WEIGHTS][::-1]
    serving.cuts[WEIGHTS] = [1000, *[0] * 20]
    # Half way it is no model, of neither revision.
    assert "breaks off" in fails(download, local_dir=folder)
    assert not (folder / "config.json").exists()
    serving.cuts.clear()
    assert contents(download(local_dir=folder)) == serving.models[NAME]
    assert commit_of(folder) == serving.commit(NAME)


def test_two_names_of_one_file_are_fetched_once_into_the_cache(
    serving: WholeHub, download: Download, tmp_path: Path
) -> None:
    serving.models[NAME]["copy.safetensors"] = FILES[WEIGHTS]
    assert contents(download()) == serving.models[NAME]
    assert serving.sent == sum(map(len, FILES.values()))
    assert contents(download(local_dir=tmp_path / "folder")) == serving.models[NAME]


def test_a_folder_that_cannot_be_made_is_a_sentence(download: Download, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file/folder" in fails(download, local_dir=tmp_path / "file" / "folder")


def test_a_hash_is_of_all_bytes_and_the_size(tmp_path: Path) -> None:
    for path, data in FILES.items():
        file = tmp_path / "one"
        file.write_bytes(data)
        assert is_whole(file, oid(path, data), len(data))
        assert not is_whole(file, oid(path, data), len(data) + 1)
        assert not is_whole(file, oid(path, data + b"x"), len(data))
