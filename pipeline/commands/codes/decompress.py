"""``vlae decompress``: the images of a compressed file, as a data set."""

from dataclasses import dataclass
from enum import Enum

from pipeline.commands import Command
from pipeline.config.evaluation import A_MODEL, MODEL_NAME
from pipeline.config.options import option, section
from pipeline.config.sections import ClusterOptions, RegistryOptions, StorageOptions
from pipeline.values import JsonObject


class Draw(Enum):
    sample = "sample"
    mode = "mode"


@dataclass
class DecompressConfig:
    """Give back the images of a compressed file, bit for bit; or redraw those of a lossy one."""

    model: str = option(A_MODEL)
    file: str = option("the file that `vlae compress` wrote, or its storage address", path=True)
    output: str = option("where the data set goes", f"outputs/decompress/{MODEL_NAME}", path=True)
    draw: Draw = option(
        "how a lossy file's images are redrawn: sample, from p(x|z) with the file's seed; or mode,"
        " each pixel the most likely one",
        Draw.sample,
    )
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")


def run(config: DecompressConfig) -> JsonObject:
    """Decompress a file to a data set. Returns what was written.

    Raises UserError if the model or the file does not exist, another model or another kind of
    machine wrote the file, or it is damaged.
    """
    from pipeline.cluster import connect
    from pipeline.coding.compression import decompress
    from pipeline.registry.models import open_model
    from pipeline.storage import open_storage

    model = open_model(config.model, config.registry, config.storage)
    folder, _, key = config.file.rpartition("/")
    return decompress(
        model,
        open_storage(folder or "/", config.storage.endpoint_url),
        key,
        open_storage(config.output, config.storage.endpoint_url),
        most_likely=config.draw is Draw.mode,
        connect=lambda: connect(config.cluster, config.storage),
    )


def format_result(config: DecompressConfig, result: JsonObject) -> str:
    """The number of images, and where they are."""
    how = "redrawn" if result["lossy_bits"] else "given back bit for bit"
    return f"{result['images']:,} {result['split']} images {how}: data set {result['url']}"


COMMAND = Command(DecompressConfig, run, format_result, lambda config: config.output)
