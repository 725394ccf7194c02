"""Where Ray Train and Ray Tune keep records of their own, which they write by Arrow.

Nothing here is read from them: a run or a search is resumed from what this package writes.
"""

from typing import Any

from pipeline.storage import open_storage

PATIENCE = 60.0
"""Seconds without a byte after which Arrow gives a request up; by itself, it waits for three."""
ATTEMPTS = 10
"""Attempts of a request, with pauses that double up to 20 s."""


def ray_storage(root: str) -> dict[str, Any]:
    """The arguments of a ``RunConfig`` that keep Ray's records below ``root``."""
    url = f"{root}/ray"
    if not url.startswith("s3://"):
        return {"storage_path": url}
    from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem

    from pipeline.storage.s3 import S3Storage

    storage = open_storage(url)
    assert isinstance(storage, S3Storage)
    found, path = FileSystem.from_uri(url)
    patient = S3FileSystem(
        region=found.region,
        endpoint_override=storage.endpoint_url,
        connect_timeout=PATIENCE,
        request_timeout=PATIENCE,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )
    return {"storage_path": path, "storage_filesystem": patient}
