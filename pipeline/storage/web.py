"""Objects at web addresses, for reading only."""

import os
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import urllib3

from pipeline.errors import UserError
from pipeline.storage import resume
from pipeline.storage.base import (
    Entry,
    ObjectNotFound,
    ObjectTooShort,
    Storage,
    Unavailable,
    too_short,
)
from pipeline.storage.resume import Answer, ReadInterrupted, resuming_stream


@lru_cache(maxsize=32)
def _pool(proxy: str | None, pid: int) -> urllib3.PoolManager:
    """This process's connections, since they must not be shared across a fork."""
    make = partial(urllib3.ProxyManager, proxy) if proxy else urllib3.PoolManager
    return make(
        timeout=urllib3.Timeout(connect=resume.CONNECT_TIMEOUT, read=resume.READ_TIMEOUT),
        retries=False,  # resuming_stream retries instead
        maxsize=32,
        headers={"User-Agent": "vlae-pipeline", "Accept-Encoding": "identity"},
    )


@dataclass(frozen=True)
class HttpStorage(Storage):
    """Objects below a web address, which can be read but not listed or written."""

    root: str

    @property
    def url(self) -> str:
        return self.root

    def child(self, prefix: str) -> "HttpStorage":
        return HttpStorage(f"{self.root}/{prefix.strip('/')}")

    def entry(self, key: str) -> Entry:
        return Entry(key, 0, "")  # a web server lists nothing: the first read tells

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

    def create(self, key: str, data: bytes) -> bool:
        raise self._read_only(f"cannot write {key}")

    def upload(self, key: str, path: Path) -> None:
        raise self._read_only(f"cannot write {key}")

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        raise self._read_only("cannot list objects")

    def delete(self, keys: Iterable[str]) -> None:
        raise self._read_only("cannot delete objects")

    def _read_only(self, what: str) -> UserError:
        return UserError(
            f"{self.root}: {what}: a web address can only be read; use s3://BUCKET/PREFIX or"
            " a local folder"
        )

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        url = f"{self.root}/{urllib.parse.quote(key)}"
        parts = urllib.parse.urlsplit(url)
        by_proxy = urllib.request.getproxies().get(parts.scheme)
        pool = _pool(
            None if urllib.request.proxy_bypass(parts.hostname or "") else by_proxy, os.getpid()
        )

        def ask(position: int, stop: int | None, version: str | None) -> Answer:
            headers = (
                {}
                if position == 0 and stop is None
                else {"Range": f"bytes={position}-{'' if stop is None else stop - 1}"}
            )
            try:
                body = pool.request(
                    "GET", url, headers=headers, preload_content=False, redirect=True
                )
            except (urllib3.exceptions.HTTPError, OSError) as error:
                explanation = Unavailable(
                    f"cannot reach {parts.netloc} for {url} ({error}); is the address right?"
                )
                raise ReadInterrupted(error, explanation) from error
            if body.status in (200, 206):
                return self._answer(url, body, bool(headers))
            body.close()
            if body.status in (404, 410):
                raise ObjectNotFound(f"there is no {url}")
            if body.status == 416:
                raise too_short(
                    url,
                    start,
                    stop or start,
                    body.headers.get("Content-Range", "").rpartition("/")[2] or "less",
                )
            if body.status in (401, 403):
                raise UserError(f"{parts.netloc} refused access to {url} (status {body.status})")
            explanation = Unavailable(f"{parts.netloc} failed on {url}: status {body.status}")
            if body.status >= 500 or body.status in (408, 429):
                raise ReadInterrupted(f"status {body.status}", explanation)
            raise explanation

        return resuming_stream(url, parts.netloc, start, length, ask)

    @staticmethod
    def _answer(url: str, body: urllib3.BaseHTTPResponse, ranged: bool) -> Answer:
        if ranged and body.status == 200:
            body.close()
            raise UserError(
                f"{url} cannot be read in parts: its server does not support ranges; copy the data"
                " to another server"
            )
        total = (
            body.headers.get("Content-Range", "").rpartition("/")[2]
            if ranged
            else body.headers.get("Content-Length", "")
        )
        if not total.isdecimal():
            body.close()
            explanation = UserError(
                f"{url} cannot be read: its server does not tell its size; copy the data to another"
                " server"
            )
            raise ReadInterrupted("the headers of the answer are incomplete", explanation)
        return Answer(
            body, body.headers.get("ETag") or body.headers.get("Last-Modified"), int(total)
        )
