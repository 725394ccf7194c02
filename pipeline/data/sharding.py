"""Images to WebDataset shards and a manifest, written by Ray tasks in parallel.

Shards are written first, under their final names, each with an entry in a journal; the manifest is
written last. A run that is killed leaves no data set, and the next run with the same images and
options continues after the finished shards. A task holds one shard in memory. Equal images and
options give equal bytes.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import ray

from pipeline import cluster
from pipeline.config.options import digest
from pipeline.config.sections import (
    ClusterOptions,
    DatasetOptions,
    Encoding,
    ShardOptions,
    StorageOptions,
)
from pipeline.data import manifest
from pipeline.data.images import BadImage
from pipeline.data.journal import Journal
from pipeline.data.manifest import Manifest
from pipeline.data.records import Shard
from pipeline.data.sources import open_source
from pipeline.data.sources.account import REPORT_KEY
from pipeline.data.sources.base import ImageSource
from pipeline.data.writer import write_images
from pipeline.errors import UserError
from pipeline.progress import progress_bar
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.values import JsonObject

SMALL = 64 * 64 * 3
"""Bytes of an image, up to which a block of raw pixels is read faster than image files are."""
EXAMPLES = 1000
"""Duplicates that the report lists."""


def write_data_set(
    dataset: DatasetOptions, options: ShardOptions, workers: ClusterOptions, place: StorageOptions
) -> JsonObject:
    """Write the data set that the options name, unless it exists. Returns a summary of it.

    Raises UserError if the images cannot be read, or the data set exists but was made from other
    images or options.
    """
    storage = open_storage(dataset.url, place.endpoint_url)
    source = open_source(dataset, options, place.endpoint_url)
    recipe = {
        **source.description,
        "samples_per_shard": options.samples_per_shard,
        "block_size": options.block_size,
        "encoding": options.encoding.value,
        "binarization": dataset.binarization.value,
    }
    contents = _load_if_whole(storage, recipe)
    reused = contents is not None
    if contents is None:
        cluster.connect(workers, place)
        contents = _write(storage, source, dataset, options, recipe)
    report = storage.read_json(REPORT_KEY)
    return {"url": storage.url, "reused": reused, **manifest.summary(contents), "report": report}


def _write(
    storage: Storage,
    source: ImageSource,
    dataset: DatasetOptions,
    options: ShardOptions,
    recipe: JsonObject,
) -> Manifest:
    """Write the data set and publish its manifest, which is returned."""
    source.prepare()
    asked = dataset.binarization, source.binarization
    manifest.chosen_binarization(*asked, source.image_shape, False)  # refused before any compute
    encoding = options.encoding
    if encoding is Encoding.auto:
        encoding = Encoding.npy if np.prod(source.image_shape) <= SMALL else Encoding.png
    block_size = options.block_size if encoding is Encoding.npy else 1
    journal = Journal(storage, recipe | {"version": manifest.VERSION})
    jobs = list(_jobs(source.splits, options.samples_per_shard, digest(recipe)))
    done = _write_all(storage, source, journal, jobs, options, block_size, encoding)
    # Pixels of two values are black and white in grey images alone: pure colours have them, too.
    is_binary = source.image_shape[0] == 1 and all(made["binary"] for made in done.values())
    contents = Manifest(
        name=dataset.name,
        image_shape=source.image_shape,
        num_classes=source.num_classes,
        block_size=block_size,
        splits={
            split: tuple(Shard(**done[job]["shard"]) for job in jobs if job.split == split)
            for split in source.splits
        },
        source=recipe,
        encoding="npy" if encoding is Encoding.npy else "image",
        pixels="binary" if is_binary else "values",
        binarization=manifest.chosen_binarization(*asked, source.image_shape, is_binary),
        class_names=source.class_names,
    )
    try:
        contents.publish(storage)
    except UserError:
        _remove_leftovers(storage, manifest.load(storage))
        journal.clear()
        raise
    storage.write_json(REPORT_KEY, _report(source, done))
    _remove_leftovers(storage, contents)
    journal.clear()
    return contents


def _load_if_whole(storage: Storage, recipe: JsonObject) -> Manifest | None:
    """The data set in ``storage`` if it exists, is whole, and was made by ``recipe``."""
    contents = manifest.load_made_by(storage, recipe)
    if contents is None:
        return None
    sizes = storage.sizes()
    shards = [shard for split in contents.splits.values() for shard in split]
    whole = REPORT_KEY in sizes and all(
        sizes.get(shard.name) == shard.size and shard.index_name in sizes for shard in shards
    )
    return contents if whole else None


@dataclass(frozen=True)
class Job:
    """One shard to be written: samples ``start`` to ``stop`` of a split."""

    recipe: str
    """Hex digits of the recipe: two commands with other options do not write the same files."""
    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:05d}-{self.recipe}.tar"

    @property
    def entry(self) -> str:
        return f"{self.split}-{self.number:05d}"


def _write_all(
    storage: Storage,
    source: ImageSource,
    journal: Journal,
    jobs: list[Job],
    options: ShardOptions,
    block_size: int,
    encoding: Encoding,
) -> dict[Job, JsonObject]:
    """Write the shards that the journal does not have yet, one Ray task each.

    Returns the journal's entry of each. Raises UserError if too many images cannot be read.
    """
    finished, sizes = journal.finished(), storage.sizes()
    done = {job: journal.read(job.entry) for job in jobs if job.entry in finished}
    done = {
        job: made
        for job, made in done.items()
        if made and sizes.get(job.name) == made["shard"]["size"]
    }
    waiting = [job for job in jobs if job not in done]

    @lru_cache
    def whole() -> Any:
        return ray.put(source)

    def needed(job: Job) -> Any:
        part = source.part(job.split, job.start, job.stop)
        return whole() if part is source else part

    unreadable = sum(len(made["unreadable"]) for made in done.values())
    total, behind = sum(source.splits.values()), sum(job.stop - job.start for job in waiting)
    with progress_bar(total, "sharding", initial=total - behind) as bar:
        calls = (
            (storage, needed(job), journal, job, block_size, encoding, options.max_unreadable)
            for job in waiting
        )
        for job, made in cluster.in_tasks(write_job, calls):
            done[job] = made
            unreadable += len(made["unreadable"])
            bar.update(job.stop - job.start)
            if unreadable > options.max_unreadable:
                break
    if unreadable > options.max_unreadable:
        storage.write_json(REPORT_KEY, _report(source, done))
        raise UserError(
            f"{unreadable} images cannot be read, more than"
            f" shard.max_unreadable={options.max_unreadable}: {storage.url}/{REPORT_KEY} lists"
            " them; mend or remove them, or allow more"
        )
    return done


def _report(source: ImageSource, done: dict[Job, JsonObject]) -> JsonObject:
    """What ``report.json`` holds: the source's account, what could not be read, duplicates."""
    jobs = sorted(done, key=lambda job: (list(source.splits).index(job.split), job.number))
    unreadable = [
        {"image": source.key(job.split, number), "reason": why}
        for job in jobs
        for number, why in done[job]["unreadable"]
    ]
    digests = np.concatenate(
        [np.frombuffer(bytes.fromhex(done[job]["digests"]), dtype="<u8") for job in jobs]
    )
    ends = np.cumsum([job.stop - job.start for job in jobs])

    def place(position: np.int64) -> tuple[str, int]:
        number = int(np.searchsorted(ends, position, side="right"))
        return jobs[number].split, jobs[number].stop - int(ends[number] - position)

    order = np.argsort(digests, kind="stable")
    equal = np.flatnonzero((digests[order][1:] == digests[order][:-1]) & (digests[order][1:] != 0))
    splits = np.array([list(source.splits).index(job.split) for job in jobs])
    split_of = splits[np.searchsorted(ends, order, side="right")]
    across = Counter[str]()
    for one, other in zip(split_of[equal].tolist(), split_of[equal + 1].tolist(), strict=True):
        if one != other:
            across[" and ".join(list(source.splits)[each] for each in (one, other))] += 1
    examples = [(place(order[i]), place(order[i + 1])) for i in equal[:EXAMPLES]]
    source.account.unusable([each["image"] for each in unreadable])
    return {
        **source.account.to_json(source.class_names, source.num_classes),
        "unreadable": unreadable,
        "duplicates": len(equal),
        "duplicates_across_splits": dict(across),
        "examples_of_duplicates": [
            [source.key(*one), source.key(*other)] for one, other in examples
        ],
    }


def _jobs(splits: dict[str, int], samples_per_shard: int, recipe: str) -> Iterator[Job]:
    """All shards, in the order of the manifest."""
    for split, count in splits.items():
        for number, start in enumerate(range(0, count, samples_per_shard)):
            yield Job(recipe, split, number, start, min(start + samples_per_shard, count))


def write_job(
    storage: Storage,
    source: ImageSource,
    journal: Journal,
    job: Job,
    block_size: int,
    encoding: Encoding,
    max_unreadable: int,
) -> tuple[Job, JsonObject]:
    """Write one shard and its index, then its entry in the journal, which is also returned."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    unreadable: list[tuple[int, str]] = []
    names = source.names(job.split, job.start, job.stop)
    keys: list[str] = []
    digests, is_binary = b"", True
    for number, (pixels, label) in enumerate(
        source.examine(job.split, job.start, job.stop), job.start
    ):
        if isinstance(pixels, BadImage):
            if not max_unreadable:
                raise source.unreadable(job.split, number, pixels)
            unreadable.append((number, str(pixels)))
            digests += bytes(8)
        else:
            images.append(pixels)
            labels.append(label)
            if names is not None:
                keys.append(names[number - job.start])
            is_binary = is_binary and bool(((pixels == 0) | (pixels == 255)).all())
            digests += hashlib.blake2b(pixels.tobytes(), digest_size=8).digest()
    named = keys if names is not None else None
    shard = write_images(
        storage,
        job.name,
        job.start,
        images,
        np.array(labels, dtype=np.int64),
        block_size,
        encoding,
        named,
    )
    made = {
        "shard": asdict(shard),
        "unreadable": unreadable,
        "digests": digests.hex(),
        "binary": is_binary,
    }
    journal.write(job.entry, made)
    return job, made


def _remove_leftovers(storage: Storage, contents: Manifest) -> None:
    """Delete the shards of killed commands, and of any that were slower than this one.

    Tools that find shards by their names would read them too.
    """
    wanted = {
        name
        for shards in contents.splits.values()
        for shard in shards
        for name in (shard.name, shard.index_name)
    }
    pattern = re.compile(
        rf"({'|'.join(contents.splits)})/\d{{5,}}-[0-9a-f]{{8}}\.(tar|index\.json)"
    )
    storage.delete(key for key in storage.list() if key not in wanted and pattern.fullmatch(key))
