"""``vlae data``: inspect a data set, or verify every byte of it."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from pipeline.commands import Command
from pipeline.config.options import option, section
from pipeline.config.sections import ClusterOptions, DatasetOptions, StorageOptions
from pipeline.values import JsonObject

if TYPE_CHECKING:
    from pipeline.data import DataSet


class Action(Enum):
    inspect = "inspect"
    verify = "verify"


@dataclass
class DataConfig:
    """Inspect a data set, or verify every byte of it."""

    action: Action = option("inspect or verify; the first word after the command")
    output: str = option("where the report goes", "outputs/data/${dataset.name}", path=True)
    pictures: int = option(
        "how many images of each split the contact sheet shows", 50, at_least=1, below=1 << 14
    )
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    dataset: DatasetOptions = section(DatasetOptions, "the data set")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")


def run(config: DataConfig) -> JsonObject:
    """Inspect or verify the data set at ``dataset.url``. Returns what was found, as JSON values."""
    from pipeline.data import DataSet, manifest

    data = DataSet.open(config.dataset.url, config.storage.endpoint_url)
    found = {
        "url": data.storage.url,
        "name": data.manifest.name,
        "encoding": data.manifest.encoding,
        **manifest.summary(data.manifest),
    }
    if config.action is Action.inspect:
        return found | _inspect(data, config)
    from pipeline.data.inspection import verify

    return found | verify(data, config.cluster, config.storage)


def _inspect(data: "DataSet", config: DataConfig) -> JsonObject:
    """Count the labels of each split, and draw a contact sheet of its first images."""
    from pipeline.data.inspection import LABELS, look
    from pipeline.evaluation import pictures
    from pipeline.storage import open_storage

    output, classes, drawn = open_storage(config.output), {}, []
    for split in data.manifest.splits:
        classes[split], images = look(data, split)
        if images is not None:
            title = f"{data.manifest.name}, {split}: the first images."
            sheet = pictures.contact_sheet(images[: config.pictures].float() / 255, title)
            output.write(f"{split}.png", sheet)
            drawn.append(f"{output.url}/{split}.png")
    return {"classes": classes, "labels_counted": LABELS, "pictures": drawn}


def format_result(config: DataConfig, result: JsonObject) -> str:
    """The sizes of the splits, their classes, and the damaged shards."""
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
