"""Objects in ``s3://bucket/prefix`` or in a folder: everything that is kept is read and written through here.

A key is a relative path with forward slashes (``train/00000.tar``). Writing is atomic: a reader sees the old object or
the new one, never a part. A read that is cut, stalls, drips or meets a server that is busy, failing or restarting goes on
from the byte reached; what ends in failure is a ``UserError`` that names the object and the cause. ``https://`` is for
reading only: other people's shards.
"""

import errno
import json
import logging
import os
import random
import shutil
import time
import urllib.parse
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

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

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import GetObjectRequestTypeDef

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 20.0  # seconds without a single byte, or with less than a chunk
READ_CHUNK = 64 * 1024  # bytes
PIECE = 256 * 1024  # bytes that are passed on at once, at most
READ_ATTEMPTS = 20  # in a row that bring less than a chunk: 64 s of back-off at least, 96 s on average
FIRST_ATTEMPTS = 5  # if the server never answered this process: 6 s, since its address may well be wrong
BACKOFF = 0.25  # seconds, doubled at each attempt, up to LONGEST_PAUSE
LONGEST_PAUSE = 8.0
WRITE_ATTEMPTS = 8  # by the SDK's own back-off
PARTIAL = ".partial-"  # begins the names of local files that are not complete yet

logger = logging.getLogger(__name__)


class ObjectNotFound(UserError):
    """There is no object of this key."""


class ObjectTooShort(UserError):
    """The object ends before the bytes that were wanted."""


class Unavailable(UserError):
    """The storage does not answer, is overloaded, or has no room: the same request may succeed later."""


def open_storage(url: str, endpoint_url: str | None = None) -> "Storage":
    """The storage at ``url``: ``s3://bucket/prefix``, or a local folder, which need not exist yet, or, to read, ``https://...``.

    ``endpoint_url`` is the S3 server's address if it is not Amazon's; without it the SDK's own settings decide, such as
    AWS_ENDPOINT_URL. Credentials come from the SDK's own chain only. Nothing is contacted before the first use.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FolderStorage(Path(url).expanduser().absolute())  # absolute: a worker's current folder is another one
    if scheme in ("http", "https") and rest:
        return HttpStorage(url.rstrip("/"))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"cannot keep anything at {url}; use s3://BUCKET/PREFIX or a local folder")
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
    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """``length`` bytes of an object from byte ``start``, in pieces; without ``length`` all that follow.

        Raises ``ObjectNotFound`` and ``ObjectTooShort``, while iterating.
        """

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Make or replace an object, atomically."""

    @abstractmethod
    def upload(self, key: str, path: Path) -> None:
        """Make or replace an object from a local file, atomically."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """The size in bytes of every object below ``prefix`` (a folder's name), by key, in the order of keys."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are none of our worries."""

    def read(self, key: str) -> bytes:
        """All of an object. Raises ``ObjectNotFound``."""
        return b"".join(self.stream(key))

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from byte ``start``. Raises ``ObjectNotFound``, and ``ObjectTooShort`` if the object ends before."""
        return b"".join(self.stream(key, start, length))

    def download(self, key: str, path: Path) -> None:
        """Make or replace a local file from an object, atomically. Raises ``ObjectNotFound``."""
        try:
            with atomic_file(path) as file:
                for piece in self.stream(key):
                    file.write(piece)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error

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
    return ObjectTooShort(f"{url} is cut short: bytes {start} to {stop} were wanted, but it has only {size}")


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

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        with self._explained(key), self._path(key).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            stop, position = size if length is None else start + length, start
            file.seek(start)
            while position < stop:
                piece = file.read(min(stop - position, PIECE)) if stop <= size else b""
                if not piece:
                    raise _too_short(f"{self.url}/{key}", start, stop, size)
                position += len(piece)
                yield piece

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key), atomic_file(self._path(key)) as file:
            file.write(data)

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._explained(key), atomic_file(self._path(key)) as file:
            shutil.copyfileobj(source, file)

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
            kind = Unavailable if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE) else UserError
            raise kind(f"cannot use {self.url}/{key}: {error.strerror or error}") from error


# --- over a network ----------------------------------------------------------------------------------------------------


class _Interrupted(Exception):
    """A read failed in a way in which the next may not; ``explanation`` is what to say if it was the last."""

    def __init__(self, reason: object, explanation: UserError | None = None) -> None:
        super().__init__(str(reason))
        self.explanation = explanation


@dataclass(frozen=True)
class _Answer:
    """A server's answer to a request for an object, from some byte on, its body not read yet."""

    body: urllib3.BaseHTTPResponse
    version: str | None  # changes when the object does
    size: int  # of the whole object


_reached: set[str] = set()  # the servers that ever answered this process


def _stream(
    url: str, server: str, start: int, length: int | None, ask: Callable[[int, int | None, str | None], _Answer]
) -> Iterator[bytes]:
    """The bytes of an object, from ``start``, in pieces; ``length`` none is all of it.

    ``ask(position, stop, version)`` sends one request and raises ``_Interrupted`` if another may do better. No client
    library retries a body that is cut or stalls: we ask again from the byte reached, and only for the very same version
    of the object, so that no mixture of two is ever returned.
    """
    position, stop = start, None if length is None else start + length
    version, size, failures = None, None, 0
    while stop is None or position < stop:
        begin = position
        try:
            answer = ask(position, stop, version)
            _reached.add(server)
            try:
                stop = answer.size if stop is None else stop
                if answer.size < stop:
                    raise _too_short(url, start, stop, answer.size)
                if (version, size) not in ((None, None), (answer.version, answer.size)):
                    raise _replaced(url)
                version, size = answer.version, answer.size
                for piece in _pieces(answer.body, stop - position):
                    position += len(piece)
                    yield piece
            finally:
                answer.body.close() if stop is None or position < stop else answer.body.release_conn()
        except (_Interrupted, urllib3.exceptions.HTTPError, OSError) as error:
            failures = 1 if position - begin >= READ_CHUNK else failures + 1
            if failures >= (READ_ATTEMPTS if server in _reached else min(FIRST_ATTEMPTS, READ_ATTEMPTS)):
                if isinstance(error, _Interrupted) and error.explanation:
                    raise error.explanation from error
                raise Unavailable(
                    f"reading {url} broke off at byte {position} of {'all' if stop is None else stop}, {failures} times in a row "
                    f"({error}); check the connection to {server}"
                ) from error
            # Jitter: many ranks that were thrown off together must not come back together.
            pause = random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, BACKOFF * 2**failures)
            logger.warning("reading %s: %s at byte %d; trying again in %.1f s", url, error, position, pause)
            time.sleep(pause)


def _pieces(body: urllib3.BaseHTTPResponse, size: int) -> Iterator[bytes]:
    """``size`` bytes of a body as they come, or ``_Interrupted``."""
    since, arrived = time.monotonic(), 0
    while size:
        piece = body.read1(min(size, PIECE))
        if not piece:
            raise _Interrupted("the connection was closed")
        size -= len(piece)
        arrived += len(piece)
        yield piece
        if time.monotonic() - since > READ_TIMEOUT:
            if arrived < READ_CHUNK and size:
                raise _Interrupted(f"only {arrived} bytes came in {READ_TIMEOUT:.0f} s")
            since, arrived = time.monotonic(), 0


def _replaced(url: str) -> UserError:
    return UserError(f"{url} was replaced while it was being read; run the command again")


# --- S3 ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _client(endpoint_url: str | None, attempts: int, pid: int) -> "S3Client":
    """This process's client: connections must not be shared across a fork."""
    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
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

    def write(self, key: str, data: bytes) -> None:
        with self._explained(key):
            self._s3.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def upload(self, key: str, path: Path) -> None:
        with self._explained(key):
            self._s3.upload_file(str(path), self.bucket, self._key(key))

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
        return _client(self.endpoint_url, WRITE_ATTEMPTS, os.getpid())

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}".lstrip("/")

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        url = f"{self.url}/{key}"
        client = _client(self.endpoint_url, 1, os.getpid())  # _stream retries, for what comes before the body too

        def ask(position: int, stop: int | None, version: str | None) -> _Answer:
            request: GetObjectRequestTypeDef = {"Bucket": self.bucket, "Key": self._key(key)}
            if stop is not None:
                request["Range"] = f"bytes={position}-{stop - 1}"
            if version is not None:
                request["IfMatch"] = version
            try:
                response = client.get_object(**request)
            except (BotoCoreError, ClientError) as error:
                explanation = self._explanation(error, key, start, stop)
                if _is_passing(error):
                    raise _Interrupted(error, explanation) from error
                raise explanation from error
            except ResponseParserError as error:  # half an answer, or another protocol's
                raise _Interrupted(error) from error
            total = response.get("ContentRange", "").rpartition("/")[2] if stop is not None else response.get("ContentLength")
            if total in (None, "") or "ETag" not in response:
                raise _Interrupted("the headers of the answer were cut")
            # The connection's own stream, which gives bytes as they come.
            body = cast(urllib3.BaseHTTPResponse, response["Body"].__enter__())
            return _Answer(body, response["ETag"], int(total))

        return _stream(url, client.meta.endpoint_url, start, length, ask)

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
                return _replaced(name)
            if status in (401, 403):
                return UserError(
                    f"{server} refused access to {name} ({code}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
                    "AWS_PROFILE to credentials that may use it"
                )
            kind = Unavailable if _is_passing(error) else UserError
            return kind(f"{server} failed on {name}: {code} {error.response.get('Error', {}).get('Message', '')}")
        if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return UserError(
                f"no credentials for {name} ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
            )
        if isinstance(error, HTTPClientError | NoConnectionError):
            return Unavailable(
                f"cannot reach {server} for {name} ({error}); is the server running, and is storage.endpoint_url or "
                "AWS_ENDPOINT_URL its address?"
            )
        return UserError(f"cannot use {name} at {server}: {error}")


def _is_passing(error: BaseException) -> bool:
    """Whether a request may succeed if it is made again: no answer, an overloaded server, or one that fails inside."""
    if isinstance(error, ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        code = error.response.get("Error", {}).get("Code", "")
        return status >= 500 or status in (408, 429) or code in ("SlowDown", "RequestTimeout", "Throttling")
    return isinstance(error, HTTPClientError | NoConnectionError)


# --- the web -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _pool(proxy: str | None, pid: int) -> urllib3.PoolManager:
    """This process's connections; they must not be shared across a fork."""
    options: dict[str, Any] = {
        "timeout": urllib3.Timeout(connect=CONNECT_TIMEOUT, read=READ_TIMEOUT),
        "retries": False,  # _stream does it
        "maxsize": 32,
        "headers": {"User-Agent": "vlae-pipeline", "Accept-Encoding": "identity"},
    }
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


@dataclass(frozen=True)
class HttpStorage(Storage):
    """Objects below a web address: to be read, not listed or written."""

    root: str

    @property
    def url(self) -> str:
        return self.root

    def child(self, prefix: str) -> "HttpStorage":
        return HttpStorage(f"{self.root}/{prefix.strip('/')}")

    def exists(self, key: str) -> bool:
        try:
            next(self.stream(key, 0, 1), None)
        except ObjectNotFound:
            return False
        except ObjectTooShort:
            pass
        return True

    def write(self, key: str, data: bytes) -> None:
        raise self._read_only(f"cannot write {key}")

    def upload(self, key: str, path: Path) -> None:
        raise self._read_only(f"cannot write {key}")

    def sizes(self, prefix: str = "") -> dict[str, int]:
        raise self._read_only("cannot list what is there")

    def delete(self, keys: Iterable[str]) -> None:
        raise self._read_only("cannot delete anything")

    def _read_only(self, what: str) -> UserError:
        return UserError(f"{self.root}: {what}, since a web address can only be read; use s3://BUCKET/PREFIX or a local folder")

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        url = f"{self.root}/{urllib.parse.quote(key)}"
        parts = urllib.parse.urlsplit(url)
        by_proxy = urllib.request.getproxies().get(parts.scheme)
        pool = _pool(None if urllib.request.proxy_bypass(parts.hostname or "") else by_proxy, os.getpid())

        def ask(position: int, stop: int | None, version: str | None) -> _Answer:
            headers = (
                {} if position == 0 and stop is None else {"Range": f"bytes={position}-{'' if stop is None else stop - 1}"}
            )
            try:
                body = pool.request("GET", url, headers=headers, preload_content=False, redirect=True)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                explanation = Unavailable(f"cannot reach {parts.netloc} for {url} ({error}); is the address right?")
                raise _Interrupted(error, explanation) from error
            if body.status in (200, 206):
                return self._answer(url, body, bool(headers))
            body.close()
            if body.status in (404, 410):
                raise ObjectNotFound(f"there is no {url}")
            if body.status == 416:
                raise _too_short(url, start, stop or start, body.headers.get("Content-Range", "").rpartition("/")[2] or "less")
            if body.status in (401, 403):
                raise UserError(f"{parts.netloc} refused access to {url} (status {body.status})")
            explanation = Unavailable(f"{parts.netloc} failed on {url}: status {body.status}")
            if body.status >= 500 or body.status in (408, 429):
                raise _Interrupted(f"status {body.status}", explanation)
            raise explanation

        return _stream(url, parts.netloc, start, length, ask)

    @staticmethod
    def _answer(url: str, body: urllib3.BaseHTTPResponse, ranged: bool) -> _Answer:
        if ranged and body.status == 200:
            body.close()
            raise UserError(f"{url} cannot be read in parts, as its server does not know ranges; copy the data elsewhere")
        total = body.headers.get("Content-Range", "").rpartition("/")[2] if ranged else body.headers.get("Content-Length", "")
        if not total.isdecimal():
            body.close()
            explanation = UserError(f"{url} cannot be read, as its server does not say how long it is; copy the data elsewhere")
            raise _Interrupted("the headers of the answer were cut", explanation)
        return _Answer(body, body.headers.get("ETag") or body.headers.get("Last-Modified"), int(total))
