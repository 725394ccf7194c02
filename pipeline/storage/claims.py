"""Claims: one command at a time works on a run or a search.

A claim is the object ``alive.json`` in the folder of the work. Its holder writes it again every
BEAT_SECONDS and deletes it at the end. A claim that does not change for LOST_SECONDS, or whose
process on this host has ended, is taken over. Clocks of other hosts do not matter.

Claims spare users a mistake; no result depends on them. Two commands that take a dead claim over in
the same second both work, and end with the same weights.
"""

import itertools
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial

from pipeline import background
from pipeline.errors import UserError
from pipeline.storage.base import ObjectNotFound, Storage, to_json
from pipeline.storage.uploads import retry

logger = logging.getLogger(__name__)

CLAIM = "alive.json"
"""The key of a claim."""
BEAT_SECONDS = 10.0
"""Seconds between two writes of a claim by its holder."""
LOST_SECONDS = 35.0
"""Seconds without a change after which the holder of a claim is lost."""


@dataclass(frozen=True)
class Claim:
    """Who works here, and since when."""

    holder: str
    """Another one for each claim."""
    since: str
    host: str
    process: int
    beat: int
    """How often the holder has written it."""

    @classmethod
    def parse(cls, data: bytes) -> "Claim | None":
        """A claim that was read; None if it is none."""
        try:
            found = json.loads(data)
            claim = cls(**found)
        except (ValueError, TypeError, RecursionError):
            return None
        texts, numbers = (claim.holder, claim.since, claim.host), (claim.process, claim.beat)
        is_valid = all(isinstance(each, str) and each.isprintable() for each in texts) and all(
            type(each) is int and 0 < each < 2**31 for each in numbers
        )
        return claim if is_valid else None

    @property
    def has_ended(self) -> bool:
        """Whether its process ran on this host, and does so no more."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)  # a question, not a signal
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            return False
        return False


@contextmanager
def claimed(storage: Storage, what: str) -> Iterator[None]:
    """Hold the claim on a folder for the length of a block.

    storage: the folder's. what: the work in it, such as ``run first``. Raises UserError if another
    process holds the claim and is alive, which takes up to BEAT_SECONDS to find out. One on another
    host that died is waited for, LOST_SECONDS.
    """
    claim, ended = _take(storage, what), threading.Event()
    beating = background.start(partial(_beat, storage, what, claim, ended), "claim")
    try:
        yield
    finally:
        ended.set()
        with suppress(UserError, TimeoutError):  # the storage is away
            beating.result(BEAT_SECONDS)
            if _is_held(storage, claim):
                storage.delete([CLAIM])


def _take(storage: Storage, what: str) -> Claim:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    claim = Claim(uuid.uuid4().hex, now, socket.gethostname(), os.getpid(), 1)
    first, began = None, time.monotonic()
    while not retry(partial(storage.create, CLAIM, to_json(asdict(claim)))):
        try:
            data = retry(partial(storage.read, CLAIM))
        except ObjectNotFound:  # its holder has just ended
            continue
        found = Claim.parse(data)
        if found and found.holder == claim.holder:  # a lost answer made the client ask again
            break
        # Writes are atomic, so a damaged claim has no holder.
        if not found or found.has_ended or time.monotonic() - began > LOST_SECONDS:
            storage.write(CLAIM, to_json(asdict(claim)))
            break
        holder = f"process {found.process} on {found.host}"
        if first is None:
            first = data
            logger.warning(
                "%s may be alive, in %s; waiting up to %g s to see", what, holder, LOST_SECONDS
            )
        elif data != first:
            raise UserError(
                f"{what} is alive since {found.since}, in {holder}; stop that command, or wait for"
                " its end"
            )
        time.sleep(1.0)
    return claim


def _beat(storage: Storage, what: str, claim: Claim, ended: threading.Event) -> None:
    for beat in itertools.count(2):
        if ended.wait(BEAT_SECONDS):
            return
        with suppress(UserError):  # the storage is away; the next beat may reach it
            if not _is_held(storage, claim):
                logger.warning(
                    "another command works on %s as well, because it took this one for dead", what
                )
                return
            storage.write(CLAIM, to_json(asdict(replace(claim, beat=beat))))


def _is_held(storage: Storage, claim: Claim) -> bool:
    found = Claim.parse(storage.read(CLAIM)) if storage.exists(CLAIM) else None
    return found is not None and found.holder == claim.holder
