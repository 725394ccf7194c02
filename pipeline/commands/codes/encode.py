"""``vlae encode``: the code of every image of a split, as Parquet."""

from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.evaluation import A_MODEL, ANOTHER_DATA_SET, MODEL_NAME
from pipeline.config.options import option, section
from pipeline.config.sections import ClusterOptions, RegistryOptions, StorageOptions
from pipeline.values import JsonObject


@dataclass
class EncodeConfig:
    """Encode a data set in parallel: the code of every image as Parquet.

    The same command resumes an interrupted one.
    """

    model: str = option(A_MODEL)
    split: str = option("the part of the data set: train, valid or test", "train")
    dataset_url: str | None = option(ANOTHER_DATA_SET, None, path=True)
    output: str = option("where the codes go", f"outputs/encode/{MODEL_NAME}", path=True)
    images_per_part: int = option(
        "the most images in one Parquet file; one task encodes it", 10_000, at_least=1
    )
    seed: int = option("the seed of binarization and of the sample that measures the rate", 0)
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")


def run(config: EncodeConfig) -> JsonObject:
    """Encode a split. Returns what was written; complete codes are reused.

    Raises UserError if the model, the data set or the split does not exist, the images have
    another shape, or ``config.output`` holds other codes.
    """
    from pipeline.cluster import connect
    from pipeline.evaluation.encoding import encode_split
    from pipeline.registry.models import open_model
    from pipeline.runs import open_data
    from pipeline.storage import open_storage

    model = open_model(config.model, config.registry, config.storage)
    data = open_data(model, config.dataset_url, config.storage)
    return encode_split(
        model,
        data,
        open_storage(config.output, config.storage.endpoint_url),
        config.split,
        config.seed,
        config.images_per_part,
        config.cluster.use_gpu,
        lambda: connect(config.cluster, config.storage),
    )


def format_result(config: EncodeConfig, result: JsonObject) -> str:
    """The number of codes, and their address."""
    how = "existed already" if result["reused"] else "written"
    return (
        f"codes of {result['images']:,} {config.split} images {how}: {len(result['parts'])} "
        f"Parquet files in {result['url']}/codes"
    )


COMMAND = Command(EncodeConfig, run, format_result, lambda config: config.output, resumes=True)
