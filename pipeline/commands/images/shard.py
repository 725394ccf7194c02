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
    """What the images are, the splits, and the account of all that was found."""
    from pipeline.data.sources.account import format_account

    report = result["report"]
    how = "exists already" if result["reused"] else "written"
    lines = [f"data set {config.dataset.name} {how}: {describe(result)}"]
    lines += format_account(report)
    if report["duplicates"]:
        across = ", ".join(
            f"{count:,} of {splits}" for splits, count in report["duplicates_across_splits"].items()
        )
        number = report["duplicates"]
        found = "1 duplicate" if number == 1 else f"{number:,} duplicates"
        lines.append(found + (f", among them {across}" if across else ""))
    return "\n".join([*lines, f"account: {result['url']}/report.json"])


def describe(result: JsonObject) -> str:
    """The shape, kind and number of a data set's images: ``3 x 32 x 32, 256 values; 90 train``."""
    shape = " x ".join(map(str, result["image_shape"]))
    kind = "black and white" if result["pixels"] == "binary" else "256 values"
    if result["binarization"] != "none" and result["pixels"] != "binary":
        kind += f", binarized ({result['binarization']})"
    counts = ", ".join(f"{split['images']:,} {name}" for name, split in result["splits"].items())
    return f"{shape}, {kind}; {counts} images"


COMMAND = Command(ShardConfig, run, format_result, lambda config: config.dataset.url, resumes=True)
