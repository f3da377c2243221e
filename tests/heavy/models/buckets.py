"""Uploads into real servers of S3: what is there afterwards, and what they refuse.

Not among the tests that `make test` finds; `make test-models` runs it.
"""

from __future__ import annotations

import filecmp
import random
from pathlib import Path
from typing import Any

import boto3
import pytest

from gateway.models import ModelError, s3, upload
from tests.heavy.models.conftest import KEYS, Server

REVISION = "0123456789abcdef0123456789abcdef01234567"
TARGET = "models/big/0123456"


@pytest.fixture(params=["rclone", "moto"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a file of several parts."""
    folder = tmp_path / "big"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub" / "note.txt").write_text("a note")
    data = random.Random(6)
    with (folder / "model.safetensors").open("wb") as file:
        for _ in range(150):
            file.write(data.randbytes(1_000_000))
    return folder


def client(server: Server) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.url,
        region_name=KEYS["AWS_REGION"],
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )


def fetched(server: Server, key: str, to: Path) -> Path:
    client(server).download_file("models", key, str(to))
    return to


def keys(server: Server, prefix: str) -> set[str]:
    found = client(server).list_objects_v2(Bucket="models", Prefix=prefix)
    return {one["Key"] for one in found.get("Contents", ())}


def test_a_folder_is_there_byte_for_byte(server: Server, folder: Path, tmp_path: Path) -> None:
    done = server.run("upload", folder, "s3://models/own", "--revision", REVISION)
    assert (done.returncode, done.stdout) == (0, f"s3://models/own/{TARGET}\n"), done.stderr
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix() for path in files}
    assert keys(server, "own/") == {f"own/{TARGET}/{name}" for name in names}
    for path in files:
        name = path.relative_to(folder).as_posix()
        assert filecmp.cmp(path, fetched(server, f"own/{TARGET}/{name}", tmp_path / "got"), shallow=False)

    again = server.run("upload", folder, "s3://models/own", "--revision", REVISION)
    assert again.returncode == 1
    assert f"s3://models/own/{TARGET}/config.json exists: --overwrite writes over it." in again.stderr
    (folder / "sub" / "note.txt").unlink()
    over = server.run("upload", folder, "s3://models/own", "--revision", REVISION, "--overwrite")
    assert over.returncode == 0, over.stderr
    assert keys(server, "own/") == {f"own/{TARGET}/{name}" for name in names - {"sub/note.txt"}}


def test_a_tarball_is_one_object(server: Server, folder: Path, tmp_path: Path) -> None:
    tarball = (folder / "model.safetensors").rename(tmp_path / "big.tar")
    done = server.run("upload", tarball, "s3://models", "--revision", REVISION)
    assert (done.returncode, done.stdout) == (0, f"s3://models/{TARGET}/big.tar\n"), done.stderr
    assert filecmp.cmp(tarball, fetched(server, f"{TARGET}/big.tar", tmp_path / "got"), shallow=False)


def test_a_bucket_that_is_not_there_is_told(server: Server, folder: Path) -> None:
    done = server.run("upload", folder, "s3://nowhere", "--revision", REVISION)
    assert done.returncode == 1
    assert f"There is no bucket s3://nowhere at {server.url}: make it, or correct its name." in done.stderr


@pytest.mark.parametrize(
    ("name", "code"), [("AWS_ACCESS_KEY_ID", "InvalidAccessKeyId"), ("AWS_SECRET_ACCESS_KEY", "SignatureDoesNotMatch")]
)
def test_keys_that_are_wrong_are_told(rclone: Server, folder: Path, name: str, code: str) -> None:
    done = rclone.run("upload", folder, "s3://models/wrong", "--revision", REVISION, **{name: "wrongwrong"})
    assert done.returncode == 1
    assert f"does not take the credentials for s3://models ({code})" in done.stderr
    assert "secretsecret" not in done.stderr
    assert keys(rclone, "wrong/") == set()


@pytest.mark.parametrize("size", [1000, 100_000_000])
def test_a_server_with_conditions_keeps_what_came_meanwhile(moto: Server, tmp_path: Path, size: int) -> None:
    """As a second upload would that has looked before the first one wrote."""
    (tmp_path / "one.tar").write_bytes(b"x" * size)
    source = upload.source_of(tmp_path / "one.tar", f"raced{size}", REVISION)
    key = f"models/raced{size}/0123456/one.tar"
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in moto.environ().items():
            patch.setenv(variable, value)
        bucket = s3.Bucket(s3.parse("s3://models"), None)
        patch.setattr(bucket, "keys", lambda prefix: iter(()))
        bucket.client.put_object(Bucket="models", Key=key, Body=b"first")
        with pytest.raises(ModelError, match=r"one\.tar has been written meanwhile by another: it is left\.$"):
            upload.upload(bucket, source, lambda done, total: None, overwrite=False)
        assert "Uploads" not in bucket.client.list_multipart_uploads(Bucket="models")
    assert fetched(moto, key, tmp_path / "got").read_bytes() == b"first"
