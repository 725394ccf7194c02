"""Addresses of servers and models, as options and the environment give them."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import UserError

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Where the SDK looks for the S3 server's address, in this order."""
HOST = re.compile(r"[\w-]+(\.[\w-]+)*\.?|[0-9a-f]*:[0-9a-f:.]*(%\w+)?", re.IGNORECASE)
"""The name or the address of a host; IPv6 without its brackets."""


def check_endpoint(key: str, url: str) -> None:
    """Raise UserError, which names ``key``, unless ``url`` is http or https, a host, and a port."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # brackets that do not match, or a port that is no number
        parts, host, port = urlsplit(""), "", None
    given = parts.scheme in ("http", "https") and HOST.fullmatch(host) and port != 0
    if given and parts.path in ("", "/") and not parts.query and not parts.fragment:
        return
    meant = "http://HOST:PORT or https://HOST"
    if given:
        meant = f"{parts.scheme}://{parts.netloc}, and the bucket belongs into s3://BUCKET/PREFIX"
    elif "://" not in url and re.fullmatch(r"[\w.-]+:\d+", url):
        meant = f"http://{url} or https://{url}"
    raise UserError(f"{key}={url} is not the address of an S3 server; it must be {meant}")


def name_of(model: str) -> str:
    """The name that a model's results have by default, from the model's address.

    ``models:/birds@champion`` -> ``birds-champion``, ``pretrained/mnist`` -> ``mnist``, and of a
    run's folder its name; of ``RUN/best`` both.
    """
    if model.startswith("models:/"):
        parts = [model.removeprefix("models:/")]
    else:
        path = model if "://" in model else str(Path(model).expanduser().absolute())
        parts = [part for part in path.split("/") if part]
        parts = parts[-2:] if parts[-1:] == ["best"] else parts[-1:]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-.") or "model"


def host_and_port(address: str) -> tuple[str, int] | None:
    """The host and port in a Ray cluster's address; None if it has no such form, as ``auto``."""
    match = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d{1,5})", address)
    return (match[1], int(match[2])) if match and HOST.fullmatch(match[1]) else None
