"""Uploads into a bucket on loopback: under which names, in which order, and what is told of refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.commands import models
from gateway.models import ModelError, s3
from gateway.models.upload import source_of
from tests.models.conftest import FILES, NAME, Download
from tests.support import bucket as buckets
from tests.support.bucket import Bucket, Refusal
from tests.support.paths import ROOT
from tests.support.whole_hub import WholeHub

REVISION = "0123456789abcdef0123456789abcdef01234567"
TARGET = "models/llama/0123456"
Upload = Callable[..., str]


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    with buckets.serving() as started:
        yield started


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of a test, and none of this machine's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    files = {"AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none")}
    for name, value in {**given, **files, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "TRIES", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, with what belongs to nobody else beside it."""
    for path, data in FILES.items():
        file = tmp_path / "llama" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "llama" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors"}})
    )
    (tmp_path / "llama" / ".git").mkdir()
    (tmp_path / "llama" / ".git" / "secret").write_text("secret")
    return tmp_path / "llama"


@pytest.fixture
def upload(bucket: Bucket) -> Upload:
    def run(source: Path, address: str = "s3://models", **given: Any) -> str:
        options = {"family": None, "revision": REVISION, "endpoint_url": bucket.url, "overwrite": False, **given}
        said: list[str] = []
        models.upload(models.UploadOptions(source, address, **options), said.append)
        (where,) = said
        return where

    return run


def fails(upload: Upload, source: Path, *address: str, **given: object) -> str:
    with pytest.raises(ModelError) as caught:
        upload(source, *address, **given)
    return str(caught.value)


def written(bucket: Bucket) -> list[str]:
    return [asked.removeprefix("PUT ") for asked in bucket.done if asked.startswith("PUT ")]


def test_a_folder_goes_up_file_by_file_and_its_config_last(bucket: Bucket, upload: Upload, folder: Path) -> None:
    assert upload(folder) == f"s3://models/{TARGET}"
    there = {key.removeprefix(f"{TARGET}/"): data for key, data in bucket.objects.items()}
    assert there == FILES | {"model.safetensors.index.json": (folder / "model.safetensors.index.json").read_bytes()}
    assert written(bucket)[-1] == f"{TARGET}/config.json"
    assert written(bucket).count(f"{TARGET}/config.json") == 1
    assert bucket.conditions == [f"{TARGET}/config.json *"]


def test_family_prefix_and_revision_make_the_name(bucket: Bucket, upload: Upload, folder: Path) -> None:
    where = upload(folder, "s3://models/our/own/", family="Llama-3.1", revision="v2")
    assert where == "s3://models/our/own/models/Llama-3.1/v2"
    assert all(key.startswith("our/own/models/Llama-3.1/v2/") for key in bucket.objects)


def test_what_was_downloaded_says_itself_what_it_is(
    serving: WholeHub, download: Download, bucket: Bucket, upload: Upload, tmp_path: Path
) -> None:
    serving.models[NAME]["model.safetensors.index.json"] = b'{"weight_map": {}}'
    commit = serving.commit(NAME)[:7]
    assert upload(download(), revision=None) == f"s3://models/models/model/{commit}"
    bucket.objects.clear()
    where = upload(download(local_dir=tmp_path / "mine"), revision=None)
    assert where == f"s3://models/models/mine/{commit}"
    assert {key.rpartition("/")[2] for key in bucket.objects} >= {"config.json", "tokenizer.json"}
    for gzip in (False, True):
        tarball = download(save_as_tarfile=True, gzip=gzip, tarfile_name="any")
        assert upload(tarball, revision=None) == f"s3://models/models/model/{commit}/{tarball.name}"
        assert bucket.objects[f"models/model/{commit}/{tarball.name}"] == tarball.read_bytes()


def test_a_large_file_goes_up_in_parts(
    bucket: Bucket, upload: Upload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tarball = tmp_path / "llama.tar"
    with tarball.open("wb") as file:
        file.truncate(70 * 1024 * 1024)
        file.write(b"begin")
    assert upload(tarball) == f"s3://models/{TARGET}/llama.tar"
    assert bucket.objects[f"{TARGET}/llama.tar"] == tarball.read_bytes()
    assert written(bucket) == [f"{TARGET}/llama.tar"] * 2
    assert bucket.conditions == [f"{TARGET}/llama.tar *"]
    assert bucket.parts == {}


def test_what_exists_is_not_written_over(bucket: Bucket, upload: Upload, folder: Path, tmp_path: Path) -> None:
    upload(folder)
    bucket.done.clear()
    assert fails(upload, folder) == f"s3://models/{TARGET}/config.json exists: --overwrite writes over it."
    (tmp_path / "llama.tar").write_bytes(b"x")
    upload(tmp_path / "llama.tar")
    assert f"s3://models/{TARGET}/llama.tar exists" in fails(upload, tmp_path / "llama.tar")
    assert written(bucket) == [f"{TARGET}/llama.tar"]


def test_to_overwrite_is_to_take_the_config_away_first(
    bucket: Bucket, upload: Upload, folder: Path, tmp_path: Path
) -> None:
    upload(folder)
    (tmp_path / "llama.tar").write_bytes(b"x")
    upload(tmp_path / "llama.tar")
    (folder / "config.json").write_text('{"model_type": "new"}')
    (folder / "pytorch_model.bin").unlink()
    bucket.done.clear()
    upload(folder, overwrite=True)
    changes = [asked for asked in bucket.done if not asked.startswith("GET")]
    assert changes[:2] == [f"DELETE {TARGET}/config.json", f"DELETE {TARGET}/pytorch_model.bin"]
    assert changes[-1] == f"PUT {TARGET}/config.json"
    # What others of its files there are stays: it is no part of the folder.
    assert f"{TARGET}/llama.tar" in bucket.objects
    assert f"{TARGET}/pytorch_model.bin" not in bucket.objects


def test_an_upload_that_has_not_ended_is_begun_anew(bucket: Bucket, upload: Upload, folder: Path) -> None:
    bucket.objects[f"{TARGET}/model.safetensors"] = b"half"
    upload(folder)
    assert bucket.objects[f"{TARGET}/model.safetensors"] == FILES["model.safetensors"]


def test_what_another_upload_has_left_is_told(bucket: Bucket, upload: Upload, folder: Path) -> None:
    bucket.objects[f"{TARGET}/model-00001-of-00002.safetensors"] = b"x"
    told = fails(upload, folder)
    assert "has files that" in told
    assert "as models/llama/0123456/model-00001-of-00002.safetensors: vLLM would read them, too." in told
    assert written(bucket) == []
    upload(folder, overwrite=True)
    assert f"{TARGET}/model-00001-of-00002.safetensors" not in bucket.objects


def test_of_two_at_once_one_is_refused(bucket: Bucket, upload: Upload, folder: Path) -> None:
    bucket.refusals["PUT"] = [Refusal(412, "PreconditionFailed")]
    (folder.parent / "one.tar").write_bytes(b"x")
    told = fails(upload, folder.parent / "one.tar", family="llama")
    assert told == f"s3://models/{TARGET}/one.tar has been written meanwhile by another: it is left."


@pytest.mark.parametrize("ignored", [True, False])
def test_a_server_without_conditions_writes_all_the_same(
    bucket: Bucket, upload: Upload, tmp_path: Path, ignored: bool
) -> None:
    bucket.knows_conditions = False
    if not ignored:
        bucket.refusals["PUT"] = [Refusal(501, "NotImplemented")]
    (tmp_path / "llama.tar").write_bytes(b"x")
    upload(tmp_path / "llama.tar")
    assert bucket.objects == {f"{TARGET}/llama.tar": b"x"}


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (Refusal(403, "AccessDenied"), "{url} refuses s3://models (AccessDenied): the credentials need s3:ListBucket"),
        (Refusal(403, "InvalidAccessKeyId"), "{url} does not take the credentials for s3://models (InvalidAccessKeyId"),
        (Refusal(403, "SignatureDoesNotMatch"), "{url} does not take the credentials for s3://models (SignatureDoes"),
        (Refusal(400, "ExpiredToken"), "{url} does not take the credentials for s3://models (ExpiredToken)"),
        (Refusal(404, "NoSuchBucket"), "There is no bucket s3://models at {url}: make it, or correct its name."),
        (
            Refusal(400, "AuthorizationHeaderMalformed", "<Region>eu-central-1</Region>"),
            "s3://models is not at {url}, but in the region eu-central-1: set AWS_REGION=eu-central-1, or name",
        ),
        (
            Refusal(307, "TemporaryRedirect"),
            "s3://models is not at {url}, but in another region: set AWS_REGION to it, or",
        ),
        (
            Refusal(
                403,
                "RequestTimeTooSkewed",
                "<RequestTime>2026-01-01T00:00:00Z</RequestTime><ServerTime>2026-01-02T00:00:00Z</ServerTime>",
            ),
            "refuses s3://models, as this machine's clock is wrong (2026-01-01T00:00:00Z here, 2026-01-02T00:00:00Z th",
        ),
        (Refusal(503, "SlowDown"), "{url} answers 503 for s3://models (SlowDown): try again later."),
    ],
    ids=lambda value: value.code if isinstance(value, Refusal) else "",
)
@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_refusal_is_a_sentence(
    bucket: Bucket, upload: Upload, folder: Path, method: str, refusal: Refusal, sentence: str
) -> None:
    bucket.refusals[method] = [refusal] * 20
    told = fails(upload, folder)
    assert sentence.format(url=bucket.url) in told
    assert "secret" not in told
    assert f"{TARGET}/config.json" not in bucket.objects


def test_a_redirect_names_the_region(bucket: Bucket, upload: Upload, folder: Path) -> None:
    bucket.refusals["GET"] = [Refusal(301, "PermanentRedirect")] * 20
    assert "s3://models is not at" in fails(upload, folder)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("models", "digits, dots and hyphens, but it is 'models'."),
        ("s3://", "The address must be s3://BUCKET"),
        ("s3://a", "with a bucket's name of 3 to 63 lower-case letters"),
        ("s3://Models", "The address must be s3://BUCKET"),
        ("https://models.s3.amazonaws.com", "The address must be s3://BUCKET"),
        ("s3://models/a/../b", "The prefix 'a/../b' must be of letters, digits"),
        ("s3://models/a//b", "The prefix 'a//b' must be of letters, digits"),
        ("s3://models/a b", "The prefix 'a b' must be of letters, digits"),
    ],
)
def test_an_odd_address_is_a_sentence(
    bucket: Bucket, upload: Upload, folder: Path, address: str, sentence: str
) -> None:
    assert sentence in fails(upload, folder, address)
    assert bucket.done == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"family": "a/b"}, "--family must be of letters, digits and ._-, but it is 'a/b'."),
        ({"family": ".."}, "--family must be of letters, digits and ._-, but it is '..'."),
        ({"revision": "../x"}, "--revision must be a commit or a plain name, but it is '../x'."),
        ({"revision": None}, "does not say of which commit it is: give it with --revision."),
        ({"endpoint_url": "no-url"}, "s3://models cannot be asked: Invalid endpoint: no-url."),
        ({"endpoint_url": "http://127.0.0.1:1"}, "http://127.0.0.1:1 cannot be reached for s3://models (EndpointConn"),
    ],
)
def test_odd_options_are_sentences(upload: Upload, folder: Path, given: dict[str, object], sentence: str) -> None:
    assert sentence in fails(upload, folder, **given)


def test_no_credentials_are_told(bucket: Bucket, upload: Upload, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert fails(upload, folder).startswith("There are no credentials for s3://models: set AWS_ACCESS_KEY_ID and")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "The config profile (nobody) could not be found." in fails(upload, folder)


def test_a_folder_that_is_not_whole_stays_here(bucket: Bucket, upload: Upload, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    assert f"{index} names model-00001-of-00001.safetensors, which is not in {folder}" in fails(upload, folder)
    index.write_text("[]")
    assert f"{index} is no index of weights" in fails(upload, folder)
    index.unlink()
    (folder / "link").symlink_to("../nowhere")
    assert f"{folder}/link leads to no file: download the model again." in fails(upload, folder)
    (folder / "link").unlink()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.incomplete").touch()
    assert f"{folder}/.cache/x.incomplete is of a download that has not ended: end it first." in fails(upload, folder)
    (folder / ".cache" / "x.incomplete").unlink()
    (folder / "config.json").unlink()
    assert fails(upload, folder) == f"The folder {folder} holds no model: it has no config.json."
    assert fails(upload, folder / "none") == f"There is no file or folder {folder}/none."
    assert bucket.done == []


def test_any_other_file_has_a_name_and_is_asked_for_its_commit(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no tarball")
    with pytest.raises(ModelError, match="give it with --revision"):
        source_of(tmp_path / "a.tar", None, None)
    assert source_of(tmp_path / "a.tar", None, "main").family == "a"


@pytest.mark.parametrize("held", ["model.safetensors", "config.json"])
def test_ctrl_c_leaves_nothing_that_looks_whole(bucket: Bucket, folder: Path, held: str) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(70 * 1024 * 1024)
    bucket.holds[f"PUT {TARGET}/{held}"] = threading.Event()
    command = [sys.executable, "-m", "gateway", "upload", str(folder), "s3://models", "--revision", REVISION]
    environ = os.environ | {"AWS_ENDPOINT_URL": bucket.url, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert bucket.held.wait(60)
        process.send_signal(signal.SIGINT)
        # It waits for what is on its way, and begins nothing more.
        bucket.holds[f"PUT {TARGET}/{held}"].set()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("vllm-gateway: Stopped. What was on its way is not there")
    # Nothing comes after what was held, and so the config comes after all others or not at all.
    assert (f"{TARGET}/config.json" in bucket.objects) <= (held == "config.json")
    assert held != "config.json" or f"{TARGET}/tokenizer.model" in bucket.objects
    # Nor are there parts that one would pay for.
    assert bucket.parts == {}
