"""Objects in ``s3://bucket/prefix`` or in a folder: everything that is kept is read and written through here.

A key is a relative path with forward slashes (``train/00000.tar``). Writing is atomic: a reader sees the old object or
the new one, never a part. A read that is cut or stalls goes on from the byte reached; what ends in failure is a
``UserError`` that names the object and the cause.
"""

import json
import os
import random
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from boto3.exceptions import S3UploadFailedError
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from pipeline.errors import UserError

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 20.0  # seconds without a single byte
READ_CHUNK = 64 * 1024  # bytes
READ_ATTEMPTS = 6  # in a row that bring less than a chunk
PARTIAL = ".partial-"  # begins the names of local files that are not complete yet


class ObjectNotFound(UserError):
    """There is no object of this key."""


def open_storage(url: str, endpoint_url: str | None = None) -> "Storage":
    """The storage at ``url``: ``s3://bucket/prefix`` or a local folder, which need not exist yet.

    ``endpoint_url`` is the S3 server's address if it is not Amazon's; without it the SDK's own settings decide, such as
    AWS_ENDPOINT_URL. Credentials come from the SDK's own chain only. Nothing is contacted before the first use.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FolderStorage(Path(url).expanduser().absolute())  # absolute: a worker's current folder is another one
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"cannot store anything at {url}; use s3://BUCKET/PREFIX or a local folder")
    endpoint = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return S3Storage(bucket, prefix.strip("/"), endpoint)


class Storage(ABC):
    """A place that holds objects by key. Small, immutable and picklable: pass it to workers as it is.

    Every method raises ``UserError`` if the place cannot be used.
    """

    @property
    @abstractmethod
    def url(self) -> str:
        """Where it is, without a slash at the end."""

    @abstractmethod
    def child(self, prefix: str) -> "Storage":
        """The storage at ``url/prefix``."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """All of an object. Raises ``ObjectNotFound``."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from byte ``start``. Raises ``ObjectNotFound``, and ``UserError`` if the object ends before."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object, atomically."""

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Make or replace an object from a local file, atomically."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Make or replace a local file from an object, atomically. Raises ``ObjectNotFound``."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The size in bytes of every object below ``prefix`` (a folder's name), by key, in the order of keys."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are none of our worries."""

    def list(self, prefix: str = "") -> list[str]:
        """The keys of all objects below ``prefix`` (a folder's name), sorted."""
        return list(self.sizes(prefix))

    def read_json(self, key: str) -> Any:
        """An object's JSON value. Raises ``ObjectNotFound``, and ``UserError`` if it is not JSON."""
        try:
            return json.loads(self.read(key))
        except ValueError as error:
            raise UserError(f"{self.url}/{key} is damaged: it is not JSON ({error})") from None

    def write_json(self, key: str, value: Any) -> None:
        """Write a value as JSON."""
        self.write(key, json.dumps(value, indent=1).encode() + b"\n")


def _too_short(url: str, start: int, stop: int, size: int | str) -> UserError:
    return UserError(f"{url} is cut short: bytes {start} to {stop} were wanted, but it has only {size}")


# --- a local folder ----------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes the name ``path`` only when the block has ended well and its bytes are on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class FolderStorage(Storage):
    """Objects as files of a local folder."""

    root: Path

    @property
    def url(self) -> str:
        return str(self.root)

    def child(self, prefix: str) -> "FolderStorage":
        return FolderStorage(self._path(prefix))

    def read(self, key: str) -> bytes:
        with self._explained(key):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with self._explained(key), self._path(key).open("rb") as file:
            file.seek(start)
            data = file.read(length)
            if len(data) < length:
                raise _too_short(f"{self.url}/{key}", start, start + length, os.fstat(file.fileno()).st_size)
            return data

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key), atomic_file(self._path(key)) as file:
            file.write(data)

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._explained(key), atomic_file(self._path(key)) as file:
            while chunk := source.read(READ_CHUNK):
                file.write(chunk)

    def download(self, key: str, path: Path) -> None:
        with self._explained(key), self._path(key).open("rb") as source, atomic_file(path) as file:
            while chunk := source.read(READ_CHUNK):
                file.write(chunk)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        with self._explained(prefix):
            for folder, _, names in os.walk(self._path(prefix)):
                for name in names:
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):  # deleted while we were looking
                        if not name.startswith(PARTIAL):
                            found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def exists(self, key: str) -> bool:
        with self._explained(key):
            return self._path(key).is_file()

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with self._explained(key):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # a folder that still holds something stays
                for folder in list(path.relative_to(self.root).parents)[:-1]:  # the last is the root itself
                    (self.root / folder).rmdir()

    def _path(self, key: str) -> Path:
        # Keys may come from a manifest that someone else wrote: none may lead out of the folder.
        parts = PurePosixPath(key)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{key!r} is not a key in {self.url}: it leads out of it")
        return self.root / parts

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise ObjectNotFound(f"there is no {self.url}/{key}") from None
        except OSError as error:
            raise UserError(f"cannot use {self.url}/{key}: {error.strerror or error}") from error


# --- S3 ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _client(endpoint_url: str | None, pid: int) -> "S3Client":
    """This process's client: connections must not be shared across a fork."""
    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": 8},  # 3 s of back-off on average: a server that restarts
    )
    # A session of our own, because making clients from the default one is not thread-safe.
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

    def read(self, key: str) -> bytes:
        return b"".join(self._chunks(key, 0, None))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        return b"".join(self._chunks(key, start, length))

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self._s3.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def upload(self, key: str, path: Path) -> None:
        with self._explained(key):
            self._s3.upload_file(str(path), self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        with atomic_file(path) as file:
            for chunk in self._chunks(key, 0, None):
                file.write(chunk)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        folder = self._key(prefix).strip("/")
        below = f"{folder}/" if folder else ""
        with self._explained(prefix):
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=below):
                for item in page.get("Contents", []):
                    found[item["Key"][len(self.prefix) :].lstrip("/")] = item["Size"]
        return dict(sorted(found.items()))

    def exists(self, key: str) -> bool:
        try:
            with self._explained(key):
                self._s3.head_object(Bucket=self.bucket, Key=self._key(key))
        except ObjectNotFound:
            return False
        return True

    def delete(self, keys: Iterable[str]) -> None:
        remaining = [self._key(key) for key in keys]
        while remaining:
            batch, remaining = remaining[:1000], remaining[1000:]  # S3 takes no more at once
            with self._explained(batch[0]):
                answer = self._s3.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": [{"Key": key} for key in batch], "Quiet": True}
                )
            for error in answer.get("Errors", []):
                if error.get("Code") != "NoSuchKey":
                    raise UserError(f"cannot delete s3://{self.bucket}/{error.get('Key')}: {error.get('Message')}")

    @property
    def _s3(self) -> "S3Client":
        return _client(self.endpoint_url, os.getpid())

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}".lstrip("/")

    def _chunks(self, key: str, start: int, length: int | None) -> Iterator[bytes]:
        """The bytes of an object, from ``start``, in pieces; ``length`` none is all of it.

        The SDK retries until the headers are there. A body that is cut or stalls after that is our own affair: we ask
        again from the byte reached, and only for the very same object, so that no mixture of two is ever returned.
        """
        position, stop = start, None if length is None else start + length
        etag, failures = None, 0
        while stop is None or position < stop:
            request: GetObjectRequestTypeDef = {"Bucket": self.bucket, "Key": self._key(key)}
            if stop is not None:
                request["Range"] = f"bytes={position}-{stop - 1}"
            if etag is not None:
                request["IfMatch"] = etag
            with self._explained(key, start, stop):
                response = self._s3.get_object(**request)
            etag = response["ETag"]
            if stop is None:
                stop = response["ContentLength"]
            elif position + response["ContentLength"] < stop:
                raise _too_short(f"{self.url}/{key}", start, stop, response["ContentRange"].rpartition("/")[2])
            begin = position
            try:
                for chunk in response["Body"].iter_chunks(READ_CHUNK):
                    position += len(chunk)
                    yield chunk
            except (HTTPClientError, IncompleteReadError) as error:
                failures = 1 if position - begin >= READ_CHUNK else failures + 1
                if failures == READ_ATTEMPTS:
                    raise UserError(
                        f"reading {self.url}/{key} broke off at byte {position} of {stop}, {failures} times in a row "
                        f"({error}); check the connection to {self._s3.meta.endpoint_url}"
                    ) from error
                time.sleep(random.uniform(0.5, 1.0) * min(8.0, 0.25 * 2**failures))  # jitter: ranks must not come all at once

    @contextmanager
    def _explained(self, key: str, start: int = 0, stop: int | None = None) -> Iterator[None]:
        try:
            yield
        except S3UploadFailedError as error:
            raise self._explanation(error.__context__ or error, key, start, stop) from error
        except (BotoCoreError, ClientError) as error:
            raise self._explanation(error, key, start, stop) from error

    def _explanation(self, error: BaseException, key: str, start: int, stop: int | None) -> UserError:
        """What an SDK's error means, in one sentence."""
        server = self.endpoint_url or "Amazon S3"
        name = f"{self.url}/{key}".rstrip("/")
        if isinstance(error, ClientError):
            code = error.response.get("Error", {}).get("Code", "")
            metadata = error.response["ResponseMetadata"]
            status = metadata["HTTPStatusCode"]
            if code == "NoSuchBucket":
                return UserError(f"there is no bucket {self.bucket!r} at {server}; create it, or name another in {name}")
            if code in ("NoSuchKey", "404"):
                return ObjectNotFound(f"there is no {name}")
            if code == "InvalidRange" and stop is not None:
                return _too_short(name, start, stop, metadata["HTTPHeaders"].get("content-range", "").rpartition("/")[2])
            if status == 412:
                return UserError(f"{name} was replaced while it was being read; run the command again")
            if status in (401, 403):
                return UserError(
                    f"{server} refused access to {name} ({code}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
                    "AWS_PROFILE to credentials that may use it"
                )
            return UserError(f"{server} failed on {name}: {code} {error.response.get('Error', {}).get('Message', '')}")
        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return UserError(
                f"no credentials for {name} ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            )
        if isinstance(error, HTTPClientError | NoConnectionError):
            return UserError(
                f"cannot reach {server} for {name} ({error}); is the server running, and is storage.endpoint_url or "
                "AWS_ENDPOINT_URL its address?"
            )
        return UserError(f"cannot use {name} at {server}: {error}")
