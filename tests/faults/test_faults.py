"""Under every fault of ``tests.faults.storage``, an epoch is exact or an error names the object."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import open_storage
from pipeline.storage.server import ObjectStorageServer
from tests.faults import storage as faults


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStorageServer]:
    """A separate server, since one of the faults kills it."""
    with (
        ObjectStorageServer(tmp_path_factory.mktemp("faults"), faults.BUCKET) as server,
        pytest.MonkeyPatch.context() as patch,
        faults.short_timeouts(),
    ):
        for name, value in server.environment().items():
            patch.setenv(name, value)
        faults.write(open_storage(f"s3://{faults.BUCKET}/{faults.PREFIX}", server.endpoint_url))
        yield server


@pytest.fixture(scope="module")
def expected(own_server: ObjectStorageServer) -> str:
    return faults.epoch(
        open_storage(f"s3://{faults.BUCKET}/{faults.PREFIX}", own_server.endpoint_url)
    )


@pytest.mark.parametrize("fault", faults.FAULTS, ids=[fault.name for fault in faults.FAULTS])
def test_a_fault_ends_in_the_exact_epoch_or_in_the_named_error(
    fault: faults.Fault, own_server: ObjectStorageServer, expected: str, tmp_path: Path
) -> None:
    assert os.environ["AWS_ENDPOINT_URL"] == own_server.endpoint_url
    with faults.attempts(fault):
        fault.check(faults.Stage(own_server, expected, tmp_path))
