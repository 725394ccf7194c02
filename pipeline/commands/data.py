"""``vlae data inspect``: what is in a data set, at a glance. ``vlae data verify``: whether every
byte of it is what it was.
"""

from collections import Counter
from dataclasses import dataclass
from enum import Enum

import numpy as np
from tqdm import tqdm

from pipeline import cluster
from pipeline.commands import Command
from pipeline.config.options import option, section
from pipeline.config.sections import ClusterOptions, DatasetOptions, StorageOptions
from pipeline.data import manifest, tar
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Manifest
from pipeline.data.reader import Reader, Rows
from pipeline.data.records import Index
from pipeline.errors import UserError
from pipeline.evaluation import pictures
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.storage.pieces import Counted, Pieces
from pipeline.values import JsonObject


class Action(Enum):
    inspect = "inspect"
    verify = "verify"


@dataclass
class DataConfig:
    """Look at a data set (inspect), or re-read and check every byte of it (verify)."""

    action: Action = option("inspect or verify; the first word after the command")
    output: str = option("where the report goes", "outputs/data", path=True)
    pictures: int = option("how many images of each split the contact sheet shows", 50, at_least=1)
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    dataset: DatasetOptions = section(DatasetOptions, "the data set")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")


LABELS = 10_000
"""Images of each split whose labels are counted."""


def run(config: DataConfig) -> JsonObject:
    """Inspect or verify the data set at ``dataset.url``. Returns what was found, as JSON values."""
    storage = open_storage(config.dataset.url, config.storage.endpoint_url)
    contents = manifest.load(storage)
    found = {
        "url": storage.url,
        "name": contents.name,
        "encoding": contents.encoding,
        **manifest.summary(contents),
    }
    return found | (
        _inspect(storage, contents, config)
        if config.action is Action.inspect
        else _verify(storage, contents, config)
    )


def _inspect(storage: Storage, contents: Manifest, config: DataConfig) -> JsonObject:
    output = open_storage(config.output)
    classes, made = {}, []
    for split in contents.splits:
        loader = EvalLoader(storage, contents, split=split, batch_size=500, num_images=LABELS)
        labels, shown = [], None
        for batch in loader:
            shown = batch.images if shown is None else shown
            labels.append(batch.labels.numpy())
        counts = Counter(label for part in labels for label in part.tolist())
        classes[split] = {str(label): counts[label] for label in sorted(counts)}
        if shown is not None:
            sheet = pictures.contact_sheet(
                shown[: config.pictures].float() / 255,
                f"{contents.name}, {split}: the first images.",
            )
            output.write(f"{split}.png", sheet)
            made.append(f"{output.url}/{split}.png")
    return {"classes": classes, "labels_counted": LABELS, "pictures": made}


def _verify(storage: Storage, contents: Manifest, config: DataConfig) -> JsonObject:
    """Every shard by a Ray task: all of them, so that all that is damaged is known at once."""
    cluster.connect(config.cluster, config.storage)
    calls = [
        (storage, contents, split, number)
        for split, shards in contents.splits.items()
        for number in range(len(shards))
    ]
    damaged, checked = [], 0
    with tqdm(total=len(calls), desc="verifying", unit=" shards", mininterval=1.0) as progress:
        for name, size, reason in cluster.in_tasks(verify_shard, calls):
            checked += size
            damaged += [{"shard": name, "reason": reason}] if reason else []
            progress.update()
    return {
        "shards_checked": len(calls),
        "bytes_checked": checked,
        "damaged": sorted(damaged, key=lambda item: item["shard"]),
    }


def verify_shard(
    storage: Storage, contents: Manifest, split: str, number: int
) -> tuple[str, int, str | None]:
    """A shard's name, how many bytes were read, and what is wrong with it, if anything is, with a
    record that shows it.
    """
    shard, reader, altered = contents.shards(split)[number], Reader(storage, contents, split), ""
    try:
        place, key = reader.place(shard)
        passing = Counted(place.stream(key))
        for _ in tar.members(Pieces(passing), max(shard.size, 1)):
            pass
        passing.finish()
        if (passing.size, passing.sha256) != (shard.size, shard.sha256):
            altered = (
                f"it has {passing.size} bytes and sha256 {passing.sha256}, not {shard.size} and"
                f" {shard.sha256}"
            )
        if int(Index.load(storage, shard).starts[-1]) != shard.num_samples:
            return shard.name, passing.size, "its index holds another number of samples"
        step = max(1, (16 << 20) // reader.image_bytes)  # decoded, a part at a time
        for start in range(0, shard.num_samples, step):
            stop = min(start + step, shard.num_samples)
            reader.fill(
                Rows.of(stop - start, contents.image_shape), np.array([[number, start, stop]])
            )
    except (UserError, tar.BadTar) as error:
        return shard.name, 0, "; ".join(filter(None, [altered, str(error)]))
    return shard.name, passing.size, altered or None


def format_result(config: DataConfig, result: JsonObject) -> str:
    """What a person wants to know."""
    channels, height, width = result["image_shape"]
    lines = [
        f"{result['name']}: {width} x {height}, {channels} channels, {result['bytes'] / 1e6:,.1f}"
        f" MB as {result['encoding']}"
    ]
    for split, counts in result["splits"].items():
        line = f"  {split:<6}{counts['images']:>12,} images in {_shards(counts['shards'])}"
        classes = result.get("classes", {}).get(split)
        lines.append(line + (f"; {_balance(classes)}" if classes else ""))
    if config.action is Action.verify:
        lines.append(
            f"checked {_shards(result['shards_checked'])}, {result['bytes_checked'] / 1e6:,.1f} MB:"
            f" {len(result['damaged'])} damaged"
        )
        lines += [f"  {item['shard']}: {item['reason']}" for item in result["damaged"][:20]]
    return "\n".join(lines + [f"picture: {url}" for url in result.get("pictures", [])])


def _shards(number: int) -> str:
    return f"{number:,} shard{'' if number == 1 else 's'}"


def _balance(classes: dict[str, int]) -> str:
    if set(classes) == {"-1"}:
        return "no labels"
    total = sum(classes.values())
    least, most = (
        min(classes, key=lambda label: classes[label]),
        max(classes, key=lambda label: classes[label]),
    )
    return (
        f"{len(classes)} classes, from {classes[least] / total:.1%} (class {least}) to"
        f" {classes[most] / total:.1%} (class {most}) of the first {total:,}"
    )


def _problem(result: JsonObject) -> str | None:
    if not result.get("damaged"):
        return None
    return (
        f"{len(result['damaged'])} shards of {result['url']} are damaged: see result.json for all"
    )


COMMAND = Command(
    DataConfig,
    run,
    format_result,
    lambda config: config.output,
    _problem,
    usage="vlae data inspect | verify [key=value ...]",
    actions=tuple(Action.__members__),
)
