"""Objects in ``s3://bucket/prefix`` or in a folder: everything is read and written through here."""

import os
from pathlib import Path

from pipeline.config.addresses import ENDPOINT_VARIABLES, check_endpoint
from pipeline.config.options import SECRET, has_secret
from pipeline.errors import UserError
from pipeline.storage.base import Storage
from pipeline.storage.folder import FolderStorage


def open_storage(url: str, endpoint_url: str | None = None) -> Storage:
    """The storage at ``url``: ``s3://bucket/prefix``, a local folder, or ``https://...`` to read.

    A folder need not exist yet. ``endpoint_url`` is the address of an S3 server other than
    Amazon's; without it the SDK's own settings decide, such as AWS_ENDPOINT_URL. Credentials come
    from the SDK's own chain only. Nothing is contacted before the first use.
    """
    for address in (url, endpoint_url or os.environ.get("AWS_ENDPOINT_URL") or ""):
        if has_secret(address):
            raise UserError(SECRET.format(key="the address of the storage"))
    scheme, separator, rest = url.partition("://")
    if not separator:
        # Absolute, since a worker has another current folder.
        return FolderStorage(Path(url).expanduser().absolute())
    if scheme in ("http", "https") and rest:
        from pipeline.storage.web import HttpStorage

        return HttpStorage(url.rstrip("/"))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"cannot store anything at {url}; use s3://BUCKET/PREFIX or a local folder")
    from pipeline.storage.s3 import S3Storage  # here, since the SDK takes long to import

    given = {"storage.endpoint_url": endpoint_url} | {
        name: os.environ.get(name) for name in ENDPOINT_VARIABLES
    }
    key, endpoint = next(((key, url) for key, url in given.items() if url), ("", None))
    if endpoint:
        check_endpoint(key, endpoint)
    return S3Storage(bucket, prefix.strip("/"), endpoint)
