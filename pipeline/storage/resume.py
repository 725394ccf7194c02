"""Requests over a network: how long they are repeated; reads that resume where they broke off."""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import urllib3

from pipeline.errors import UserError
from pipeline.storage.base import PIECE, Unavailable, too_short

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection."""
READ_TIMEOUT = 20.0
"""Seconds without a single byte, or with less than READ_CHUNK, after which a read is retried."""
READ_CHUNK = 64 * 1024
"""Bytes that an attempt must bring to count as progress."""
ATTEMPTS = 20
"""Attempts in a row without progress before a request fails: 64 s to 128 s of back-off."""
FIRST_ATTEMPTS = 5
"""The same if the server has never answered this process: its address may well be wrong."""
BACKOFF = 0.25
"""Seconds of the first pause, doubled at each attempt, up to MAX_PAUSE."""
MAX_PAUSE = 8.0
"""Most seconds between two attempts."""
ALTERED_ATTEMPTS = 8
"""Reads of an object that arrives altered before it counts as damaged: 12 s to 24 s of pauses."""

logger = logging.getLogger(__name__)


class ReadInterrupted(Exception):
    """A read failed, but another attempt may succeed.

    ``explanation`` is the error to raise if this was the last attempt.
    """

    def __init__(self, reason: object, explanation: UserError | None = None) -> None:
        super().__init__(str(reason))
        self.explanation = explanation


@dataclass(frozen=True)
class Answer:
    """A server's answer to a read request; its body is not read yet."""

    body: urllib3.BaseHTTPResponse
    version: str | None
    """An identifier of the object's content, such as its ETag."""
    size: int
    """Bytes of the whole object."""


failed = 0
"""Attempts at requests and uploads of this process that failed and were repeated, so far."""
_reached: set[str] = set()
"""The servers that have answered this process before."""
_counting = threading.Lock()
_has_damage = False
"""Whether this process found an object that stayed damaged however often it was read."""


def reached(server: str) -> None:
    """Note that a server has answered this process."""
    _reached.add(server)


def is_last(failures: int, server: str) -> bool:
    """Whether a request to ``server`` that failed so often in a row is given up."""
    return failures >= (ATTEMPTS if server in _reached else min(FIRST_ATTEMPTS, ATTEMPTS))


def wait(problem: object, seconds: float) -> None:
    """Log and count an attempt that failed, and wait until the next one."""
    global failed
    with _counting:
        failed += 1
    logger.warning("%s; trying again in %.1f s", problem, seconds)
    time.sleep(seconds)


def pause(failures: int) -> float:
    """Seconds until the next attempt of a request that failed so often in a row."""
    # Jitter: many ranks that were interrupted together must not all retry at once.
    return random.uniform(0.5, 1.0) * min(MAX_PAUSE, BACKOFF * 2.0**failures)


def rereads(is_remote: bool) -> Iterator[int]:
    """The attempts, from 1, at an object whose checksum tells whether it arrived altered.

    The second is made at once. Others follow, with pauses, if the object comes over a network, on
    which something may alter all for a while; but not once an object has turned out to be damaged,
    since then others may be, too, and each would take its time.
    """
    global _has_damage
    attempts = 2 if _has_damage or not is_remote else ALTERED_ATTEMPTS
    for attempt in range(1, attempts + 1):
        if attempt > 2:
            time.sleep(pause(attempt - 2))
        yield attempt
    _has_damage = True


def resuming_stream(
    url: str,
    server: str,
    start: int,
    length: int | None,
    ask: Callable[[int, int | None, str | None], Answer],
) -> Iterator[bytes]:
    """Yield ``length`` bytes of an object from byte ``start``; by default all to its end.

    ``ask(position, stop, version)`` sends one request, and raises ReadInterrupted if another
    attempt may succeed. Client libraries do not retry a body that is cut or stalls. So we ask
    again, from the byte reached, and only for the same version of the object: two versions are
    never mixed.
    """
    position, stop = start, None if length is None else start + length
    version, size, failures = None, None, 0
    while stop is None or position < stop:
        begin = position
        try:
            answer = ask(position, stop, version)
            reached(server)
            try:
                stop = answer.size if stop is None else stop
                if answer.size < stop:
                    raise too_short(url, start, stop, answer.size)
                if (version, size) not in ((None, None), (answer.version, answer.size)):
                    raise replaced(url)
                version, size = answer.version, answer.size
                for piece in _pieces(answer.body, stop - position):
                    position += len(piece)
                    yield piece
            finally:
                (
                    answer.body.close()
                    if stop is None or position < stop
                    else answer.body.release_conn()
                )
        except (ReadInterrupted, urllib3.exceptions.HTTPError, OSError) as error:
            failures = 1 if position - begin >= READ_CHUNK else failures + 1
            if is_last(failures, server):
                if isinstance(error, ReadInterrupted) and error.explanation:
                    raise error.explanation from error
                raise Unavailable(
                    f"reading {url} broke off at byte {position} of"
                    f" {'all' if stop is None else stop}, {failures} times in a row ({error});"
                    f" check the connection to {server}"
                ) from error
            wait(f"reading {url}: {error} at byte {position}", pause(failures))


def _pieces(body: urllib3.BaseHTTPResponse, size: int) -> Iterator[bytes]:
    """Yield ``size`` bytes of a body as they arrive. Raises ReadInterrupted."""
    since, arrived = time.monotonic(), 0
    while size:
        piece = body.read1(min(size, PIECE))
        if not piece:
            raise ReadInterrupted("the connection was closed")
        size -= len(piece)
        arrived += len(piece)
        yield piece
        if time.monotonic() - since > READ_TIMEOUT:
            if arrived < READ_CHUNK and size:
                raise ReadInterrupted(f"only {arrived} bytes came in {READ_TIMEOUT:.0f} s")
            since, arrived = time.monotonic(), 0


def replaced(url: str) -> UserError:
    """The error of an object that changed during a read."""
    return UserError(f"{url} was replaced while it was being read; run the command again")
