"""The options of an evaluation."""

from dataclasses import dataclass

from pipeline.config.options import option, require, section
from pipeline.config.sections import RegistryOptions, StorageOptions


@dataclass
class BoundOptions:
    samples: int = option("k, the number of importance samples of the IWAE bound", 64)
    num_images: int | None = option("evaluate only the first so many images; none is all", None)
    pictures: int = option("how many images the pictures show", 40)
    seed: int = option("decides binarization and all noise", 0)

    def check(self) -> None:
        require(self.samples >= 1, f"bounds.samples is {self.samples}; it must be at least 1")
        require(
            self.num_images is None or self.num_images >= 2,
            f"bounds.num_images is {self.num_images}; it must be at least 2",
        )
        require(self.pictures >= 1, f"bounds.pictures is {self.pictures}; it must be at least 1")


A_MODEL = "a run's folder, or models:/NAME@ALIAS or models:/NAME/VERSION from the registry"
ANOTHER_DATA_SET = "another data set's folder; by default that of the model's training"


@dataclass
class EvaluateConfig:
    """Measure a model's rate, distortion, bounds and what its codes know, and draw its pictures."""

    model: str = option(A_MODEL)
    split: str = option("the part of the data set: train, valid or test", "test")
    dataset_url: str | None = option(ANOTHER_DATA_SET, None)
    output: str = option("where the report goes", "outputs/evaluate")
    probe_images: int = option(
        "training images that the probes of labelled data are fitted on, and as many validation"
        " images choose; 0 for no probe",
        10_000,
    )
    bounds: BoundOptions = section(BoundOptions, "what is measured")
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")

    def check(self) -> None:
        require(
            self.probe_images >= 0, f"probe_images is {self.probe_images}; it must be at least 0"
        )
