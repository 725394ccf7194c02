"""``vlae shard``: write images to WebDataset shards with a manifest."""

from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.options import section
from pipeline.config.sections import ClusterOptions, DatasetOptions, ShardOptions, StorageOptions
from pipeline.values import JsonObject


@dataclass
class ShardConfig:
    """Write images to WebDataset shards with a manifest."""

    storage: StorageOptions = section(StorageOptions, "where data is stored")
    dataset: DatasetOptions = section(DatasetOptions, "the images")
    shard: ShardOptions = section(ShardOptions, "how they are written")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")


def run(config: ShardConfig) -> JsonObject:
    """Write the data set, unless it exists. Returns a summary of it.

    Raises UserError if the images cannot be read, or the data set exists but was made from other
    images or options.
    """
    from pipeline.data.sharding import write_data_set

    return write_data_set(config.dataset, config.shard, config.cluster, config.storage)


def format_result(config: ShardConfig, result: JsonObject) -> str:
    """The number of images of each split, and where unreadable ones and duplicates are listed."""
    counts = ", ".join(f"{split['images']:,} {name}" for name, split in result["splits"].items())
    how = "was there already" if result["reused"] else "written"
    lines = [f"data set {config.dataset.name} {how}: {counts} images"]
    if result["unreadable"] or result["duplicates"]:
        lines.append(
            f"{result['unreadable']:,} unreadable, {result['duplicates']:,} duplicates: "
            f"see {result['url']}/report.json"
        )
    return "\n".join(lines)


COMMAND = Command(ShardConfig, run, format_result, lambda config: config.dataset.url)
