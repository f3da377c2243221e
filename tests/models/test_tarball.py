"""Tarballs: their layout, that they are the same bytes each time, and what is left of one that does not end."""

from __future__ import annotations

import fcntl
import os
import tarfile
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from gateway.models import ModelError, tarball
from gateway.models.selection import RemoteFile
from tests.models.conftest import FILES, NAME, Download, contents
from tests.support.whole_hub import WholeHub, oid


@pytest.mark.parametrize("gzip", [False, True])
def test_a_tarball_is_a_cache_that_serves_offline(
    serving: WholeHub, download: Download, tmp_path: Path, gzip: bool
) -> None:
    where = download(save_as_tarfile=True, gzip=gzip)
    assert where == Path("model.tar.gz" if gzip else "model.tar")
    commit = serving.commit(NAME)
    with tarfile.open(where) as tar:
        names = tar.getnames()
        tar.extractall(tmp_path / "elsewhere", filter="data")
    unpacked = tmp_path / "elsewhere" / "model"
    assert names[0] == "model"
    assert (unpacked / "version.txt").read_text() == f"{NAME} {commit}\n"
    model = unpacked / "models--org--model"
    assert {path.name for path in model.iterdir()} == {"blobs", "refs", "snapshots"}
    assert (model / "refs/main").read_text() == commit
    assert {path.name for path in (model / "blobs").iterdir()} == {oid(path, data) for path, data in FILES.items()}
    assert snapshot_download(NAME, cache_dir=unpacked, local_files_only=True) == str(model / "snapshots" / commit)
    assert contents(model / "snapshots" / commit) == FILES
    links = [path for path in model.rglob("*") if path.is_symlink()]
    assert len(links) == len(FILES)
    assert all(os.readlink(link).startswith("../../") for link in links)


@pytest.mark.parametrize("gzip", [False, True])
def test_two_tarballs_are_the_same_bytes(
    serving: WholeHub, download: Download, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gzip: bool
) -> None:
    first = download(save_as_tarfile=True, gzip=gzip).read_bytes()
    # Of another time and user's mask, fetched anew in another order, from a commit's name.
    cache.rename(tmp_path / "other")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = os.umask(0o077)
    try:
        second = download(
            save_as_tarfile=True, gzip=gzip, tarfile_name="model", max_workers=1, revision=serving.commit(NAME)
        )
    finally:
        os.umask(before)
    assert second.read_bytes() == first


def test_a_file_of_two_names_is_there_once(serving: WholeHub, download: Download) -> None:
    serving.models[NAME] = {"config.json": b"{}", "deep/er/copy.json": b"{}"}
    with tarfile.open(download(save_as_tarfile=True)) as tar:
        assert len([one for one in tar.getmembers() if "/blobs/" in one.name]) == 1
        (deep,) = [one for one in tar.getmembers() if one.name.endswith("copy.json")]
    assert deep.linkname == f"../../../../blobs/{oid('config.json', b'{}')}"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "a\0b", "a\nb", "-a"])
def test_a_name_that_is_a_path_is_refused(serving: WholeHub, download: Download, name: str) -> None:
    with pytest.raises(ModelError, match="--tarfile-name must be a plain name, without a path, but it is "):
        download(save_as_tarfile=True, tarfile_name=name)
    assert serving.asked == []


def test_a_file_that_exists_is_told_before_anything_is_asked(
    serving: WholeHub, download: Download, cache: Path
) -> None:
    Path("model.tar").write_text("mine")
    with pytest.raises(ModelError, match=r"^model\.tar exists: remove it, or choose another name with"):
        download(save_as_tarfile=True)
    assert Path("model.tar").read_text() == "mine"
    assert serving.asked == []


CONFIG = RemoteFile("config.json", 2, oid("config.json", b"{}"))


def content(folder: Path) -> tarball.Content:
    (folder / "blob").write_bytes(b"{}")
    return tarball.Content("org/model", "0" * 40, [(CONFIG, folder / "blob")])


@pytest.mark.parametrize("zipped", [False, True])
def test_what_stops_it_leaves_nothing(tmp_path: Path, zipped: bool) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    target = tmp_path / ("a.tar.gz" if zipped else "a.tar")
    with pytest.raises(KeyboardInterrupt):
        tarball.write(target, content(tmp_path), zipped=zipped, watch=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def test_it_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target, seen = tmp_path / "a.tar", []

    def look(done: int, total: int) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))

    # What a kill has left of an earlier one.
    (tmp_path / "a.tar.part").write_bytes(b"x" * 100_000)
    tarball.write(target, content(tmp_path), zipped=False, watch=look)
    assert seen
    assert all(names == ["a.tar.part", "blob"] for names in seen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "blob"]
    assert target.stat().st_size < 100_000
    with tarfile.open(target) as tar:
        assert tar.getnames()[-1].endswith(CONFIG.oid)


def test_a_name_that_was_taken_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "a.tar"
    with pytest.raises(ModelError, match="has been made meanwhile"):
        tarball.write(target, content(tmp_path), zipped=False, watch=lambda *_: target.touch())
    assert target.read_bytes() == b""


def test_two_at_once_do_not_write_into_one_file(tmp_path: Path) -> None:
    with (tmp_path / "a.tar.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ModelError, match=r"a\.tar\.part is being written by another vllm-gateway"):
            tarball.write(tmp_path / "a.tar", content(tmp_path), zipped=False, watch=lambda *_: None)


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a\.tar cannot be written: No such file or directory\."):
        tarball.write(tmp_path / "none" / "a.tar", content(tmp_path), zipped=False, watch=lambda *_: None)
