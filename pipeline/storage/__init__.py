"""Objects in ``s3://bucket/prefix`` or in a folder: everything is read and written through here."""

import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.storage.base import Storage
from pipeline.storage.folder import FolderStorage
from pipeline.storage.s3 import S3Storage
from pipeline.storage.web import HttpStorage


def open_storage(url: str, endpoint_url: str | None = None) -> Storage:
    """The storage at ``url``: ``s3://bucket/prefix``, or a local folder, which need not exist yet,
    or, to read, ``https://...``.

    ``endpoint_url`` is the S3 server's address if it is not Amazon's; without it the SDK's own
    settings decide, such as AWS_ENDPOINT_URL. Credentials come from the SDK's own chain only.
    Nothing is contacted before the first use.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FolderStorage(
            Path(url).expanduser().absolute()
        )  # absolute: a worker's current folder is another one
    if scheme in ("http", "https") and rest:
        return HttpStorage(url.rstrip("/"))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise UserError(f"cannot keep anything at {url}; use s3://BUCKET/PREFIX or a local folder")
    endpoint = (
        endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    return S3Storage(bucket, prefix.strip("/"), endpoint)
