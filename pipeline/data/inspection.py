"""Looking into a data set: its labels and first images, and whether every byte is intact."""

from collections import Counter

import numpy as np
import torch

from pipeline import cluster
from pipeline.config.sections import ClusterOptions, StorageOptions
from pipeline.data import tar
from pipeline.data.dataset import DataSet
from pipeline.data.loader import EvalLoader
from pipeline.data.reader import Reader, Rows
from pipeline.data.records import Index
from pipeline.errors import UserError
from pipeline.progress import progress_bar
from pipeline.storage.pieces import Counted, Pieces
from pipeline.values import JsonObject

LABELS = 10_000
"""Images of each split whose labels are counted."""
BATCH = 500
DECODED = 16 << 20
"""Bytes of images that ``verify_shard`` holds decoded at once."""


def look(data: DataSet, split: str) -> tuple[dict[str, int], torch.Tensor | None]:
    """The number of images of each label among the first ``LABELS`` of a split, and its first
    images, uint8 ``(BATCH, channels, height, width)``; None if the split is empty.
    """
    counts, first = Counter[int](), None
    for batch in EvalLoader(data, split=split, batch_size=BATCH, num_images=LABELS):
        first = batch.images if first is None else first
        counts.update(batch.labels.tolist())
    return {str(label): counts[label] for label in sorted(counts)}, first


def verify(data: DataSet, workers: ClusterOptions, place: StorageOptions) -> JsonObject:
    """Read and check every byte of every shard, in Ray tasks.

    Damage does not end the check: all damaged shards are reported at once.
    """
    cluster.connect(workers, place)
    calls = [
        (data, split, number)
        for split, shards in data.manifest.splits.items()
        for number in range(len(shards))
    ]
    damaged, checked = [], 0
    with progress_bar(len(calls), "verifying", unit="shards") as bar:
        for name, size, reason in cluster.in_tasks(verify_shard, calls):
            checked += size
            damaged += [{"shard": name, "reason": reason}] if reason else []
            bar.update()
    return {
        "shards_checked": len(calls),
        "bytes_checked": checked,
        "damaged": sorted(damaged, key=lambda item: item["shard"]),
    }


def verify_shard(data: DataSet, split: str, number: int) -> tuple[str, int, str | None]:
    """Check one shard: its size and sha256, its index, and every record by decoding it.

    Returns its name, the number of bytes read, and what is wrong with it, with the record at fault
    if it can be found; None if nothing is.
    """
    shard, reader, altered = data.manifest.shards(split)[number], Reader(data, split), ""
    try:
        place, key = reader.locate(shard)
        passing = Counted(place.stream(key))
        for _ in tar.members(Pieces(passing), max(shard.size, 1)):
            pass
        passing.finish()
        if (passing.size, passing.sha256) != (shard.size, shard.sha256):
            altered = (
                f"it has {passing.size} bytes and sha256 {passing.sha256}, not {shard.size} and"
                f" {shard.sha256}"
            )
        if int(Index.load(data.storage, shard).starts[-1]) != shard.num_samples:
            return shard.name, passing.size, "its index holds another number of samples"
        step = max(1, DECODED // reader.image_bytes)
        for start in range(0, shard.num_samples, step):
            stop = min(start + step, shard.num_samples)
            rows = Rows.empty(stop - start, data.manifest.image_shape)
            reader.read_into(rows, np.array([[number, start, stop]]))
    except (UserError, tar.BadTar) as error:
        return shard.name, 0, "; ".join(filter(None, [altered, str(error)]))
    return shard.name, passing.size, altered or None
