"""The options of an evaluation."""

from dataclasses import dataclass

from pipeline.config.options import option, section
from pipeline.config.sections import ClusterOptions, RegistryOptions, StorageOptions

MAX_SAMPLES = 1 << 16
"""Importance samples of an image are numbered up to here; fixed, since noise depends on it."""


@dataclass
class BoundOptions:
    samples: int = option(
        "k, the number of importance samples of the IWAE bound",
        64,
        at_least=1,
        below=MAX_SAMPLES,
    )
    num_images: int | None = option(
        "evaluate only the first images of the split; none is all", None, at_least=2
    )
    resolution_images: int = option(
        "images that are redrawn from their codes to measure the resolution, the first ones; 0"
        " measures none",
        256,
        at_least=0,
    )
    pictures: int = option("images in each picture", 40, at_least=1, below=1 << 14)
    seed: int = option("the seed of binarization and all noise", 0)


MODEL_NAME = "${name_of:${model}}"
"""The end of a default output folder: the name of the model, see ``addresses.name_of``."""
A_MODEL = (
    "a run's folder, models:/NAME@ALIAS or models:/NAME/VERSION from the registry, or"
    " pretrained/NAME for one that comes with the package"
)
ANOTHER_DATA_SET = "another data set's folder; by default that of the model's training"


@dataclass
class EvaluateConfig:
    """Measure a model's rate, distortion, bounds and what its codes know, and draw its pictures.

    The same command resumes an interrupted one.
    """

    model: str = option(A_MODEL)
    split: str = option("the part of the data set: train, valid or test", "test")
    dataset_url: str | None = option(ANOTHER_DATA_SET, None, path=True)
    output: str = option("where the report goes", f"outputs/evaluate/{MODEL_NAME}", path=True)
    probe_images: int = option(
        "training images that the probes of labelled data are fitted on, and validation images that"
        " choose among them; 0 is no probe",
        10_000,
        at_least=0,
    )
    bounds: BoundOptions = section(BoundOptions, "what is measured")
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs, if there is much to measure")
