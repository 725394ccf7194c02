"""``vlae index``: write a manifest for existing WebDataset shards, without copying them."""

from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.commands.images.shard import describe
from pipeline.config.options import section
from pipeline.config.sections import ClusterOptions, DatasetOptions, IndexOptions, StorageOptions
from pipeline.values import JsonObject


@dataclass
class IndexConfig:
    """Write a manifest for existing WebDataset shards, without copying them."""

    storage: StorageOptions = section(StorageOptions, "where data is stored")
    dataset: DatasetOptions = section(DatasetOptions, "the data set that they become")
    index: IndexOptions = section(IndexOptions, "the shards, and how they are read")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")


def run(config: IndexConfig) -> JsonObject:
    """Write the manifest, unless it exists. Returns a summary of the data set.

    Raises UserError if a shard cannot be read or is unsafe, or the manifest exists but was made
    from other shards or options.
    """
    from pipeline.data.indexing import write_manifest

    return write_manifest(config.dataset, config.index, config.cluster, config.storage)


def format_result(config: IndexConfig, result: JsonObject) -> str:
    """What the images are, the splits, and the account of all that was found."""
    from pipeline.data.sources.account import format_account

    how = "exists already" if result["reused"] else "indexed"
    lines = [f"data set {config.dataset.name} {how}: {describe(result)}"]
    if result["report"]:
        lines += format_account(result["report"])
        lines.append(f"account: {result['url']}/report.json")
    return "\n".join(lines)


COMMAND = Command(IndexConfig, run, format_result, lambda config: config.dataset.url, resumes=True)
