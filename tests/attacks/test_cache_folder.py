"""``dataset.cache`` may be a folder with anything in it: the cache touches its own files alone."""

from pathlib import Path

import numpy as np

from pipeline.config.sections import DatasetOptions
from pipeline.data.cache import SUBFOLDER, open_cache
from pipeline.data.loader import EvalLoader
from pipeline.data.reader import ReadOptions
from pipeline.storage.base import PARTIAL
from pipeline.storage.folder import FolderStorage
from tests.pipeline.conftest import write as write_blocks
from tests.pipeline.data.test_pixels import write as write_photographs


def test_nothing_that_is_not_the_caches_is_counted_or_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "home"
    mine = [
        *("thesis.tex", "photographs/holiday.jpg", f"{PARTIAL}download", "lock-007.txt"),
        *("0" * 64, f"{PARTIAL}{'0' * 64}", f"{'a' * 64}-{'b' * 16}.pixels"),
        *(f"{SUBFOLDER}/notes.txt", f"{SUBFOLDER}/{PARTIAL}notes", f"{SUBFOLDER}/{'c' * 63}"),
        *(f"{SUBFOLDER}/{'d' * 64}/a folder.txt", f"{SUBFOLDER}/.hidden"),
    ]
    for name in mine:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"important" * 1000)
    blocks = write_blocks(FolderStorage(tmp_path / "blocks"))
    photographs = write_photographs(FolderStorage(tmp_path / "photographs"))
    largest = max(shard.size for shard in blocks.manifest.shards("train"))
    for data, size in ((blocks, 2 * largest), (photographs, 70_000), (photographs, 200_000)):
        cache = open_cache(DatasetOptions(name="x", cache=str(folder), cache_gb=size / 1e9))
        for _ in range(2):  # shards evict each other
            batches = EvalLoader(data, split="train", batch_size=16, options=ReadOptions(cache))
            samples = np.concatenate([batch.samples for batch in batches])
            assert samples.tolist() == list(range(data.manifest.num_samples("train")))
    assert cache is not None
    made = [
        path
        for path in cache.folder.iterdir()
        if path.name not in {Path(name).name for name in mine}
        and path.is_file()
        and not path.name.startswith("lock-")
    ]
    assert made, "the cache kept nothing, so this shows nothing"
    for name in mine:
        assert (folder / name).read_bytes() == b"important" * 1000
    assert {path.name for path in folder.iterdir()} == {
        *(name.partition("/")[0] for name in mine),
        SUBFOLDER,
    }
