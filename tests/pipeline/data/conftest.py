"""The numbered images in a folder, for tests of the loader as a library."""

import pytest
from torch import Tensor

from pipeline.data import DataSet
from pipeline.storage.folder import FolderStorage
from tests.pipeline.conftest import write

BATCH, STEPS = 8, 6
"""Six batches of the 50 training images."""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return write(FolderStorage(tmp_path_factory.mktemp("numbered")))


def numbers(images: Tensor) -> list[int]:
    """The numbers of the numbered images."""
    return images[:, 0, 0, 0].tolist()
