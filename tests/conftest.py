"""What the tests share: the real S3 server, a storage on it and one in a folder, and a Ray cluster."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import cluster, config
from pipeline.storage import Storage, open_storage
from pipeline.store import ObjectStore


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running S3 server with the bucket ``tests``; the environment leads every client of this session to it."""
    with ObjectStore(tmp_path_factory.mktemp("objects"), "tests") as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage: a test that asks for it runs on a folder and on S3."""
    if request.param == "folder":
        return open_storage(str(tmp_path / "storage"))
    request.getfixturevalue("object_store")
    return open_storage(f"s3://tests/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def ray_cluster(object_store: ObjectStore) -> Iterator[None]:
    """A Ray cluster of this session. It starts after the S3 server, whose environment its workers inherit."""
    import ray

    cluster.connect(config.Cluster(), config.Storage())
    yield
    ray.shutdown()
