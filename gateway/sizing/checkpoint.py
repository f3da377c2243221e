"""Reads a model's config.json and the headers of its weights, from a folder or a hub; it downloads no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import orjson

from gateway.sizing.safetensors import (
    PREFIX,
    BadCheckpoint,
    Tensor,
    files_of_index,
    header_length,
    is_plain,
    read_header,
)

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Most headers of a model in a single file are shorter.
_USUAL_HEADER = 256 * 1024
_LARGEST_JSON = 64 * 1024 * 1024
_TIMEOUT = 30
_AT_ONCE = 8

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w][\w./-]*", re.ASCII)


class Checkpoint(NamedTuple):
    """A model's parsed config.json, unchecked, and all its tensors."""

    config: object
    tensors: list[Tensor]


def read_checkpoint(model: str, revision: str | None, environ: Mapping[str, str]) -> Checkpoint:
    """Read a folder, which needs no network, or a hub's ORG/NAME, with HF_ENDPOINT and HF_TOKEN of `environ`.

    Raises BadCheckpoint.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision:
            raise BadCheckpoint(f"{model} is a folder, which has no revision {revision}: leave --revision out.")
        return _of_folder(folder)
    if not _NAME.fullmatch(model):
        raise BadCheckpoint(f"Unknown model {model!r}: there is no such folder, and a hub's name is ORG/NAME.")
    if environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise BadCheckpoint(f"HF_HUB_OFFLINE is set, so that {model} is not asked for: give a folder.")
    if not _REVISION.fullmatch(revision or "main"):
        raise BadCheckpoint(f"The revision {revision!r} is no branch, tag or commit.")
    with _Hub(model, revision or "main", environ) as hub:
        return hub.checkpoint()


def _of_folder(folder: Path) -> Checkpoint:
    config = folder / _CONFIG
    if not config.is_file():
        raise BadCheckpoint(f"The folder {folder} holds no model: it has no {_CONFIG}.")
    index = folder / _INDEX
    if index.is_file():
        files = list(files_of_index(_read(index)))
    else:
        # consolidated*.safetensors hold the same weights again, in the format of the model's maker.
        files = sorted(file.name for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))
    if not files:
        raise BadCheckpoint(f"The folder {folder} has no safetensors files, whose headers tell the size of a model.")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise BadCheckpoint(f"{_INDEX} names {missing[0]}, but it is not in {folder}: fetch the model again.")
    tensors = [tensor for file in files for tensor in _header_of(folder / file)]
    return Checkpoint(_parsed(_read(config), _CONFIG), tensors)


def _header_of(path: Path) -> list[Tensor]:
    try:
        with path.open("rb") as file:
            length = header_length(file.read(PREFIX), path.name)
            header = file.read(length)
        stored = path.stat().st_size
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}.") from None
    tensors = read_header(header, path.name) if len(header) == length else []
    needed = PREFIX + length + sum(tensor.size for tensor in tensors)
    if stored < needed:
        raise BadCheckpoint(f"{path} is cut short: it has {stored} bytes of {needed}. Fetch it again.")
    return tensors


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}.") from None


def _parsed(data: bytes, file: str) -> object:
    try:
        return orjson.loads(data)
    except ValueError:
        raise BadCheckpoint(f"{file} is no JSON.") from None


class _Hub:
    """One revision of a model on a hub. Each response is read only as far as needed, even if the hub sends more."""

    def __init__(self, model: str, revision: str, environ: Mapping[str, str]) -> None:
        self._model = model
        self._revision = revision
        self._hub = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._token = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN")
        # A range must be a range of the file's own bytes, so ask for no compression.
        headers = {"Accept-Encoding": "identity"}
        if self._token:
            if not re.fullmatch(r"[\x21-\x7e]+", self._token):
                raise BadCheckpoint("HF_TOKEN is no token: one is of printable ASCII characters without spaces.")
            headers["Authorization"] = f"Bearer {self._token}"
        # Use the environment's proxy, which is set for downloads like this.
        self._client = httpx.Client(trust_env=True, follow_redirects=True, timeout=_TIMEOUT, headers=headers)

    def __enter__(self) -> _Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def checkpoint(self) -> Checkpoint:
        """Read config.json and all headers, usually with one request per file. Raises BadCheckpoint."""
        config = self._get(_CONFIG, _LARGEST_JSON)
        if config is None:
            raise BadCheckpoint(f"{self._model} on {self._hub} has no {_CONFIG}: it is no model that vLLM serves.")
        index = self._get(_INDEX, _LARGEST_JSON)
        if index is not None:
            files = files_of_index(index)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                found = list(pool.map(self._header, files, files.values()))
        else:
            found = [self._header(_SINGLE, _USUAL_HEADER)]
        return Checkpoint(_parsed(config, _CONFIG), [tensor for tensors in found for tensor in tensors])

    def _header(self, file: str, guessed: int) -> list[Tensor]:
        assert is_plain(file)
        begin = self._get(file, guessed, first=True)
        if begin is None and file == _SINGLE:
            raise BadCheckpoint(
                f"{self._model} on {self._hub} has no safetensors files, whose headers tell the size of a model."
            )
        if begin is None:
            raise BadCheckpoint(f"{_INDEX} names {file}, but {self._model} on {self._hub} does not have it.")
        end = PREFIX + header_length(begin, file)
        if len(begin) < end:
            begin = self._get(file, end, first=True) or b""
        if len(begin) < end:
            raise BadCheckpoint(f"{file} of {self._model} is cut short: its header has {len(begin)} bytes of {end}.")
        return read_header(begin[PREFIX:end], file)

    def _get(self, file: str, most: int, *, first: bool = False) -> bytes | None:
        """The file, of at most `most` bytes, or with `first` its first `most` bytes; None if it does not exist.

        Raises BadCheckpoint.
        """
        headers = {"Range": f"bytes=0-{most - 1}"} if first else {}
        url = f"{self._hub}/{self._model}/resolve/{self._revision}/{file}"
        try:
            with self._client.stream("GET", url, headers=headers) as reply:
                if reply.status_code == httpx.codes.NOT_FOUND and reply.headers.get("x-error-code") == "EntryNotFound":
                    return None
                self._judge(reply, file)
                # Read the next files at the same commit, even if somebody pushes meanwhile.
                self._revision = reply.headers.get("x-repo-commit") or self._revision
                data = bytearray()
                for piece in reply.iter_bytes(64 * 1024):
                    data += piece
                    if len(data) >= most:
                        break
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BadCheckpoint(
                f"The hub {self._hub} cannot be reached for {self._model} ({type(error).__name__}): see HF_ENDPOINT, "
                "or give a folder."
            ) from None
        if not first and len(data) >= most:
            raise BadCheckpoint(f"{file} of {self._model} is larger than {most} bytes.")
        return bytes(data[:most])

    def _judge(self, reply: httpx.Response, file: str) -> None:
        status, code = reply.status_code, reply.headers.get("x-error-code", "")
        model = f"{self._model} on {self._hub}"
        if code == "RevisionNotFound":
            raise BadCheckpoint(f"{model} has no revision {self._revision}: name a branch, a tag or a commit.")
        if code == "GatedRepo":
            raise BadCheckpoint(
                f"{model} is gated: accept its terms on the hub, and set HF_TOKEN to a token of who has done so."
            )
        if code == "RepoNotFound" or status in (401, 403, 404):
            # To a client without a token the hub answers 401 also for a name that does not exist.
            advice = "HF_TOKEN may not read it" if self._token else "it is restricted, which HF_TOKEN opens"
            raise BadCheckpoint(f"{model} is not to be had ({status}): the name is wrong, or {advice}.")
        if status not in (200, 206):
            raise BadCheckpoint(f"The hub {self._hub} answers {status} for {file} of {self._model}: try again later.")
