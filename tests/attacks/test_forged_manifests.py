"""A manifest that somebody forged is refused before anything that it names is touched."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import DataSet, manifest, records
from pipeline.data.cache import ShardCache
from pipeline.data.loader import EvalLoader
from pipeline.data.reader import ReadOptions
from pipeline.data.records import PagedShards, Shard
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from tests.pipeline.conftest import write

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A sound data set in a folder."""
    place = open_storage(str(tmp_path / "data"))
    write(place)
    return place


def forge(storage: Storage, change: Change) -> None:
    """Change the manifest as somebody does who knows how it is made."""
    content = storage.read_json("manifest.json")
    del content["sha256"]
    change(content)
    storage.write_json("manifest.json", {**content, "sha256": manifest._digest(content)})


def read_all(storage: Storage, cache: Path) -> None:
    data = DataSet.load(storage)
    options = ReadOptions(ShardCache(cache, 10**9))
    for _ in EvalLoader(data, split="train", batch_size=10, options=options):
        pass


def test_a_sound_data_set_is_read_and_cached(storage: Storage, tmp_path: Path) -> None:
    read_all(storage, tmp_path / "cache")
    assert any((tmp_path / "cache").iterdir())


def of_first_shard(**values: Any) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["splits"]["train"][0] |= values

    return change


ODD_KEYS = ["../victim", "/etc/passwd", "train/../../victim", "", ".", "a//b", "s3://bucket/x", 5]
ODD_DIGESTS = ["../../victim", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n", None, 5]


def test_a_sha256_that_is_a_path_deletes_nothing(storage: Storage, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for path in (str(victim), "../victim"):
        forge(storage, of_first_shard(sha256=path))
        with pytest.raises(UserError, match=r"manifest\.json is damaged .*is no sha256"):
            read_all(storage, tmp_path / "cache")
        assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "change",
    [
        *(of_first_shard(sha256=odd) for odd in ODD_DIGESTS),
        *(of_first_shard(index_sha256=odd) for odd in ODD_DIGESTS),
        *(of_first_shard(index_name=odd) for odd in ODD_KEYS),
        *(of_first_shard(name=odd) for odd in ODD_KEYS),
        of_first_shard(num_samples=True),
        of_first_shard(size=-1),
        of_first_shard(size=1.5),
        *(
            lambda content, odd=odd: content.update(name=odd)
            for odd in ("../x", "", "a/b", None, "x" * 201)
        ),
        lambda content: content["splits"].update({"../x": content["splits"]["train"]}),
        lambda content: content.update(places=["file:///etc"]),
        lambda content: content.update(places="/"),
        lambda content: content.update(places=["/etc/../home"]),
        lambda content: content.update(class_names=["a"]),
        lambda content: content.update(class_names=[1, 2]),
        lambda content: content.update(pixels="grey"),
        lambda content: content.update(binarization="auto"),
        lambda content: content.update(image_shape=[3, 2, 2], binarization="static"),
        lambda content: content.update(decoding={"method": 1, "filter": "box", "library": "x"}),
        lambda content: content.update(decoding=["full"]),
    ],
)
def test_every_field_is_checked(storage: Storage, change: Change) -> None:
    forge(storage, change)
    with pytest.raises(UserError, match=r"manifest\.json is damaged \("):
        DataSet.load(storage)


# --- pages ----------------------------------------------------------------------------------------


def page_of(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def forge_pages(storage: Storage, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Put the shards of train into a page, with rows that were changed."""

    def to_pages(content: dict[str, Any]) -> None:
        rows = content["splits"]["train"]
        counts = [row["num_samples"] for row in rows]
        page = change(rows) or page_of(rows)
        sizes = io.BytesIO()
        np.save(sizes, np.array(counts, np.uint32))
        storage.write("pages/train-00000.parquet", page)
        storage.write("pages/sizes.npy", sizes.getvalue())
        content["splits"]["train"] = {
            "pages": [
                {
                    "name": "pages/train-00000.parquet",
                    "num_shards": len(counts),
                    "sha256": hashlib.sha256(page).hexdigest(),
                }
            ],
            "sizes_name": "pages/sizes.npy",
            "sizes_sha256": hashlib.sha256(sizes.getvalue()).hexdigest(),
        }

    forge(storage, to_pages)


def test_shards_in_pages_are_read(storage: Storage, tmp_path: Path) -> None:
    forge_pages(storage, lambda rows: None)
    read_all(storage, tmp_path / "cache")


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "../../victim"},
        {"index_sha256": "0"},
        {"index_name": "../victim"},
        {"name": "/etc/passwd"},
        {"name": "http://127.0.0.1:1/x.tar"},
        {"num_samples": 3},
        {"size": -1},
    ],
    ids=str,
)
def test_every_row_of_a_page_is_checked(
    storage: Storage, tmp_path: Path, change: dict[str, Any]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    forge_pages(storage, lambda rows: rows[2].update(change))
    with pytest.raises(UserError, match=r"train-00000\.parquet is damaged \(row 2: "):
        read_all(storage, tmp_path / "cache")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: b"PAR1 not Parquet PAR1",
        lambda rows: page_of(rows[:-1]),
        lambda rows: page_of([{key: row[key] for key in ("name", "size")} for row in rows]),
        lambda rows: page_of([{**row, "more": 1} for row in rows]),
        lambda rows: page_of([{**row, "name": None} for row in rows]),
    ],
)
def test_a_page_of_another_form_is_refused(
    storage: Storage, tmp_path: Path, change: Callable[[list[dict[str, Any]]], bytes]
) -> None:
    forge_pages(storage, change)
    with pytest.raises(UserError, match=r"train-00000\.parquet is damaged \("):
        read_all(storage, tmp_path / "cache")


def test_a_page_that_unpacks_to_gigabytes_is_not_unpacked(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_PAGE_BYTES", 1 << 20)
    long = "x" * (1 << 19)
    forge_pages(
        storage, lambda rows: page_of([{**row, "name": f"{long}{n}"} for n, row in enumerate(rows)])
    )
    with pytest.raises(UserError, match=r"train-00000\.parquet is damaged \(it is too large\)"):
        _ = DataSet.load(storage).manifest.shards("train")[0]


def test_a_long_text_that_a_page_stores_once_is_not_repeated_in_memory(storage: Storage) -> None:
    shards = [Shard("train/0.tar", 1, "0" * 64, 1, "x" * (1 << 20), "0" * 64)] * 300
    paged = PagedShards.write(storage, "train", shards)
    before = pa.total_allocated_bytes()
    assert paged[0] == shards[0]
    assert pa.total_allocated_bytes() - before < 64 << 20  # not 300 MB


@pytest.mark.parametrize(
    "change",
    [
        lambda pages: pages.update(sizes_name="../victim"),
        lambda pages: pages.update(sizes_name="/etc/passwd"),
        lambda pages: pages.update(sizes_sha256="../victim"),
        lambda pages: pages["pages"][0].update(name="../victim"),
        lambda pages: pages["pages"][0].update(sha256="../victim"),
        lambda pages: pages["pages"][0].update(num_shards=10**9),
        lambda pages: pages["pages"][0].update(num_shards=0),
        lambda pages: pages.update(pages=[]),
    ],
)
def test_what_names_the_pages_is_checked(
    storage: Storage, change: Callable[[dict[str, Any]], None]
) -> None:
    forge_pages(storage, lambda rows: None)
    forge(storage, lambda content: change(content["splits"]["train"]))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \("):
        DataSet.load(storage)


HEADER = b"{'descr': '<u4', 'fortran_order': False, 'shape': (1000000000000,), }"


@pytest.mark.parametrize(
    "content", [b"", b"x" * 200, b"\x93NUMPY\x01\x00\x76\x00" + HEADER.ljust(117) + b"\n1234"]
)
def test_numbers_of_samples_that_are_no_array_are_refused(storage: Storage, content: bytes) -> None:
    forge_pages(storage, lambda rows: None)
    storage.write("pages/sizes.npy", content)
    digest = hashlib.sha256(content).hexdigest()
    forge(storage, lambda whole: whole["splits"]["train"].update(sizes_sha256=digest))
    with pytest.raises(UserError, match=r"sizes\.npy is damaged \("):
        DataSet.load(storage).manifest.num_samples("train")
