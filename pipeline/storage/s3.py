"""Objects on an S3-compatible server."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

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
    from mypy_boto3_s3.type_defs import (
        GetObjectRequestTypeDef,
        HeadObjectOutputTypeDef,
        ListObjectsV2RequestTypeDef,
    )

PART_ATTEMPTS = 5
"""The SDK's own attempts at a part of an upload, so that no whole upload is repeated for a part."""

Found = TypeVar("Found")


@lru_cache(maxsize=32)
def _client(endpoint_url: str | None, pid: int, attempts: int = 1) -> "S3Client":
    """This process's client, since connections must not be shared across a fork.

    It asks once, since the SDK's own attempts are over within seconds: ``_ask`` and ``stream``
    repeat what fails.
    """
    config = Config(
        connect_timeout=resume.CONNECT_TIMEOUT,
        read_timeout=resume.READ_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
    )
    # A new session, since creating clients from the default session is not thread-safe.
    return Session().client("s3", endpoint_url=endpoint_url, config=config)


def _complete(found: Found, *names: str) -> Found:
    """An answer. Raises ResponseParserError unless it has these fields.

    The SDK takes one that was cut within its headers for complete, and a list for an empty one.
    """
    if missing := [name for name in names if name not in found]:  # type: ignore[operator]
        raise ResponseParserError(f"it lacks {missing[0]}")
    return found


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
        self._ask(
            key,
            lambda client: client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data),
        )

    def create(self, key: str, data: bytes) -> bool:
        def ask(client: "S3Client") -> bool:
            try:
                client.put_object(
                    Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*"
                )
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                    return False
                raise
            return True

        # An attempt before the last one may have succeeded.
        return self._ask(key, ask) or self.read(key) == data

    def upload(self, key: str, path: Path) -> None:
        self._ask(
            key,
            lambda client: client.upload_file(str(path), self.bucket, self._key(key)),
            PART_ATTEMPTS,
        )

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        folder = self._key(prefix).strip("/")
        request: ListObjectsV2RequestTypeDef = {
            "Bucket": self.bucket,
            "Prefix": f"{folder}/" if folder else "",
        }
        while True:
            page = self._ask(
                prefix, lambda client: _complete(client.list_objects_v2(**request), "IsTruncated")
            )
            for item in page.get("Contents", []):
                key = item["Key"][len(self.prefix) :].lstrip("/")
                yield Entry(key, item["Size"], item.get("ETag", ""))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

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
        return self._ask(
            key,
            lambda client: _complete(
                client.head_object(Bucket=self.bucket, Key=self._key(key)), "ETag", "ContentLength"
            ),
        )

    def delete(self, keys: Iterable[str]) -> None:
        remaining = list(keys)
        while remaining:
            batch, remaining = remaining[:1000], remaining[1000:]  # the most that S3 accepts
            self._delete(batch)

    def _delete(self, keys: list[str]) -> None:
        answer = self._ask(
            keys[0],
            lambda client: client.delete_objects(
                Bucket=self.bucket,
                Delete={"Objects": [{"Key": self._key(key)} for key in keys], "Quiet": True},
            ),
        )
        for error in answer.get("Errors", []):
            if error.get("Code") != "NoSuchKey":
                raise UserError(
                    f"cannot delete s3://{self.bucket}/{error.get('Key')}: {error.get('Message')}"
                )

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}".lstrip("/")

    def _ask(self, key: str, ask: Callable[["S3Client"], Found], attempts: int = 1) -> Found:
        """The answer to a request, which is repeated while the server fails or is away.

        Raises UserError with the object's name; it is Unavailable if the server stayed away.
        """
        client = _client(self.endpoint_url, os.getpid(), attempts)
        server = client.meta.endpoint_url
        for failures in itertools.count(1):
            try:
                found = ask(client)
            except (BotoCoreError, ClientError, ResponseParserError, S3UploadFailedError) as error:
                cause = (
                    error.__context__ or error if isinstance(error, S3UploadFailedError) else error
                )
                explanation = self._explanation(cause, key)
                if not isinstance(explanation, Unavailable):
                    resume.reached(server)
                    raise explanation from error
                if resume.is_last(failures, server):
                    raise explanation from error
                resume.wait(explanation, resume.pause(failures))
            else:
                resume.reached(server)
                return found
        raise AssertionError("unreachable")

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        url = f"{self.url}/{key}"
        client = _client(self.endpoint_url, os.getpid())

        def ask(position: int, stop: int | None, version: str | None) -> Answer:
            request: GetObjectRequestTypeDef = {"Bucket": self.bucket, "Key": self._key(key)}
            if stop is not None:
                request["Range"] = f"bytes={position}-{stop - 1}"
            if version is not None:
                request["IfMatch"] = version
            try:
                response = client.get_object(**request)
            except (BotoCoreError, ClientError, ResponseParserError) as error:
                explanation = self._explanation(error, key, start, stop)
                if isinstance(explanation, Unavailable):
                    raise ReadInterrupted(error, explanation) from error
                raise explanation from error
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

    def _explanation(
        self, error: BaseException, key: str, start: int = 0, stop: int | None = None
    ) -> UserError:
        """The UserError that explains an error of the SDK in one sentence.

        It is Unavailable if the same request may succeed later: after a missing or incomplete
        answer, an overloaded server, or an internal error of the server.
        """
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
            is_temporary = (
                status >= 500
                or status in (408, 429)
                or code in ("500", "SlowDown", "RequestTimeout", "Throttling")
            )
            return (Unavailable if is_temporary else UserError)(
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
        if isinstance(error, ResponseParserError):
            return Unavailable(
                f"{server} gave no complete answer for {name} ({error}); does it speak the protocol"
                " of S3?"
            )
        return UserError(f"cannot use {name} at {server}: {error}")
