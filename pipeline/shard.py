"""``vlae shard``: images -> WebDataset shards and a manifest, written by Ray tasks in parallel.

The shards come first, under their final names, and the manifest last: a run that is killed leaves no data set, and the next
writes it anew. Equal images and options give equal bytes.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import webdataset
from ray.exceptions import RayTaskError
from tqdm import tqdm

from pipeline import cluster, manifest
from pipeline.config import ShardConfig
from pipeline.errors import UserError
from pipeline.manifest import MANIFEST_KEY, Index, Manifest, Shard
from pipeline.sources import ImageSource, open_source
from pipeline.storage import Storage, open_storage

IN_FLIGHT = 256  # shards that wait for a worker at once; more would only burden Ray


def run(config: ShardConfig) -> dict[str, Any]:
    """Write the data set that ``config`` names, unless it is there already. Returns what there is now, as JSON values.

    Raises ``UserError`` if the images cannot be read, or the data set exists but was made from other images or options.
    """
    storage = open_storage(config.dataset.url, config.storage.endpoint_url)
    source = open_source(config.dataset, config.shard)
    options = {"samples_per_shard": config.shard.samples_per_shard, "block_size": config.shard.block_size}
    recipe = {**source.description, **options}
    contents = _existing(storage, recipe)
    reused = contents is not None
    if contents is None:
        cluster.connect(config.cluster, config.storage)
        contents = Manifest(
            name=config.dataset.name,
            image_shape=source.image_shape,
            num_classes=source.num_classes,
            block_size=config.shard.block_size,
            splits=_write_all(storage, source, config.shard.samples_per_shard, config.shard.block_size),
            source=recipe,
        )
        _remove_leftovers(storage, contents)
        contents.publish(storage)
    return {
        "url": storage.url,
        "reused": reused,
        "image_shape": list(contents.image_shape),
        "num_classes": contents.num_classes,
        "splits": {
            split: {"images": contents.num_samples(split), "shards": len(shards)} for split, shards in contents.splits.items()
        },
        "bytes": sum(shard.size for shards in contents.splits.values() for shard in shards),
        "manifest_digest": contents.digest,
    }


def _existing(storage: Storage, recipe: dict[str, Any]) -> Manifest | None:
    """The data set in ``storage``, if it is there, whole, and made by ``recipe``."""
    if not storage.exists(MANIFEST_KEY):
        return None
    contents = manifest.load(storage)
    if contents.source != recipe:
        differing = sorted(key for key in recipe.keys() | contents.source.keys() if recipe.get(key) != contents.source.get(key))
        raise UserError(
            f"the data set at {storage.url} was made from other images or options ({', '.join(differing)}); "
            f"choose another dataset.name, or delete {storage.url}/{MANIFEST_KEY} to write it anew"
        )
    sizes = storage.sizes()
    shards = [shard for split in contents.splits.values() for shard in split]
    whole = all(sizes.get(shard.name) == shard.size and shard.index_name in sizes for shard in shards)
    return contents if whole else None


def _write_all(storage: Storage, source: ImageSource, samples_per_shard: int, block_size: int) -> dict[str, tuple[Shard, ...]]:
    """Write the shards of every split, one Ray task each."""
    jobs = _jobs(source.splits, samples_per_shard)
    done: dict[str, Shard] = {}
    pending: list[Any] = []
    source.prepare()
    task, shared_source = ray.remote(write_shard), ray.put(source)
    with tqdm(total=sum(source.splits.values()), desc="sharding", unit=" images", mininterval=1.0) as progress:
        while True:
            for split, name, start, stop in jobs:
                pending.append(task.remote(storage, shared_source, split, name, start, stop, block_size))
                if len(pending) == IN_FLIGHT:
                    break
            if not pending:
                break
            ready, pending = ray.wait(pending)
            try:
                shards = ray.get(ready)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise
            for shard in shards:
                done[shard.name] = shard
                progress.update(shard.num_samples)
    return {
        split: tuple(done[name] for other, name, _, _ in _jobs(source.splits, samples_per_shard) if other == split)
        for split in source.splits
    }


def _jobs(splits: dict[str, int], samples_per_shard: int) -> Iterator[tuple[str, str, int, int]]:
    """Split, name, first sample, last sample + 1 of every shard."""
    for split, count in splits.items():
        for number, start in enumerate(range(0, count, samples_per_shard)):
            yield split, f"{split}/{number:05d}.tar", start, min(start + samples_per_shard, count)


def write_shard(storage: Storage, source: ImageSource, split: str, name: str, start: int, stop: int, block_size: int) -> Shard:
    """Write one shard, of samples ``start`` to ``stop`` of a split, and its index."""
    tar = io.BytesIO()
    offsets, sizes, counts, checksums = [], [], [], []
    # A fixed time and owner: equal images must give equal bytes.
    with webdataset.TarWriter(tar, encoder=False, mtime=0, user="", group="") as writer:
        for first in range(start, stop, block_size):
            images, labels = source.read(split, first, min(first + block_size, stop))
            offset = writer.tarstream.offset
            writer.write(
                {
                    "__key__": f"{first:09d}",
                    "images.npy": _npy(images.transpose(0, 3, 1, 2)),  # channels first, as the model wants them
                    "labels.npy": _npy(labels),
                }
            )
            offsets.append(offset)
            sizes.append(writer.tarstream.offset - offset)
            counts.append(len(labels))
    content = tar.getvalue()
    for offset, size in zip(offsets, sizes, strict=True):
        checksums.append(hashlib.sha256(content[offset : offset + size]).hexdigest())
    index = Index.to_bytes(offsets, sizes, checksums, num_samples=counts)
    sha256, index_sha256 = hashlib.sha256(content).hexdigest(), hashlib.sha256(index).hexdigest()
    index_name = name.removesuffix(".tar") + ".index.json"
    shard = Shard(name, len(content), sha256, stop - start, index_name, index_sha256)
    storage.write(shard.name, content)
    storage.write(shard.index_name, index)
    return shard


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def _remove_leftovers(storage: Storage, contents: Manifest) -> None:
    """Shards of an earlier, killed run with smaller shards: tools that go by names would read them too."""
    wanted = {name for shards in contents.splits.values() for shard in shards for name in (shard.name, shard.index_name)}
    pattern = re.compile(rf"({'|'.join(contents.splits)})/\d{{5,}}\.(tar|index\.json)")
    storage.delete(key for key in storage.list() if key not in wanted and pattern.fullmatch(key))


if __name__ == "__main__":
    from pipeline.cli import main

    main("shard")
