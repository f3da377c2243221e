"""Uploads a model into a bucket, a tarball as it is or a folder file by file; a partial one never looks complete."""

from __future__ import annotations

import contextlib
import json
import re
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig

from gateway.models import ModelError
from gateway.models.places import CONFIG, commit_of
from gateway.models.s3 import FAILURES, TAKEN, Bucket, code_of

_FAMILY = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_VERSION = re.compile(r"[\w.-]+/(?P<family>[\w.-]+) (?P<commit>[0-9a-f]{40})\n", re.ASCII)
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_UNFINISHED = (".incomplete", ".last", ".part")
_INDEX = ".safetensors.index.json"
# The largest file in a tarball that is read to identify its model, in bytes.
_LARGEST_NOTE = 1024
_MB = 1024 * 1024
_TRANSFER = {"multipart_threshold": 64 * _MB, "multipart_chunksize": 64 * _MB, "max_concurrency": 8}


class Source(NamedTuple):
    """The files to upload, by their names in the bucket, and the parts of the names' common prefix."""

    path: Path
    family: str
    revision: str
    files: dict[str, Path]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files.values())


def source_of(path: Path, family: str | None, revision: str | None) -> Source:
    """Find the files to upload. Without a given family or revision, the model's own is used.

    Raises ModelError.
    """
    if path.is_dir():
        files, own_family, own_revision = _files_of(path), _family_of(path), commit_of(path)
    elif path.is_file():
        own_family, own_revision = _told_by(path)
        files = {path.name: path}
    else:
        raise ModelError(f"There is no file or folder {path}.")
    family, revision = family or own_family, revision or own_revision
    if not _FAMILY.fullmatch(family):
        raise ModelError(f"--family must be of letters, digits and ._-, but it is {family!r}.")
    if revision is None:
        raise ModelError(f"{path} does not say of which commit it is: give it with --revision.")
    if not _REVISION.fullmatch(revision):
        raise ModelError(f"--revision must be a commit or a plain name, but it is {revision!r}.")
    return Source(path, family, revision[:7], files)


def _files_of(folder: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.name.endswith(_UNFINISHED):
            raise ModelError(f"{path} is of a download that has not ended: end it first.")
        if any(part.startswith(".") for part in name.parts) or path.is_dir():
            continue
        if not path.is_file():
            raise ModelError(f"{path} leads to no file: download the model again.")
        files[name.as_posix()] = path
    if CONFIG not in files:
        raise ModelError(f"The folder {folder} holds no model: it has no {CONFIG}.")
    names = {path.name for path in files.values()}
    for index in (path for name, path in files.items() if name.endswith(_INDEX)):
        if missing := _named_by(index) - names:
            raise ModelError(f"{index} names {min(missing)}, which is not in {folder}: download the model again.")
    return files


def _named_by(index: Path) -> set[str]:
    try:
        return {Path(str(name)).name for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{index} is no index of weights: download the model again.") from None


def _family_of(folder: Path) -> str:
    model = folder.resolve().parent.parent.name
    return model.split("--")[-1] if model.startswith("models--") else folder.resolve().name


def _told_by(file: Path) -> tuple[str, str | None]:
    """The family and commit in the first file of a tarball of ours; for another tarball the file's name and None."""
    family = next((file.name.removesuffix(ending) for ending in _ARCHIVES if file.name.endswith(ending)), file.stem)
    with contextlib.suppress(tarfile.TarError, OSError, EOFError, zlib.error), tarfile.open(file) as tar:
        for entry in tar:
            if entry.isreg() and entry.size > _LARGEST_NOTE:
                break
            if entry.isreg() and entry.name.endswith("/version.txt"):
                note = tar.extractfile(entry)
                found = _VERSION.fullmatch(note.read().decode(errors="replace") if note else "")
                return (found["family"], found["commit"]) if found else (family, None)
    return family, None


def upload(bucket: Bucket, source: Source, watch: Callable[[int, int], None], *, overwrite: bool) -> str:
    """Write all files, and return their address. Raises ModelError.

    A folder's config.json is written last, and an old one is removed first: without it no model is served.
    """
    target = f"{bucket.address.prefix}models/{source.family}/{source.revision}/"
    there = set(bucket.keys(target))
    keys = {f"{target}{name}": path for name, path in source.files.items()}
    whole = source.path.is_dir()
    last = f"{target}{CONFIG}" if whole else next(iter(keys))
    if last in there and not overwrite:
        raise ModelError(f"s3://{bucket.address.bucket}/{last} exists: --overwrite writes over it.")
    stale = sorted(key for key in there - keys.keys() if not key.endswith(_ARCHIVES)) if whole else []
    if stale and not overwrite:
        raise ModelError(
            f"s3://{bucket.address.bucket}/{target} has files that {source.path} does not have, as {stale[0]}: vLLM "
            "would read them, too. --overwrite removes them."
        )
    if whole and overwrite:
        bucket.remove([last] * (last in there) + stale)
    sending = _Sending(bucket, source.size, watch)
    for key, path in sorted(keys.items(), key=lambda one: one[0] == last):
        # Only the last file must be new: it completes the model, and the others may be of an unfinished upload.
        sending.send(path, key, new=key == last and not overwrite)
    return f"s3://{bucket.address.bucket}/{target.rstrip('/') if whole else last}"


class _Sending:
    """Sends the files one by one, each in parts."""

    def __init__(self, bucket: Bucket, total: int, watch: Callable[[int, int], None]) -> None:
        self._bucket = bucket
        self._total = total
        self._watch = watch
        self._done = 0
        self._lock = threading.Lock()
        # Always boto3's classic client: the one that boto3 chooses by machine behaves differently when it is stopped.
        self._config = TransferConfig(**_TRANSFER, preferred_transfer_client="classic")

    def send(self, path: Path, key: str, *, new: bool) -> None:
        """Write the object; with `new` none may exist, if the server supports that condition. Raises ModelError."""
        done = self._done
        try:
            self._send(path, key, new=new)
        except (S3UploadFailedError, *FAILURES) as error:
            cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
            code, status = code_of(cause) if isinstance(cause, Exception) else ("", 0)
            if new and (code == "NotImplemented" or status == 501):
                self._done = done
                self.send(path, key, new=False)
                return
            if code in TAKEN:
                raise ModelError(
                    f"s3://{self._bucket.address.bucket}/{key} has been written meanwhile by another: it is left."
                ) from None
            raise self._bucket.refusal(cause if isinstance(cause, Exception) else error) from None
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from None

    def _send(self, path: Path, key: str, *, new: bool) -> None:
        client, bucket = self._bucket.client, self._bucket.address.bucket
        with _if_none_match(client) if new else contextlib.nullcontext():
            client.upload_file(str(path), bucket, key, Callback=self._moved, Config=self._config)

    def _moved(self, size: int) -> None:
        with self._lock:
            self._done += size
            self._watch(self._done, self._total)


@contextlib.contextmanager
def _if_none_match(client: Any) -> Iterator[None]:
    """Within this context, writes of an existing object are refused; boto3's own uploads offer no such condition."""

    def add(params: dict[str, Any], **_: Any) -> None:
        params["IfNoneMatch"] = "*"

    events = [f"before-parameter-build.s3.{operation}" for operation in ("PutObject", "CompleteMultipartUpload")]
    for event in events:
        client.meta.events.register(event, add)
    try:
        yield
    finally:
        for event in events:
            client.meta.events.unregister(event, add)
