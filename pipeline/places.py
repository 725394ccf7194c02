"""Addresses in manifests: which are well formed, and which of them are followed.

The shards of a data set lie below its manifest and have relative names. Shards that were indexed in
place (``vlae index``) have whole addresses. A manifest that somebody else wrote could point these
at any file of this machine and any server in its network, so they are only followed at a place that

- holds the manifest, too: the same bucket, or the same web server;
- ``vlae index`` was given by this user, which is remembered in ``~/.config/vlae/places``;
- or stands in the environment variable ``VLAE_PLACES``, separated by spaces.
"""

import logging
import os
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import UserError

logger = logging.getLogger(__name__)

VARIABLE = "VLAE_PLACES"
"""The environment variable of places that are followed besides those remembered."""
SCHEMES = ("s3", "http", "https")


def is_key(name: object) -> bool:
    """Whether this is a relative path below a storage's own address: ``train/00000.tar``."""
    return isinstance(name, str) and "://" not in name and _is_path(name)


def is_address(name: object) -> bool:
    """Whether this is the whole address of an object or a folder, without detours in its path."""
    if not isinstance(name, str):
        return False
    if name.startswith("/"):
        return _is_path(name[1:])
    scheme, separator, rest = name.partition("://")
    host, _, path = rest.partition("/")
    web = scheme != "s3"
    return (
        bool(separator and host)
        and scheme in SCHEMES
        and not set("@?#") & set(host if scheme == "s3" else rest)
        and (not path or _is_path(urllib.parse.unquote(path) if web else path))
        and host.isprintable()
        and " " not in host
    )


def _is_path(path: str) -> bool:
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(parts)


def is_below(address: str, places: Iterable[str]) -> bool:
    """Whether an address is one of the places, or lies below it."""
    return any(address == place or address.startswith(f"{place}/") for place in places)


def remember(places: Iterable[str]) -> None:
    """Follow these places from now on, in all of this user's commands on this machine."""
    known = _remembered()
    new = [place for place in places if place not in known]
    if not new:
        return
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with _file().open("a") as file:
            file.write("".join(f"{place}\n" for place in new))
    except OSError as error:
        logger.warning(
            "cannot remember in %s (%s) that shards lie below %s; set %s to that",
            _file(),
            error.strerror or error,
            " ".join(new),
            VARIABLE,
        )


def check(url: str, places: Iterable[str]) -> None:
    """Raise UserError unless the shards of a manifest at ``url`` are followed to all ``places``."""
    followed = [*followed_everywhere(), *_own(url)]
    for place in places:
        if not is_below(place, followed):
            raise UserError(
                f"{url} is a data set whose shards are elsewhere, below {place}, where no vlae"
                f" index of yours has read; if you trust whoever wrote it, set"
                f" {VARIABLE}={place}"
            )


def followed_everywhere() -> list[str]:
    """The places that are followed whatever the manifest; workers get them by ``VARIABLE``."""
    return [*_remembered(), *os.environ.get(VARIABLE, "").split()]


def _own(url: str) -> list[str]:
    """The bucket or the web server that holds the manifest itself."""
    scheme, separator, rest = url.partition("://")
    return [f"{scheme}://{rest.partition('/')[0]}"] if separator else []


def _remembered() -> list[str]:
    try:
        return _file().read_text().splitlines()
    except (OSError, ValueError):
        return []


def _file() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "vlae" / "places"
