"""Whatever storage does, an epoch is exact or an error names the object: the faults of
``tests.faults``, one by one.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.storage import open_storage
from pipeline.storage.server import ObjectStore
from tests.faults import storage as faults


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A server of our own, since one of the faults kills it."""
    with (
        ObjectStore(tmp_path_factory.mktemp("faults"), faults.BUCKET) as store,
        pytest.MonkeyPatch.context() as patch,
        faults.impatience(),
    ):
        for name, value in store.environment().items():
            patch.setenv(name, value)
        faults.write(open_storage(f"s3://{faults.BUCKET}/{faults.PREFIX}", store.endpoint_url))
        yield store


@pytest.fixture(scope="module")
def expected(own_store: ObjectStore) -> str:
    return faults.epoch(
        open_storage(f"s3://{faults.BUCKET}/{faults.PREFIX}", own_store.endpoint_url)
    )


@pytest.mark.parametrize("fault", faults.FAULTS, ids=[fault.name for fault in faults.FAULTS])
def test_a_fault_ends_in_the_exact_epoch_or_in_the_named_error(
    fault: faults.Fault, own_store: ObjectStore, expected: str, tmp_path: Path
) -> None:
    assert os.environ["AWS_ENDPOINT_URL"] == own_store.endpoint_url
    with faults.attempts(fault):
        fault.passes(faults.Stage(own_store, expected, tmp_path))
