"""Objects on an S3-compatible server."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import urllib3
from boto3.exceptions import S3UploadFailedError
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError

from pipeline.errors import UserError
from pipeline.storage import resume
from pipeline.storage.base import Entry, ObjectNotFound, Storage, Unavailable, too_short
from pipeline.storage.resume import (
    Answer,
    ReadInterrupted,
    replaced,
    resuming_stream,
)

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef, HeadObjectOutputTypeDef

WRITE_ATTEMPTS = 8
"""Attempts at a write, with the SDK's own back-off."""


@lru_cache(maxsize=32)
def _client(endpoint_url: str | None, attempts: int, pid: int) -> "S3Client":
    """This process's client, since connections must not be shared across a fork."""
    config = Config(
        connect_timeout=resume.CONNECT_TIMEOUT,
        read_timeout=resume.READ_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
    )
    # A new session, since creating clients from the default session is not thread-safe.
    return Session().client("s3", endpoint_url=endpoint_url, config=config)


@dataclass(frozen=True)
class S3Storage(Storage):
    """Objects below a prefix of a bucket on an S3-compatible server."""

    bucket: str
    prefix: str
    endpoint_url: str | None

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def child(self, prefix: str) -> "S3Storage":
        return S3Storage(self.bucket, self._key(prefix).strip("/"), self.endpoint_url)

    def elsewhere(self, url: str) -> Storage:
        from pipeline.storage import open_storage

        return open_storage(url, self.endpoint_url)

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self._s3.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        with self._explained(key):
            try:
                self._s3.put_object(
                    Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*"
                )
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                    return self.read(key) == data  # an attempt before this one may have succeeded
                raise
        return True

    def upload(self, key: str, path: Path) -> None:
        with self._explained(key):
            self._s3.upload_file(str(path), self.bucket, self._key(key))

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._key(prefix).strip("/")
        below = f"{folder}/" if folder else ""
        with self._explained(prefix):
            for page in self._s3.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=below
            ):
                for item in page.get("Contents", []):
                    key = item["Key"][len(self.prefix) :].lstrip("/")
                    yield Entry(key, item["Size"], item.get("ETag", ""))

    def entry(self, key: str) -> Entry:
        found = self._head(key)
        return Entry(key, found["ContentLength"], found["ETag"])

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except ObjectNotFound:
            return False
        return True

    def _head(self, key: str) -> "HeadObjectOutputTypeDef":
        with self._explained(key):
            return self._s3.head_object(Bucket=self.bucket, Key=self._key(key))

    def delete(self, keys: Iterable[str]) -> None:
        remaining = [self._key(key) for key in keys]
        while remaining:
            batch, remaining = remaining[:1000], remaining[1000:]  # the most that S3 accepts
            with self._explained(batch[0]):
                answer = self._s3.delete_objects(
                    Bucket=self.bucket,
                    Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True},
                )
            for error in answer.get("Errors", []):
                if error.get("Code") != "NoSuchKey":
                    raise UserError(
                        f"cannot delete s3://{self.bucket}/{error.get('Key')}:"
                        f" {error.get('Message')}"
                    )

    @property
    def _s3(self) -> "S3Client":
        return _client(self.endpoint_url, WRITE_ATTEMPTS, os.getpid())

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}".lstrip("/")

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        url = f"{self.url}/{key}"
        # One attempt only: resuming_stream retries, also before the body.
        client = _client(self.endpoint_url, 1, os.getpid())

        def ask(position: int, stop: int | None, version: str | None) -> Answer:
            request: GetObjectRequestTypeDef = {"Bucket": self.bucket, "Key": self._key(key)}
            if stop is not None:
                request["Range"] = f"bytes={position}-{stop - 1}"
            if version is not None:
                request["IfMatch"] = version
            try:
                response = client.get_object(**request)
            except (BotoCoreError, ClientError) as error:
                explanation = self._explanation(error, key, start, stop)
                if _is_temporary(error):
                    raise ReadInterrupted(error, explanation) from error
                raise explanation from error
            except ResponseParserError as error:  # an incomplete answer, or another protocol
                raise ReadInterrupted(error) from error
            total = (
                response.get("ContentRange", "").rpartition("/")[2]
                if stop is not None
                else response.get("ContentLength")
            )
            if total in (None, "") or "ETag" not in response:
                raise ReadInterrupted("the headers of the answer are incomplete")
            # The connection's own stream, which yields bytes as they arrive.
            body = cast(urllib3.BaseHTTPResponse, response["Body"].__enter__())
            return Answer(body, response["ETag"], int(total))

        return resuming_stream(url, client.meta.endpoint_url, start, length, ask)

    @contextmanager
    def _explained(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[None]:
        """Turn the SDK's errors in a block into UserErrors that name the object."""
        try:
            yield
        except S3UploadFailedError as error:
            raise self._explanation(error.__context__ or error, key, start, stop) from error
        except (BotoCoreError, ClientError) as error:
            raise self._explanation(error, key, start, stop) from error

    def _explanation(
        self, error: BaseException, key: str, start: int, stop: int | None
    ) -> UserError:
        """The UserError that explains an error of the SDK in one sentence."""
        server = self.endpoint_url or "Amazon S3"
        name = f"{self.url}/{key}".rstrip("/")
        if isinstance(error, ClientError):
            code = error.response.get("Error", {}).get("Code", "")
            metadata = error.response["ResponseMetadata"]
            status = metadata["HTTPStatusCode"]
            if code == "NoSuchBucket":
                return UserError(
                    f"there is no bucket {self.bucket!r} at {server}; create it, or name another in"
                    f" {name}"
                )
            if code in ("NoSuchKey", "404"):
                return ObjectNotFound(f"there is no {name}")
            if code == "InvalidRange" and stop is not None:
                return too_short(
                    name,
                    start,
                    stop,
                    metadata["HTTPHeaders"].get("content-range", "").rpartition("/")[2],
                )
            if status == 412:
                return replaced(name)
            if status in (401, 403):
                return UserError(
                    f"{server} refused access to {name} ({code}); set AWS_ACCESS_KEY_ID and"
                    " AWS_SECRET_ACCESS_KEY or AWS_PROFILE to credentials that may use it"
                )
            kind = Unavailable if _is_temporary(error) else UserError
            return kind(
                f"{server} failed on {name}: {code}"
                f" {error.response.get('Error', {}).get('Message', '')}"
            )
        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return UserError(
                f"no credentials for {name} ({error}); set AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            )
        if isinstance(error, HTTPClientError | NoConnectionError):
            return Unavailable(
                f"cannot reach {server} for {name} ({error}); is the server running, and is"
                " storage.endpoint_url or AWS_ENDPOINT_URL its address?"
            )
        return UserError(f"cannot use {name} at {server}: {error}")


def _is_temporary(error: BaseException) -> bool:
    """Whether the same request may succeed later.

    It may after a missing answer, an overloaded server, or an internal error of the server.
    """
    if isinstance(error, ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        code = error.response.get("Error", {}).get("Code", "")
        return (
            status >= 500
            or status in (408, 429)
            or code in ("SlowDown", "RequestTimeout", "Throttling")
        )
    return isinstance(error, HTTPClientError | NoConnectionError)
