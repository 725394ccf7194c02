"""Faults of storage that the loader must survive or name.

Each acts over a real socket, in front of the real object storage server. It must end in the exact
epoch, compared by the sample numbers and the sha256 of every batch, or in an error that names the
object.

    python -m tests.faults        (make faults)

runs these and those of ``training``, ``registry`` and ``hosts``, prints a table, and ends with a
line of JSON. ``test_faults.py`` runs these as tests.
"""

import hashlib
import http.client
import os
import re
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import DataSet
from pipeline.data.cache import ShardCache
from pipeline.data.loader import TrainLoader
from pipeline.data.manifest import Manifest
from pipeline.data.reader import ReadOptions
from pipeline.data.sources.base import Images, ImageSource, Labels
from pipeline.errors import UserError
from pipeline.storage import open_storage, resume
from pipeline.storage.base import Storage
from pipeline.storage.server import ObjectStorageServer
from tests.faults import suite
from tests.pipeline.images import write_shard
from tests.servers import serving

SHARD, NUM_SHARDS, BLOCK = 64, 3, 16
PREFIX = "faults"
BUCKET = "tests"


class Noise(ImageSource):
    """Random RGB images of 32 x 32, so that a shard is a few chunks long."""

    description: dict[str, Any] = {"source": "noise"}  # noqa: RUF012
    image_shape = (3, 32, 32)
    num_classes = 10
    splits = {"train": SHARD * NUM_SHARDS}  # noqa: RUF012

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        random = np.random.default_rng(start)
        return (
            random.integers(0, 256, (stop - start, 32, 32, 3), dtype=np.uint8),
            np.arange(start, stop) % 10,
        )


def write(storage: Storage) -> Manifest:
    """Write the data set that every fault uses."""
    shards = tuple(
        write_shard(
            storage, Noise(), "train", f"train/{n:05d}.tar", n * SHARD, (n + 1) * SHARD, BLOCK
        )
        for n in range(NUM_SHARDS)
    )
    manifest = Manifest("noise", (3, 32, 32), 10, BLOCK, {"train": shards})
    manifest.publish(storage)
    return manifest


def epoch(
    storage: Storage, at_step: Callable[[int], object] = lambda step: None, **options: Any
) -> str:
    """The sha256 of an epoch: of the numbers, images and labels of all its batches.

    Groups are small, so that there are many reads.
    """
    loader = TrainLoader(
        DataSet.load(storage),
        seed=3,
        global_batch=8,
        num_streams=2,
        num_steps=SHARD * NUM_SHARDS // 8,
        group_bytes=16 * 3 * 32 * 32,
        **options,
    )
    content = hashlib.sha256()
    for batch in loader:
        content.update(
            batch.samples.tobytes()
            + batch.images.numpy().tobytes()
            + batch.labels.numpy().tobytes()
        )
        at_step(batch.step)
    return content.hexdigest()


# --- the server in between ------------------------------------------------------------------------


class Exchange(BaseHTTPRequestHandler):
    """One request, passed to the real server with its signature intact, and its answer."""

    protocol_version = "HTTP/1.1"
    server: "FaultyServer"

    def do_GET(self) -> None:
        body = self.content()
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":  # answered here already
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            response = upstream.getresponse()
            self.status, self.body = response.status, response.read()
        except (OSError, http.client.HTTPException):  # the real server is away
            self.hang_up(reset=True)
            return
        finally:
            upstream.close()
        self.fields = [
            (k, v)
            for k, v in response.getheaders()
            if k.lower() not in ("content-length", "connection", "transfer-encoding")
        ]
        self.length = response.getheader("Content-Length") if self.command == "HEAD" else None
        with self.server.counting:
            self.server.seen[self.path] += 1
            self.turn = self.server.seen[self.path]
        self.is_shard = ".tar" in self.path
        if self.command == "GET":
            self.server.fault(self)
        else:
            self.answer()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def content(self) -> bytes:
        """What follows the headers, as it was sent: with the sizes of chunks, as Arrow's client
        sends it, and with trailers.
        """
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines, size = list[bytes](), -1
        while size != 0:
            lines.append(self.rfile.readline())
            size = int(lines[-1].partition(b";")[0], 16)
            if size:
                lines += [self.rfile.read(size), self.rfile.readline()]
        while (trailer := self.rfile.readline()).strip():
            lines.append(trailer)
        lines.append(b"\r\n")
        return b"".join(lines)

    def head(self, status: int | None = None, length: int | None = None) -> bytes:
        """Status line and headers."""
        self.close_connection = True
        lines = [
            f"HTTP/1.1 {status or self.status} x",
            "Connection: close",
            f"Content-Length: {(self.length or len(self.body)) if length is None else length}",
        ]
        return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in self.fields), "", ""]).encode()

    def answer(self) -> None:
        """Answer as the real server did."""
        self.wfile.write(self.head() + self.body)

    def refuse(self, status: int, code: str) -> None:
        error = f"<Error><Code>{code}</Code><Message>fault</Message></Error>"
        body = f"<?xml version='1.0'?>{error}".encode()
        self.fields = [("Content-Type", "application/xml")]
        self.wfile.write(self.head(status, len(body)) + body)

    def hang_up(self, reset: bool = False) -> None:
        if reset:  # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    """A server on loopback that passes every request on to port ``upstream``, and answers a GET as
    ``fault`` decides.
    """

    daemon_threads = True

    def __init__(self, upstream: int, fault: Callable[[Exchange], None], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Exchange)
        self.upstream, self.fault = upstream, fault
        self.seen: Counter[str] = Counter()
        self.counting = threading.Lock()
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up, as ours does when we stall

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


# --- what a fault does ----------------------------------------------------------------------------


def first_times(count: int, act: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    """``act`` on the first ``count`` requests for each object."""
    return lambda exchange: act(exchange) if exchange.turn <= count else exchange.answer()


def always(act: Callable[[Exchange], None]) -> Callable[[Exchange], None]:
    """``act`` on every request for a shard."""
    return lambda exchange: act(exchange) if exchange.is_shard else exchange.answer()


def cut(part: float, reset: bool = False) -> Callable[[Exchange], None]:
    def act(exchange: Exchange) -> None:
        exchange.wfile.write(exchange.head() + exchange.body[: int(len(exchange.body) * part)])
        exchange.hang_up(reset)

    return act


def cut_in_headers(exchange: Exchange) -> None:
    exchange.wfile.write(exchange.head()[:40])
    exchange.hang_up()


def no_answer(exchange: Exchange) -> None:
    exchange.hang_up(reset=True)


def stall(part: float) -> Callable[[Exchange], None]:
    def act(exchange: Exchange) -> None:
        if part:
            exchange.wfile.write(exchange.head() + exchange.body[: int(len(exchange.body) * part)])
        time.sleep(3)
        exchange.hang_up()

    return act


def drip(exchange: Exchange) -> None:
    exchange.wfile.write(exchange.head())
    for byte in exchange.body[:300]:
        exchange.wfile.write(bytes([byte]))
        time.sleep(0.01)
    exchange.hang_up()


def slow(exchange: Exchange) -> None:
    time.sleep(0.05)
    exchange.answer()


def refuse(status: int, code: str) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.refuse(status, code)


def shorten(exchange: Exchange) -> None:
    exchange.body = exchange.body[: len(exchange.body) // 2]  # and the length in the header agrees
    exchange.answer()


def corrupt(exchange: Exchange) -> None:
    middle = len(exchange.body) // 2
    exchange.body = (
        exchange.body[:middle] + bytes([exchange.body[middle] ^ 4]) + exchange.body[middle + 1 :]
    )
    exchange.answer()


def garbage(exchange: Exchange) -> None:
    exchange.wfile.write(os.urandom(400))
    exchange.hang_up()


# --- the faults -----------------------------------------------------------------------------------

Act = Callable[[Exchange], None]


@dataclass(frozen=True)
class Stage:
    """What a fault acts on: the real server, the data set on it, and an empty folder."""

    server: ObjectStorageServer
    expected: str  # the epoch, undisturbed
    folder: Path

    @property
    def storage(self) -> Storage:
        return open_storage(f"s3://{BUCKET}/{PREFIX}", self.server.endpoint_url)

    @contextmanager
    def behind(self, fault: Act) -> Iterator[Storage]:
        """The storage behind a faulty server."""
        with FaultyServer(self.server.port, fault) as server:
            yield open_storage(f"s3://{BUCKET}/{PREFIX}", server.url)

    @contextmanager
    def altered(self, key: str, change: Callable[[bytes], bytes | None]) -> Iterator[Storage]:
        """The storage with one object changed, or missing if ``change`` returns None."""
        content = self.storage.read(key)
        changed = change(content)
        try:
            self.storage.delete([key]) if changed is None else self.storage.write(key, changed)
            yield self.storage
        finally:
            self.storage.write(key, content)

    @contextmanager
    def on_the_web(self, fault: Act | None = None, ranges: bool = True) -> Iterator[Storage]:
        """A copy of the data set on a plain web server, behind a faulty one."""
        for key in self.storage.list():
            self.storage.download(key, self.folder / "web" / key)
        handler = type("Web", (WebServer,), {"folder": self.folder / "web", "ranges": ranges})
        with (
            serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as web,
            FaultyServer(web.server_address[1], fault or Exchange.answer) as server,
        ):
            yield open_storage(server.url)


class WebServer(SimpleHTTPRequestHandler):
    """Files of a folder, whole or by range."""

    folder: Path
    ranges: bool

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        wanted = (
            re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if self.ranges
            else None
        )
        start, stop = (
            (int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content)))
            if wanted
            else (0, len(content))
        )
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("ETag", hashlib.md5(content).hexdigest())
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(content[start:stop])

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@dataclass(frozen=True)
class Fault:
    """A fault, which must end in the exact epoch, or in an error that matches ``error``."""

    name: str
    run: Callable[[Stage], str]
    """Reads an epoch under the fault, and returns its sha256."""
    error: str | None = None

    def check(self, stage: Stage) -> str:
        """Run the fault; returns ``exact``, or the error's message.

        Raises AssertionError if it ends in another way.
        """
        try:
            found = self.run(stage)
        except UserError as raised:
            sentence = str(raised)
        else:
            sentence = None
        if sentence is not None:
            assert self.error, f"{self.name}: {sentence}"
            assert re.search(self.error, sentence), f"{self.name}: {sentence}"
            return sentence
        assert self.error is None, f"{self.name}: no error"
        assert found == stage.expected, f"{self.name}: another epoch"
        return "exact"


def through(act: Act, **options: Any) -> Callable[[Stage], str]:
    def run(stage: Stage) -> str:
        with stage.behind(act) as storage:
            return epoch(storage, **options)

    return run


def cached(act: Act, max_bytes: int = 1 << 30) -> Callable[[Stage], str]:
    """Two epochs through a cache; the second must equal the first."""

    def run(stage: Stage) -> str:
        cache = ShardCache(stage.folder / "cache", max_bytes)
        with stage.behind(act) as storage:
            first = epoch(storage, options=ReadOptions(cache))
            assert epoch(storage, options=ReadOptions(cache)) == first
        left = [path for path in cache.folder.glob("*") if not path.name.startswith("lock-")]
        assert sum(path.stat().st_size for path in left) <= max_bytes
        assert not any(path.name.startswith(".") for path in left)
        return first

    return run


def web(act: Act | None = None, ranges: bool = True) -> Callable[[Stage], str]:
    def run(stage: Stage) -> str:
        with stage.on_the_web(act, ranges) as storage:
            return epoch(storage)

    return run


def at_rest(key: str, change: Callable[[bytes], bytes | None]) -> Callable[[Stage], str]:
    def run(stage: Stage) -> str:
        with stage.altered(key, change) as storage:
            return epoch(storage)

    return run


def altered_in_cache(stage: Stage) -> str:
    cache = ShardCache(stage.folder / "cache", 1 << 30)
    epoch(stage.storage, options=ReadOptions(cache))
    for path in cache.folder.glob("[0-9a-f]*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return epoch(stage.storage, options=ReadOptions(cache))


def server_killed(stage: Stage) -> str:
    """SIGKILL in mid-epoch; another server on the same folder and port a second later."""
    restarted = threading.Event()

    def restart() -> None:
        time.sleep(1)
        stage.server.__exit__(None, None, None)
        stage.server.__enter__()
        restarted.set()
        threading.Event().wait()  # the server ends with the thread that started it

    def at_step(step: int) -> None:
        if step == 2:
            stage.server._process.kill()
            stage.server._process.wait()
            threading.Thread(target=restart, daemon=True).start()

    found = epoch(stage.storage, at_step)
    assert restarted.wait(60)
    return found


def gone_for_a_while(stage: Stage) -> str:
    """In mid-epoch, nothing listens on the port for 1.5 s."""
    server = FaultyServer(stage.server.port, Exchange.answer)
    port = server.server_address[1]

    def at_step(step: int) -> None:
        if step == 2:
            server.server_close()
            threading.Timer(
                1.5, lambda: again.append(FaultyServer(stage.server.port, Exchange.answer, port))
            ).start()

    again: list[FaultyServer] = []
    try:
        return epoch(open_storage(f"s3://{BUCKET}/{PREFIX}", server.url), at_step)
    finally:
        again[0].server_close()


def replaced(stage: Stage) -> str:
    """A shard is replaced by another object while it is being read."""

    def act(exchange: Exchange) -> None:
        if exchange.is_shard and exchange.turn == 1:
            key = exchange.path.partition(f"{PREFIX}/")[2].partition("?")[0]
            exchange.wfile.write(exchange.head() + exchange.body[: len(exchange.body) // 2])
            stage.storage.write(key, stage.storage.read(key)[::-1])
            exchange.hang_up()
        else:
            exchange.answer()

    kept = {key: stage.storage.read(key) for key in stage.storage.list("train")}
    try:
        with stage.behind(act) as storage:
            return epoch(storage)
    finally:
        for key, content in kept.items():
            stage.storage.write(key, content)


def flipped(content: bytes) -> bytes:
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


SHARD_NAME = rf"s3://{BUCKET}/{PREFIX}/train/0000\d\.tar"
FAULTS = [
    Fault("none", through(Exchange.answer)),
    Fault("connection closed in the middle of a body", through(first_times(1, cut(0.5)))),
    Fault(
        "closed three times, at other places",
        through(lambda e: cut(0.2 * e.turn)(e) if e.turn <= 3 else e.answer()),
    ),
    Fault(
        "connection reset in the middle of a body", through(first_times(1, cut(0.7, reset=True)))
    ),
    Fault("closed after the last byte but one", through(first_times(1, cut(0.99999)))),
    Fault("closed inside the headers", through(first_times(1, cut_in_headers))),
    Fault("reset before any answer", through(first_times(2, no_answer))),
    Fault("silence in the middle of a body", through(first_times(1, stall(0.5)))),
    Fault("silence instead of an answer", through(first_times(1, stall(0)))),
    Fault("a byte now and then", through(first_times(1, drip))),
    Fault("every answer late", through(slow)),
    Fault("500 twice", through(first_times(2, refuse(500, "InternalError")))),
    Fault("503 SlowDown three times", through(first_times(3, refuse(503, "SlowDown")))),
    Fault("429 once", through(first_times(1, refuse(429, "TooManyRequests")))),
    Fault(
        "half a body, and the length says so",
        through(first_times(1, lambda e: shorten(e) if e.is_shard else e.answer())),
    ),
    Fault(
        "a bit altered on the way",
        through(lambda e: corrupt(e) if e.turn == 1 and "manifest" not in e.path else e.answer()),
    ),
    Fault(
        "bits altered for a while",
        through(lambda e: corrupt(e) if e.turn < 6 and e.is_shard else e.answer()),
    ),
    Fault("not HTTP", through(first_times(1, garbage))),
    Fault("nobody listens for a while", gone_for_a_while),
    Fault("server killed and restarted in mid-epoch", server_killed),
    Fault(
        "always closed in mid-body",
        through(always(cut(0.0001))),
        rf"reading {SHARD_NAME} broke off at byte \d+ of \d+, 4 times",
    ),
    Fault("always silent", through(always(stall(0))), rf"cannot reach http.* for {SHARD_NAME}"),
    Fault(
        "always 500",
        through(always(refuse(500, "InternalError"))),
        rf"failed on {SHARD_NAME}: InternalError",
    ),
    Fault(
        "always 503", through(always(refuse(503, "SlowDown"))), rf"failed on {SHARD_NAME}: SlowDown"
    ),
    Fault(
        "refused in mid-epoch",
        through(always(refuse(403, "AccessDenied"))),
        rf"refused access to {SHARD_NAME} \(AccessDenied\)",
    ),
    Fault(
        "always altered on the way",
        through(always(corrupt)),
        rf"{SHARD_NAME} is damaged: record \d .* has checksum \w{{32}}, its",
    ),
    Fault(
        "another object takes the name",
        replaced,
        rf"{SHARD_NAME} (was replaced while it was being read|is damaged)",
    ),
    Fault(
        "a shard is missing",
        at_rest("train/00001.tar", lambda _: None),
        rf"no {SHARD_NAME}, though the manifest",
    ),
    Fault(
        "a shard is altered",
        at_rest("train/00001.tar", flipped),
        rf"{SHARD_NAME} is damaged: record 0 .* has checksum",
    ),
    Fault(
        "a shard is cut between records",
        at_rest("train/00001.tar", lambda c: c[: 512 * 100]),
        rf"{SHARD_NAME} is cut short",
    ),
    Fault(
        "a shard is empty",
        at_rest("train/00001.tar", lambda _: b""),
        rf"{SHARD_NAME} is cut short: .* it has only 0",
    ),
    Fault(
        "a shard is something else",
        at_rest("train/00001.tar", lambda c: b"no tar" * len(c)),
        rf"{SHARD_NAME} is damaged",
    ),
    Fault(
        "an index is altered",
        at_rest("train/00001.index.json", lambda c: c.replace(b"1", b"2", 1)),
        r"index\.json is damaged",
    ),
    Fault(
        "an index is missing",
        at_rest("train/00001.index.json", lambda _: None),
        r"no .*index\.json, though the manifest",
    ),
    Fault(
        "the manifest is altered",
        at_rest("manifest.json", lambda c: c.replace(b"64", b"63", 1)),
        r"manifest\.json is damaged or",
    ),
    Fault(
        "the manifest is cut",
        at_rest("manifest.json", lambda c: c[:-30]),
        r"manifest\.json is damaged: it is not JSON",
    ),
    Fault("cache: none", cached(Exchange.answer)),
    Fault("cache: closed in mid-body", cached(first_times(1, cut(0.5)))),
    Fault(
        "cache: a bit altered on the way",
        cached(lambda e: corrupt(e) if e.turn == 1 and e.is_shard else e.answer()),
    ),
    Fault(
        "cache: bits altered for a while",
        cached(lambda e: corrupt(e) if e.turn < 6 and e.is_shard else e.answer()),
    ),
    Fault(
        "cache: always altered",
        cached(always(corrupt)),
        rf"{SHARD_NAME} is damaged: it has \d+ bytes and sha256",
    ),
    Fault("cache: room for one shard only", cached(Exchange.answer, max_bytes=300_000)),
    Fault("cache: room for none", cached(Exchange.answer, max_bytes=1000)),
    Fault("cache: its files go bad", altered_in_cache),
    Fault("web: none", web()),
    Fault("web: closed in mid-body", web(first_times(1, cut(0.5)))),
    Fault("web: 503 twice", web(first_times(2, refuse(503, "")))),
    Fault(
        "web: a bit altered on the way",
        web(lambda e: corrupt(e) if e.turn == 1 and e.is_shard else e.answer()),
    ),
    Fault("web: gone", web(always(refuse(404, ""))), r"no http://.*/train/0000\d\.tar"),
    Fault("web: a server without ranges", web(ranges=False), r"\.tar cannot be read in parts"),
]


@contextmanager
def short_timeouts() -> Iterator[None]:
    """Shorter time-outs and pauses, in the same proportion to each other."""
    values = {"READ_TIMEOUT": 0.8, "BACKOFF": 0.05}
    kept = {name: getattr(resume, name) for name in values}
    for name, value in values.items():
        setattr(resume, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(resume, name, value)


def run() -> tuple[int, int]:
    """Run all faults of storage, and print a line for each.

    Returns the number of faults, and how many of them passed.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ObjectStorageServer(f"{folder}/objects", BUCKET) as server,
        short_timeouts(),
    ):
        os.environ.update(server.environment())
        write(open_storage(f"s3://{BUCKET}/{PREFIX}"))
        expected = epoch(open_storage(f"s3://{BUCKET}/{PREFIX}", server.endpoint_url))

        def check(fault: Fault) -> str:
            with tempfile.TemporaryDirectory(dir=folder) as place, attempts(fault):
                return fault.check(Stage(server, expected, Path(place)))[:150]

        return suite.run((fault.name, partial(check, fault)) for fault in FAULTS)


@contextmanager
def attempts(fault: Fault) -> Iterator[None]:
    """Give up on permanent faults after four attempts, to save time.

    Temporary faults have the usual number of attempts, whatever was damaged before.
    """
    resume._has_damage = False
    kept = resume.ATTEMPTS
    resume.ATTEMPTS = 4 if fault.name.startswith("always") else kept
    try:
        yield
    finally:
        resume.ATTEMPTS = kept
