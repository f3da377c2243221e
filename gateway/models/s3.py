"""Accesses an S3 bucket through boto3: parses its address, and explains a server's refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as NotConnected

from gateway.models import ModelError

_ADDRESS = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>.*))?", re.DOTALL)
_PREFIX = re.compile(r"[\w!'()*./=-]*", re.ASCII)
# Timeouts in seconds.
_CONNECT, _READ = 10, 60
TRIES = 5

FAILURES = (BotoCoreError, ClientError, ValueError)
"""The errors of boto3 that are reported to the user; ValueError is for an endpoint that is no URL."""

_KEYS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthorizationQueryParametersError",
}
_ELSEWHERE = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
TAKEN = frozenset(("PreconditionFailed", "ConditionalRequestConflict"))
"""The error codes of a server that already has an object of the name that must be new."""


class Address(NamedTuple):
    """A place in a bucket; `prefix` is empty or ends with a slash."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def parse(text: str) -> Address:
    """Parse s3://BUCKET or s3://BUCKET/PREFIX. Raises ModelError."""
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise ModelError(
            "The address must be s3://BUCKET or s3://BUCKET/PREFIX, with a bucket's name of 3 to 63 lower-case "
            f"letters, digits, dots and hyphens, but it is {text!r}."
        )
    prefix = (found["prefix"] or "").strip("/")
    if not _PREFIX.fullmatch(prefix) or any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise ModelError(f"The prefix {prefix!r} must be of letters, digits and !'()*.=_- with single slashes.")
    return Address(found["bucket"], f"{prefix}/" if prefix else "")


class Bucket:
    """The requests to a bucket. boto3 finds credentials, region and endpoint; `endpoint` overrides boto3's."""

    def __init__(self, address: Address, endpoint: str | None) -> None:
        self.address = address
        try:
            retries = {"mode": "standard", "total_max_attempts": TRIES}
            config = Config(connect_timeout=_CONNECT, read_timeout=_READ, retries=retries)
            # A new session, which finds the current credentials.
            self.client: Any = boto3.Session().client("s3", endpoint_url=endpoint, config=config)
        except FAILURES as error:
            raise ModelError(f"{address} cannot be asked: {_sentence(error)}") from None

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys with this prefix. Raises ModelError."""
        try:
            for page in self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.address.bucket, Prefix=prefix
            ):
                yield from (one["Key"] for one in page.get("Contents", ()))
        except FAILURES as error:
            raise self.refusal(error) from None

    def remove(self, keys: list[str]) -> None:
        """Remove objects one by one, in this order. Raises ModelError."""
        try:
            for key in keys:
                self.client.delete_object(Bucket=self.address.bucket, Key=key)
        except FAILURES as error:
            raise self.refusal(error) from None

    def refusal(self, error: Exception) -> ModelError:
        """The ModelError that explains an error of boto3."""
        there, server = f"s3://{self.address.bucket}", self.client.meta.endpoint_url
        if isinstance(error, NoCredentialsError | PartialCredentialsError):
            return ModelError(
                f"There are no credentials for {there}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE."
            )
        if isinstance(error, NotConnected | HTTPClientError):
            return ModelError(
                f"{server} cannot be reached for {there} ({type(error).__name__}): see --endpoint-url and AWS_REGION."
            )
        if not isinstance(error, ClientError):
            return ModelError(f"{there} cannot be asked: {_sentence(error)}")
        return self._refused(error, there, server)

    @staticmethod
    def _refused(error: ClientError, there: str, server: str) -> ModelError:
        said = error.response.get("Error", {})
        code, status = str(said.get("Code", "")), code_of(error)[1]
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        if code == "RequestTimeTooSkewed":
            times = f" ({said['RequestTime']} here, {said['ServerTime']} there)" if "ServerTime" in said else ""
            return ModelError(f"{server} refuses {there}, as this machine's clock is wrong{times}: set it.")
        if code in _ELSEWHERE or status in (301, 307):
            region = said.get("Region") or headers.get("x-amz-bucket-region")
            where = (
                f"the region {region}: set AWS_REGION={region}" if region else "another region: set AWS_REGION to it"
            )
            return ModelError(f"{there} is not at {server}, but in {where}, or name its server with --endpoint-url.")
        if code == "NoSuchBucket" or status == 404:
            return ModelError(f"There is no bucket {there} at {server}: make it, or correct its name.")
        if code in _KEYS:
            return ModelError(f"{server} does not take the credentials for {there} ({code}): see AWS_ACCESS_KEY_ID.")
        if status in (401, 403):
            return ModelError(
                f"{server} refuses {there} ({code}): the credentials need s3:ListBucket, s3:PutObject and, for "
                "--overwrite, s3:DeleteObject there."
            )
        return ModelError(f"{server} answers {status} for {there} ({code}): try again later.")


def code_of(error: Exception) -> tuple[str, int]:
    """The code and the status of a server's refusal; "" and 0 for another error."""
    if not isinstance(error, ClientError):
        return "", 0
    metadata = error.response.get("ResponseMetadata", {})
    return str(error.response.get("Error", {}).get("Code", "")), int(metadata.get("HTTPStatusCode", 0))


def _sentence(error: Exception) -> str:
    return f"{str(error).rstrip('.')}."
