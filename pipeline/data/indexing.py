"""A manifest for existing WebDataset shards, which stay where they are and are not rewritten.

A Ray task reads each shard once: its size and sha256, and the offset, size, checksum and label of
every image. Only the manifest and these indices are written; the shards may be in a read-only
bucket or on the web.
"""

import hashlib
import re
from dataclasses import asdict
from typing import Any

from braceexpand import braceexpand
from tqdm import tqdm

from pipeline import cluster
from pipeline.config.sections import (
    ClusterOptions,
    DatasetOptions,
    IndexOptions,
    StorageOptions,
)
from pipeline.data import images, manifest
from pipeline.data.journal import Journal
from pipeline.data.manifest import Manifest, Shard
from pipeline.data.records import Index, checksum
from pipeline.data.sources.base import SPLITS, hash_fraction
from pipeline.data.sources.members import read_samples
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.storage.pieces import Counted, Pieces
from pipeline.values import JsonObject

MAX_RANGE = 10**7
"""Numbers that one range of a pattern may hold: more is a mistake, and would fill the memory."""


def write_manifest(
    dataset: DatasetOptions, options: IndexOptions, workers: ClusterOptions, place: StorageOptions
) -> JsonObject:
    """Write the manifest that the options name, unless it exists. Returns a summary of it.

    Raises UserError if a shard cannot be read or is unsafe, or the manifest exists but was made
    from other shards or options.
    """
    storage = open_storage(dataset.url, place.endpoint_url)
    splits = find_shards(options, place.endpoint_url)
    listed = hashlib.sha256(
        "\n".join(f"{split} {url}" for split in splits for url in splits[split]).encode()
    ).hexdigest()
    recipe = {"source": "index", "shards": listed} | {
        name: getattr(options, name)
        for name in ("image_size", "channels", "label_key", "max_megapixels")
    }
    recipe["fit"] = options.fit.value
    contents = manifest.load_made_by(storage, recipe)
    reused = contents is not None
    if contents is None:
        cluster.connect(workers, place)
        contents = _index_all(dataset.name, options, storage, splits, recipe)
        contents.publish(storage)
        Journal(storage, recipe).clear()
    return {"url": storage.url, "reused": reused, **manifest.summary(contents)}


def find_shards(options: IndexOptions, endpoint_url: str | None) -> dict[str, list[str]]:
    """The addresses of the shards of each split.

    Where ``valid`` or ``test`` has no pattern, it gets whole shards of ``train``, chosen by the
    hash of their names.
    """
    found = {
        split: expand(getattr(options, split), endpoint_url)
        for split in SPLITS
        if getattr(options, split)
    }
    fractions = {"test": options.test_fraction, "valid": options.valid_fraction}
    for split in [split for split in fractions if split not in found]:
        chosen = [
            url
            for url in found["train"]
            if hash_fraction(f"{split} {url.rpartition('/')[2]}") < fractions[split]
        ]
        found["train"] = [url for url in found["train"] if url not in set(chosen)]
        found[split] = chosen
    for split, urls in found.items():
        if not urls:
            raise UserError(
                f"there are no shards for {split}; name some with index.{split}=, or change"
                f" index.{split}_fraction"
            )
    return {split: found[split] for split in SPLITS}


def expand(pattern: str, endpoint_url: str | None) -> list[str]:
    """The addresses that a pattern stands for: a folder is all tars below it, and braces are
    expanded as in a shell, ``{000..123}`` and ``{a,b}``.

    Raises UserError for a range that is too long or runs downwards, and where nothing is found.
    """
    if not pattern.endswith(".tar"):
        place = open_storage(pattern, endpoint_url)
        found = [f"{place.url}/{key}" for key in place.list() if key.endswith(".tar")]
        if not found:
            raise UserError(f"there are no .tar files at {pattern}")
        return found
    for span in re.finditer(r"\{(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?\}", pattern):
        first, last = int(span[1]), int(span[2])
        if last < first or last - first > MAX_RANGE:
            raise UserError(f"{pattern}: {span[0]} is no range of numbers")
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        raise UserError(f"{pattern}: its braces do not match") from None


def _index_all(
    name: str,
    options: IndexOptions,
    storage: Storage,
    splits: dict[str, list[str]],
    recipe: JsonObject,
) -> Manifest:
    journal = Journal(storage, recipe | {"version": manifest.VERSION})
    finished = journal.finished()
    jobs = [
        (split, f"{split}-{number:06d}", url)
        for split in splits
        for number, url in enumerate(splits[split])
    ]
    waiting = [job for job in jobs if job[1] not in finished]
    with tqdm(
        total=len(jobs),
        initial=len(jobs) - len(waiting),
        desc="indexing",
        unit=" shards",
        mininterval=1.0,
    ) as progress:
        for _ in cluster.in_tasks(
            index_shard, ((storage, journal, job, url, options) for _, job, url in waiting)
        ):
            progress.update()
    found = [journal.read(job) for _, job, _ in jobs]
    shards = {
        split: [
            Shard(**each["shard"]) for each, job in zip(found, jobs, strict=True) if job[0] == split
        ]
        for split in splits
    }
    for split in splits:
        if not sum(shard.num_samples for shard in shards[split]):
            raise UserError(f"the shards for {split} hold no images")
    labels = max(each["largest_label"] for each in found)
    return Manifest(
        name=name,
        image_shape=(options.channels, *_image_size(options, found)),
        num_classes=labels + 1 if labels >= 0 else None,
        block_size=1,
        splits={split: manifest.paginate(storage, split, shards[split]) for split in splits},
        source=recipe,
        encoding="image",
        fit=options.fit.value if options.image_size else None,
    )


def _image_size(options: IndexOptions, found: list[Any]) -> tuple[int, int]:
    """The height and width to which the loader brings all images."""
    if options.image_size is not None:
        return options.image_size, options.image_size
    sizes = {
        tuple(size): f"{key} in {each['shard']['name']}"
        for each in found
        for *size, key in each["sizes"]
    }
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise UserError(
            f"{first} is {one[1]} x {one[0]}, but {second} is {other[1]} x {other[0]}; "
            "set index.image_size to bring all to one size as they are read"
        )
    ((height, width),) = sizes
    return int(height), int(width)


def index_shard(
    storage: Storage, journal: Journal, name: str, url: str, options: IndexOptions
) -> None:
    """Read one shard, and write its index, then its entry in the journal."""
    folder, _, key = url.rpartition("/")
    passing = Counted(storage.elsewhere(folder).stream(key))
    columns: dict[str, list[Any]] = {
        column: [] for column in ("offset", "size", "checksum", "labels", "keys")
    }
    sizes: dict[tuple[int, int], str] = {}
    for sample in read_samples(url, Pieces(passing), options.label_key):
        try:
            size = images.measure(sample.content, int(options.max_megapixels * 1e6))
        except images.BadImage as error:
            raise UserError(
                f"{url}: the image of sample {sample.key!r} cannot be used: {error}"
            ) from None
        if len(sizes) < 2:
            sizes.setdefault(size, sample.key)
        row = (
            sample.offset,
            len(sample.content),
            checksum(sample.content),
            sample.label,
            sample.key,
        )
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    passing.finish()
    index = Index.to_bytes(**columns)
    index_name = f"index/{name}.json"
    storage.write(index_name, index)
    shard = Shard(
        url,
        passing.size,
        passing.sha256,
        len(columns["offset"]),
        index_name,
        hashlib.sha256(index).hexdigest(),
    )
    journal.write(
        name,
        {
            "shard": asdict(shard),
            "sizes": [[*size, key] for size, key in sizes.items()],
            "largest_label": max(columns["labels"], default=-1),
        },
    )
