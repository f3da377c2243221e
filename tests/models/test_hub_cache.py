"""Models in caches and tarballs: what is found, what is unpacked, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from gateway.models import ModelError
from gateway.models.hub_cache import CachedModel, find

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = b'{"model_type": "llama"}'
WEIGHTS = bytes(range(256)) * 1000
SMALL = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()
LARGE = hashlib.sha256(WEIGHTS).hexdigest()
MODEL = "n/models--org--name"
SNAPSHOT = f"{MODEL}/snapshots/{COMMIT}"

# What a good one has: the bytes of files, and where links lead.
GOOD: dict[str, bytes | str] = {
    "n/version.txt": b"org/name\n",
    f"{MODEL}/refs/main": COMMIT.encode(),
    f"{SNAPSHOT}/config.json": f"../../blobs/{SMALL}",
    f"{SNAPSHOT}/model.safetensors": f"../../blobs/{LARGE}",
    f"{MODEL}/blobs/{SMALL}": CONFIG,
    f"{MODEL}/blobs/{LARGE}": WEIGHTS,
}


def make(target: Path, entries: dict[str, bytes | str], *odd: tarfile.TarInfo) -> Path:
    with tarfile.open(target, "w:gz" if target.suffix == ".gz" else "w") as tar:
        for name, value in entries.items():
            entry = tarfile.TarInfo(name)
            if isinstance(value, bytes):
                entry.size = len(value)
                tar.addfile(entry, io.BytesIO(value))
            else:
                entry.type, entry.linkname = tarfile.SYMTYPE, value
                tar.addfile(entry)
        for entry in odd:
            tar.addfile(entry)
    return target


@pytest.mark.parametrize("name", ["n.tar", "n.tar.gz", "other.tar"])
def test_a_tarball_is_unpacked_once(tmp_path: Path, name: str) -> None:
    seen: list[tuple[int, int]] = []
    tarball = make(tmp_path / name, GOOD)
    cached = find(tarball, tmp_path / "unpacked", lambda done, total: seen.append((done, total)))
    assert cached is not None
    assert cached.name == "org/name"
    assert cached.environment() == {"HF_HUB_CACHE": str(cached.cache), "HF_HUB_OFFLINE": "1"}
    snapshot = cached.cache / "models--org--name" / "snapshots" / COMMIT
    assert (snapshot / "config.json").read_bytes() == CONFIG
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert os.readlink(snapshot / "config.json") == f"../../blobs/{SMALL}"
    assert seen[-1] == (tarball.stat().st_size, tarball.stat().st_size)

    seen.clear()
    assert find(tarball, tmp_path / "unpacked", lambda done, total: seen.append((done, total))) == cached
    assert seen == []


def test_a_tarball_that_has_changed_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    tarball, unpacked = make(tmp_path / "n.tar", GOOD), tmp_path / "unpacked"
    first = find(tarball, unpacked)
    make(tarball, GOOD | {"n/more.txt": b"more"})
    second = find(tarball, unpacked)
    assert first is not None
    assert second is not None
    assert not first.cache.exists()
    assert (second.cache / "more.txt").exists()


@pytest.mark.parametrize("within", [".", "n", "deep"])
def test_a_folder_may_have_a_cache_in_it(tmp_path: Path, within: str) -> None:
    with tarfile.open(make(tmp_path / "n.tar", GOOD)) as tar:
        tar.extractall(tmp_path / "models", filter="data")
    folder = tmp_path / "models" if within == "." else tmp_path / "models" / "n"
    if within == "deep":
        folder = (tmp_path / "models").rename(tmp_path / "again") / "n"
    assert find(folder, tmp_path / "unpacked") == CachedModel("org/name", folder if within != "." else folder / "n")
    assert not (tmp_path / "unpacked").exists()


def test_a_folder_may_have_a_tarball_in_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    make(tmp_path / "models" / "n.tar.gz", GOOD)
    cached = find(tmp_path / "models", tmp_path / "unpacked")
    assert cached is not None
    assert cached.name == "org/name"
    make(tmp_path / "models" / "m.tar", GOOD)
    with pytest.raises(ModelError, match=r"has 2 tarballs: name one of them, as .*/models/m\.tar\.$"):
        find(tmp_path / "models", tmp_path / "unpacked")


def test_what_is_no_cache_is_nobody_s(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    make(tmp_path / "plain" / "n.tar", GOOD)
    for name in ("empty", "plain", "none"):
        assert find(tmp_path / name, tmp_path / "unpacked") is None


def link(name: str, to: str) -> dict[str, bytes | str]:
    return GOOD | {name: to}


def without(name: str) -> dict[str, bytes | str]:
    return {path: value for path, value in GOOD.items() if path != name}


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (GOOD | {"../evil": b"x"}, "'../evil' leads out of it"),
        (GOOD | {"n/../../evil": b"x"}, "leads out of it"),
        (GOOD | {"/evil": b"x"}, "'/evil' leads out of it"),
        (link("n/evil", "../../evil"), "'n/evil' leads out of it"),
        (link("n/evil", "/etc/passwd"), "'n/evil' leads out of it"),
        (link("n/evil", "models--org--name/blobs") | {"n/evil/x": b"x"}, "'n/evil/x' is behind a link"),
        (GOOD | {f"./{SNAPSHOT}/config.json": b"x"}, "is there twice"),
        (GOOD | {f"{MODEL}/blobs/{LARGE}": WEIGHTS[:-1] + b"x"}, "is damaged"),
        (GOOD | {f"{MODEL}/blobs/{SMALL}": CONFIG[:-1] + b"x"}, "is damaged"),
        (without(f"{MODEL}/blobs/{LARGE}"), "leads to no file: it is cut short"),
        (without(f"{MODEL}/refs/main"), "has no models--org--name/refs/main"),
        (without(f"{SNAPSHOT}/config.json"), "must hold one model of a hub's cache, but it holds none with a config"),
        ({"n/x": b"x"}, "must hold one model of a hub's cache, but it holds none with a config.json."),
        (
            GOOD | {"n/models--a--b/snapshots/x/config.json": b"{}"},
            "but it holds models--a--b and models--org--name.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tarball_that_is_odd_is_refused(tmp_path: Path, entries: dict[str, bytes | str], sentence: str) -> None:
    with pytest.raises(ModelError) as caught:
        find(make(tmp_path / "n.tar", entries), tmp_path / "unpacked")
    assert str(tmp_path / "n.tar") in str(caught.value)
    assert sentence in str(caught.value)
    assert not list(tmp_path.rglob("evil"))
    if "refs" not in sentence and "one model" not in sentence and "holds" not in sentence:
        assert [path.suffix for path in (tmp_path / "unpacked").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE])
def test_a_device_is_refused(tmp_path: Path, kind: bytes) -> None:
    odd = tarfile.TarInfo("n/odd")
    odd.type, odd.linkname = kind, "n/version.txt"
    with pytest.raises(ModelError, match="'n/odd' is neither a file nor a folder nor a link"):
        find(make(tmp_path / "n.tar", GOOD, odd), tmp_path / "unpacked")


@pytest.mark.parametrize("name", ["n.tar", "n.tar.gz"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7])
def test_a_tarball_that_is_cut_short_is_refused(tmp_path: Path, name: str, part: float) -> None:
    data = make(tmp_path / name, GOOD).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ModelError, match=r"is no whole tarball|is cut short|holds none with a config"):
        find(tmp_path / name, tmp_path / "unpacked")


def test_a_wrong_byte_within_a_zipped_one_is_found(tmp_path: Path) -> None:
    plain = bytearray(make(tmp_path / "n.tar", GOOD).read_bytes())
    plain[plain.index(WEIGHTS[:256]) + 100] ^= 1
    (tmp_path / "n.tar.gz").write_bytes(gzip.compress(bytes(plain)))
    with pytest.raises(ModelError, match="is damaged: its bytes are not those of its hash"):
        find(tmp_path / "n.tar.gz", tmp_path / "unpacked")


def test_a_disk_that_is_too_small_is_told_with_both_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModelError, match=r"needs \d+\.\d+ kB or more on the disk of .*, but 1\.00 kB are free"):
        find(make(tmp_path / "n.tar", GOOD), tmp_path / "unpacked")


def test_what_stops_it_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(make(tmp_path / "n.tar", GOOD), tmp_path / "unpacked", stop)
    assert [path.suffix for path in (tmp_path / "unpacked").iterdir()] == [".lock"]
