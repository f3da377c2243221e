"""Asks a hub of models through huggingface_hub: lists a model's files at a revision, and explains its refusals."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import httpx2
from huggingface_hub import HfApi, RepoFile, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, parse_ratelimit_headers

from gateway.models import ModelError
from gateway.models.hashes import is_oid
from gateway.models.selection import RemoteFile, check_path

MOST_TRIES = 5
"""The most times that a request without progress is sent, the first time included."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
# Timeout in seconds without a byte.
_TIMEOUT = 30
_LONGEST_WAIT = 300
SHORTEST_WAIT = 1.0
"""Seconds before the second try; each further try waits twice as long, unless the hub says how long."""

T = TypeVar("T")


class Snapshot(NamedTuple):
    """All files of a model at a commit."""

    commit: str
    files: list[RemoteFile]


class Hub:
    """The hub at `endpoint`; an endpoint or token that is missing comes from huggingface_hub's own configuration."""

    def __init__(self, endpoint: str | None, token: str | None, pause: Callable[[float], None]) -> None:
        """`pause` waits that many seconds between two tries."""
        if token and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ModelError("HF_TOKEN is no token: one is of printable ASCII characters without spaces.")
        self._api = HfApi(endpoint=(endpoint or "").rstrip("/") or None, token=token, library_name="vllm-gateway")
        self._has_token = "authorization" in build_hf_headers(token=token)
        self._headers = build_hf_headers(token=token, library_name="vllm-gateway")
        self._pause = pause
        # The library itself sets no timeout.
        get_session().timeout = _TIMEOUT

    @property
    def url(self) -> str:
        """The hub's address."""
        return str(self._api.endpoint)

    def snapshot(self, model: str, revision: str) -> Snapshot:
        """The files of a model at a branch, a tag or a commit. Raises ModelError."""
        if not _NAME.fullmatch(model):
            raise ModelError(f"Unknown model {model!r}: a hub's name is ORG/NAME.")
        if not _REVISION.fullmatch(revision) or ".." in revision:
            raise ModelError(f"The revision {revision!r} is no branch, tag or commit.")
        commit = self._asked(model, revision, lambda: self._api.model_info(model, revision=revision).sha)
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise ModelError(f"The hub {self.url} names no commit of {model} at {revision}: it is no hub of models.")
        tree = self._asked(
            model, revision, lambda: list(self._api.list_repo_tree(model, recursive=True, revision=commit))
        )
        return Snapshot(commit, [self._file(model, one) for one in tree if isinstance(one, RepoFile)])

    def _file(self, model: str, one: RepoFile) -> RemoteFile:
        check_path(one.path)
        oid = one.lfs.sha256 if one.lfs else one.blob_id
        if not is_oid(oid) or one.size < 0:
            raise ModelError(f"The hub {self.url} tells no hash of {one.path} of {model}: it cannot be checked.")
        return RemoteFile(one.path, one.size, oid)

    def _asked(self, model: str, revision: str, ask: Callable[[], T]) -> T:
        tries = 0
        while True:
            tries += 1
            try:
                return ask()
            except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.HTTPError, httpx2.InvalidURL) as error:
                wait = self.wait_after(error, tries)
                if wait is None:
                    raise self.refusal(error, model, revision) from None
                self._pause(wait)

    def open(self, model: str, commit: str, path: str, start: int) -> AbstractContextManager[httpx2.Response]:
        """Request a file from byte `start` on; a context that gives the response. Raises the errors of `refusal`."""
        url = hf_hub_url(model, path, revision=commit, endpoint=self.url)
        # A range must be a range of the file's own bytes, so ask for no compression.
        headers = {**self._headers, "accept-encoding": "identity"}
        if start:
            headers["range"] = f"bytes={start}-"
        return get_session().stream("GET", url, headers=headers)

    @staticmethod
    def wait_after(error: Exception, tries: int) -> float | None:
        """The seconds to wait before a retry of a request that failed `tries` times; None for no retry."""
        if tries >= MOST_TRIES or isinstance(error, OfflineModeIsEnabled | httpx2.InvalidURL):
            return None
        if isinstance(error, httpx2.UnsupportedProtocol | httpx2.TooManyRedirects):
            return None
        usual = SHORTEST_WAIT * (1 << (tries - 1))
        if not isinstance(error, HfHubHTTPError):
            return usual
        if error.response.status_code not in _AGAIN:
            return None
        said = error.response.headers.get("retry-after", "")
        limit = parse_ratelimit_headers(error.response.headers)
        if said.isascii() and said.isdecimal():
            usual = float(said)
        elif error.response.status_code == httpx2.codes.TOO_MANY_REQUESTS and limit is not None:
            usual = float(limit.reset_in_seconds)
        return usual if usual <= _LONGEST_WAIT else None

    def refusal(self, error: Exception, model: str, revision: str) -> ModelError:
        """The ModelError that explains an error of the library or of HTTP."""
        there = f"{model} on {self.url}"
        if isinstance(error, RevisionNotFoundError):
            return ModelError(f"{there} has no revision {revision}: name a branch, a tag or a commit.")
        if isinstance(error, GatedRepoError):
            terms = f"accept its terms on {self.url}/{model}"
            if self._has_token:
                return ModelError(f"{there} is gated, and not yet open to HF_TOKEN: {terms} with its account.")
            return ModelError(f"{there} is gated: {terms}, and set HF_TOKEN to a token of who has done so.")
        if isinstance(error, OfflineModeIsEnabled):
            return ModelError(f"HF_HUB_OFFLINE is set, so that {model} is not asked for: unset it.")
        if not isinstance(error, HfHubHTTPError):
            return ModelError(
                f"The hub {self.url} cannot be reached for {model} ({type(error).__name__}): see HF_ENDPOINT."
            )
        status = error.response.status_code
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
            # To a client without a token the hub answers 401 also for a name that does not exist.
            advice = "HF_TOKEN may not read it" if self._has_token else "it is restricted, which HF_TOKEN opens"
            return ModelError(f"{there} is not to be had ({status}): the name is wrong, or {advice}.")
        if status == httpx2.codes.TOO_MANY_REQUESTS:
            return ModelError(f"The hub {self.url} is asked too often (429): try again later, or with HF_TOKEN.")
        return ModelError(f"The hub {self.url} answers {status} for {model}: try again later.")

    @staticmethod
    def judge(response: httpx2.Response) -> None:
        """Raise an error for `refusal` if the response is an error."""
        hf_raise_for_status(response)
