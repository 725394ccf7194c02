"""``vlae compress``: a split as a file, as long as the model's bound says."""

import math
from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.evaluation import A_MODEL, ANOTHER_DATA_SET, MODEL_NAME
from pipeline.config.options import option, require, section
from pipeline.config.sections import ClusterOptions, RegistryOptions, StorageOptions
from pipeline.values import JsonObject

FILE = "images.vlae"


@dataclass
class CompressConfig:
    """Compress a data set to a file as long as the bound says; or to its codes alone."""

    model: str = option(A_MODEL)
    split: str = option("the part of the data set: train, valid or test", "test")
    dataset_url: str | None = option(ANOTHER_DATA_SET, None, path=True)
    output: str = option(f"where {FILE} goes", f"outputs/compress/{MODEL_NAME}", path=True)
    lossy: bool = option(
        "keep only the codes, from which `vlae decompress` redraws the images", False
    )
    bits: int | None = option(
        "bits of each image's code in a lossy file; by default the rate, rounded up",
        None,
        at_least=1,
        at_most=20,
    )
    names: bool = option("keep the images' keys and labels", False)
    images_per_block: int = option(
        "the most images in a block, which one task compresses and which decompresses alone",
        10_000,
        at_least=1,
    )
    seed: int = option(
        "the seed of binarization, of the initial bits, and of a lossy file's draws",
        0,
        at_least=0,
        below=1 << 63,
    )
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")

    def check(self) -> None:
        require(
            self.lossy or self.bits is None,
            f"bits={self.bits} is the length of a code in a lossy file; add lossy=true, or leave"
            " bits= out to keep every pixel",
        )


def run(config: CompressConfig) -> JsonObject:
    """Compress a split. Returns what was written.

    Raises UserError if the model, the data set or the split does not exist, the images have another
    shape, or the model's prior or posterior has no exact code.
    """
    from pipeline.cluster import connect
    from pipeline.coding.compression import compress, latents_within, rate_bits
    from pipeline.coding.container import MAX_BITS
    from pipeline.registry.models import open_model
    from pipeline.runs import open_data
    from pipeline.storage import open_storage

    model = open_model(config.model, config.registry, config.storage)
    data = open_data(model, config.dataset_url, config.storage)
    bits, sent = config.bits, None
    if config.lossy and (bits is None or model.is_nested):
        rates = rate_bits(model.network, data, config.split, model.binarization)
        if bits is None:
            rate = rates.sum().item()
            require(
                rate <= MAX_BITS,
                f"the codes of {model.reference} carry {rate:.1f} bits an image, more than the"
                f" {MAX_BITS} of the longest code; give bits={MAX_BITS} to send only what fits",
            )
            bits = max(1, math.ceil(rate))
        if model.is_nested:
            sent = latents_within(rates, bits)
    return compress(
        model,
        data,
        config.split,
        open_storage(config.output, config.storage.endpoint_url),
        FILE,
        images_per_block=config.images_per_block,
        names=config.names,
        bits=bits,
        sent=sent,
        seed=config.seed,
        connect=lambda: connect(config.cluster, config.storage),
    )


def format_result(config: CompressConfig, result: JsonObject) -> str:
    """The size of the file, and what it is made of."""
    if not result["images"]:
        return f"no images: the {config.split} split is empty; {result['url']} says so"
    kept = "" if config.lossy else f"{result['initial_bits']:,} initial bits and "
    return (
        f"{result['images']:,} {config.split} images in {result['bytes']:,} bytes:"
        f" {result['bits_per_image']:.2f} bits an image, {result['bits_per_dim']:.4f} bits/dim,"
        f" with {kept}{result['container_bytes']:,} bytes of headers and checksums\n"
        f"{result['url']}"
    )


COMMAND = Command(CompressConfig, run, format_result, lambda config: config.output)
