"""Where Ray Train and Ray Tune keep records of their own, which they write by Arrow.

Nothing here is read from them: a run or a search is resumed from what this package writes.
"""

from typing import Any

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, S3FileSystem

from pipeline.storage import open_storage
from pipeline.storage.s3 import S3Storage

PATIENCE = 60.0
"""Seconds without a byte after which Arrow gives a request up; by itself, it waits for three."""
ATTEMPTS = 10
"""Attempts of a request, with pauses that double up to 20 s."""


class PatientS3(S3FileSystem):
    """Arrow's file system on an S3 server that may be away for a while.

    It keeps its patience when it is pickled, as on its way to Ray Train's controller. Arrow's own
    would be back at three attempts within two seconds there.
    """

    def __init__(self, region: str, endpoint_url: str | None) -> None:
        self.arguments = (region, endpoint_url)
        super().__init__(
            region=region,
            endpoint_override=endpoint_url,
            connect_timeout=PATIENCE,
            request_timeout=PATIENCE,
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        )

    def __reduce__(self) -> tuple[type["PatientS3"], tuple[str, str | None]]:
        return PatientS3, self.arguments


def ray_storage(root: str) -> dict[str, Any]:
    """The arguments of a ``RunConfig`` that keep Ray's records below ``root``."""
    url = f"{root}/ray"
    if not url.startswith("s3://"):
        return {"storage_path": url}
    storage = open_storage(url)
    assert isinstance(storage, S3Storage)
    found, path = FileSystem.from_uri(url)
    return {
        "storage_path": path,
        "storage_filesystem": PatientS3(found.region, storage.endpoint_url),
    }
