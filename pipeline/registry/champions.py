"""The history of a model's champions, kept in tags of the registered model."""

from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

CHAMPION = "champion."
"""The prefix of the tags: the rest of the name is the time in nanoseconds.

The value is ``promoted:3`` or ``rolled back:2``.
"""
PROMOTED, ROLLED_BACK = "promoted", "rolled back"


class ChampionChange(NamedTuple):
    """A version that became champion."""

    time: datetime
    how: str
    """``promoted`` or ``rolled back``."""
    version: int


def tag(nanoseconds: int, how: str, version: int) -> tuple[str, str]:
    """Name and value of the tag that records a change.

    Each change has its own tag, so that two at once do not overwrite each other's.
    """
    return f"{CHAMPION}{nanoseconds:020d}", f"{how}:{version}"


def read(tags: Mapping[str, str]) -> list[ChampionChange]:
    """The changes that a model's tags record, the oldest first."""
    changes = []
    for key, value in sorted(tags.items()):
        how, _, version = value.rpartition(":")
        if key.startswith(CHAMPION) and version.isdecimal():
            seconds = int(key.removeprefix(CHAMPION)) / 1e9
            changes.append(ChampionChange(datetime.fromtimestamp(seconds, UTC), how, int(version)))
    return changes


def last(changes: Sequence[ChampionChange]) -> int | None:
    """The version that the newest change made champion."""
    return changes[-1].version if changes else None


def previous(
    changes: Sequence[ChampionChange], current: int | None, versions: Container[int]
) -> int | None:
    """The champion before the ``current`` one among the ``versions`` that still exist.

    Changes after the one that made the ``current`` one champion did not take place: whoever
    recorded them was killed before the alias was set. A rollback undoes the promotions after the
    version that it returned to, so that repeated rollbacks go further back.
    """
    promoted: list[int] = []
    for change in changes:
        if change.how == PROMOTED:
            promoted.append(change.version)
        else:
            while promoted and promoted[-1] != change.version:
                promoted.pop()
    if current in promoted:
        while promoted[-1] != current:
            promoted.pop()
    return next(
        (version for version in reversed(promoted) if version != current and version in versions),
        None,
    )
