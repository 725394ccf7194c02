"""A manifest is read as it was written, and any damage to it is detected."""

import hashlib
import json
import pickle
from dataclasses import replace

import pytest
import xxhash

from pipeline.data import DataSet, manifest, records
from pipeline.data.manifest import Manifest
from pipeline.data.records import Index, PagedShards, Shard, paginate
from pipeline.errors import UserError
from pipeline.storage.base import Storage


def test_a_manifest_survives_storage(storage: Storage, numbered: DataSet) -> None:
    assert manifest.load(storage) == numbered.manifest
    assert numbered.manifest.num_samples("train") == 50
    assert [shard.name for shard in numbered.manifest.shards("test")] == [
        "test/00000.tar",
        "test/00001.tar",
    ]
    for shard in numbered.manifest.shards("train"):
        content = storage.read(shard.name)
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.size, shard.sha256)


def test_the_digest_stands_for_the_content(numbered: DataSet) -> None:
    first, *others = numbered.manifest.shards("train")
    altered = replace(
        numbered.manifest,
        splits={**numbered.manifest.splits, "train": (replace(first, sha256="0" * 64), *others)},
    )
    assert replace(numbered.manifest).digest == numbered.manifest.digest != altered.digest


def test_a_missing_data_set_says_how_to_make_one(storage: Storage) -> None:
    for name, command in (
        ("datasets/mnist", "vlae shard dataset=mnist"),
        ("datasets/birds", "vlae shard dataset=folder dataset.path=FOLDER dataset.name=birds"),
        ("birds", "vlae shard dataset=folder dataset.path=FOLDER dataset.name=NAME"),
    ):
        place = storage.child(name)
        with pytest.raises(
            UserError, match=f"no data set at {place.url}; make one with: {command}"
        ):
            manifest.load(place)


def test_an_unknown_split_is_named_with_the_known_ones(numbered: DataSet) -> None:
    with pytest.raises(
        UserError, match="numbered has no split 'validation'; it has train, valid, test"
    ):
        numbered.manifest.shards("validation")


def test_a_manifest_of_another_version_is_refused(storage: Storage, numbered: DataSet) -> None:
    storage.write_json("manifest.json", {**storage.read_json("manifest.json"), "version": 1})
    with pytest.raises(
        UserError, match=r"manifest\.json is of version 1, but this program reads version 3"
    ):
        manifest.load(storage)
    storage.write_json("manifest.json", ["something else"])
    with pytest.raises(UserError, match="it is not a manifest"):
        manifest.load(storage)


def test_a_damaged_manifest_is_refused(storage: Storage, numbered: DataSet) -> None:
    content = storage.read_json("manifest.json")
    for change in (
        {"splits": None},
        {"splits": {"train": [{"name": "x"}]}},
        {"image_shape": [1, 2]},
        {"unknown": 1},
    ):
        storage.write_json("manifest.json", {**content, **change})
        with pytest.raises(
            UserError, match=r"manifest\.json is damaged or was edited: its sha256 is"
        ):
            manifest.load(storage)
    storage.write("manifest.json", json.dumps(content).encode()[:-20])
    with pytest.raises(UserError, match=r"manifest\.json is damaged: it is not JSON"):
        manifest.load(storage)


def test_an_index_says_where_the_records_are(storage: Storage, numbered: DataSet) -> None:
    shard = numbered.manifest.shards("train")[3]
    index = Index.load(storage, shard)
    assert index.starts.tolist() == [0, 4, 8, 12, 16, 20]
    assert index.offset[0] == 0
    assert (index.offset[:-1] + index.size[:-1] == index.offset[1:]).all()
    for offset, size, checksum in zip(index.offset, index.size, index.checksum, strict=True):
        assert (
            xxhash.xxh3_128_hexdigest(storage.read_range(shard.name, int(offset), int(size)))
            == checksum
        )


def test_an_altered_index_is_refused(storage: Storage, numbered: DataSet) -> None:
    shard = numbered.manifest.shards("train")[0]
    storage.write(shard.index_name, storage.read(shard.index_name).replace(b"3", b"4", 1))
    with pytest.raises(
        UserError,
        match=rf"train/00000\.index\.json is damaged: .* the manifest says {shard.index_sha256}",
    ):
        Index.load(storage, shard)


def test_very_many_shards_are_kept_in_pages(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "PAGE", 10)
    shards = [
        Shard(f"{n}.tar", n, f"{n:064x}", 7 * n + 1, f"{n}.json", f"{n + 1:064x}")
        for n in range(37)
    ]
    few = paginate(storage, "valid", shards[:10])
    many = paginate(storage, "train", shards)
    assert isinstance(few, tuple)
    assert isinstance(many, PagedShards)
    written = Manifest("many", (1, 2, 3), None, 4, {"train": many, "valid": few})
    written.publish(storage)
    loaded = manifest.load(storage)
    assert loaded.digest == written.digest
    for contents in (written, loaded, pickle.loads(pickle.dumps(loaded))):  # noqa: S301  (as Ray does)
        assert list(contents.shards("train")) == shards
        assert contents.shards("train")[-1:] == shards[-1:]
        assert contents.shard_samples("train").tolist() == [shard.num_samples for shard in shards]
        assert contents.num_samples("valid") == sum(shard.num_samples for shard in shards[:10])
    storage.write("pages/train-00002.parquet", storage.read("pages/train-00001.parquet"))
    assert manifest.load(storage).shards("train")[9] == shards[9]
    with pytest.raises(UserError, match=r"pages/train-00002\.parquet is damaged: its sha256 is"):
        manifest.load(storage).shards("train")[25]
    storage.delete(["pages/train-sizes.npy"])
    with pytest.raises(UserError, match=r"no .*pages/train-sizes\.npy"):
        manifest.load(storage).num_samples("train")
