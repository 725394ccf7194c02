"""The options of a training run: its optimizer and course, and all of it together."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from pipeline.config.model import Code, ModelOptions
from pipeline.config.options import digest, identity, option, require, section, to_dict
from pipeline.config.sections import (
    ClusterOptions,
    DatasetOptions,
    RegistryOptions,
    StorageOptions,
)
from pipeline.values import JsonObject

if TYPE_CHECKING:
    from vlae import VLAE


class Algorithm(Enum):
    adam = "adam"
    adamax = "adamax"
    muon = "muon"


@dataclass
class OptimOptions:
    algorithm: Algorithm = option(
        "adam; adamax, which scales steps by the largest recent gradient; or muon, which is Adam"
        " but orthogonalizes the gradients of hidden layers"
    )
    learning_rate: float = option("the highest step size", above=0, below=math.inf)
    warmup_steps: int = option("steps over which it rises from zero", at_least=0)
    decay_fraction: float = option(
        "the last part of the run over which it falls linearly to zero", at_least=0, at_most=1
    )
    clip_norm: float = option("gradients are scaled down to this norm", above=0)
    ema_decay: float = option(
        "decay of the weights' moving average, which is what is evaluated and registered",
        at_least=0,
        below=1,
    )


class Precision(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class FreeBits(Enum):
    hard = "hard"
    soft = "soft"


FREE_NATS_RAMP = 0.2
"""The fraction of a run over which the floor under the rate falls to zero."""


@dataclass
class TrainOptions:
    images: int = option(
        "images that the run sees in all, repeats included", at_least=1, shared=True
    )
    global_batch: int = option(
        "images of one step, over all workers", at_least=1, below=1 << 24, shared=True
    )
    num_streams: int = option(
        "canonical streams of the data; any number of workers up to this gives the same run",
        at_least=1,
        below=1 << 20,
        shared=True,
    )
    precision: Precision = option(
        "bfloat16 computes matrix products in bfloat16 and all else in float32; auto is bfloat16 on"
        " GPUs that support it and float32 elsewhere; float64 is for checks",
        Precision.auto,
    )
    micro_batch: int | None = option(
        "images that a worker processes at once; gradients are accumulated to the same result, but"
        " slower",
        None,
        at_least=1,
        identity=False,
    )
    seed: int = option(
        "the seed of the initial weights, the order of the data and all noise",
        0,
        at_least=0,
        below=1 << 63,
    )
    free_bits: FreeBits = option(
        "how free_nats keeps the decoder from ignoring z. hard: a floor early in the run, below"
        " which the rate costs nothing; soft: a target that the rate's weight, at most 1, steers"
        " the rate to throughout the run",
        FreeBits.hard,
    )
    free_nats: float = option(
        "the floor under the rate, or its target, in nats per image; 0 is none",
        at_least=0,
        below=1 << 63,
    )
    free_fraction: float = option(
        "hard: the part of the run that has this floor; over the next fifth it falls to zero",
        at_least=0,
        at_most=1,
    )
    free_groups: int = option(
        "hard: equal parts of the code that each have their share of the floor; must divide"
        " model.latents",
        1,
        at_least=1,
    )
    nested: bool = option(
        "draw for each image how many latents are sent, the first ones, so that codes can be cut"
        " to any rate",
        False,
    )
    with_valid: bool = option(
        "train on the validation images, too, once all choices are made: then only test images are"
        " held out",
        False,
        shared=True,
    )
    rate_warmup_fraction: float = option(
        "the first part of the run over which the rate's weight rises from 0 to 1",
        at_least=0,
        at_most=1,
    )
    valid_images: int = option(
        "validation images that measure progress (all of them if there are fewer)",
        at_least=1,
        identity=False,
        shared=True,
    )
    valid_every: int = option(
        "images between two validations", at_least=1, identity=False, shared=True
    )
    report_seconds: float = option(
        "seconds between two reports of progress",
        5.0,
        at_least=0,
        below=1 << 63,
        identity=False,
        shared=True,
    )
    checkpoint_seconds: float = option(
        "seconds between two checkpoints", at_least=0, below=1 << 63, identity=False, shared=True
    )
    keep_checkpoints: int = option(
        "how many of the newest checkpoints are kept", 2, at_least=1, identity=False, shared=True
    )

    @property
    def num_steps(self) -> int:
        return self.images // self.global_batch

    @property
    def held_fraction(self) -> float:
        """The first part of the run, in which the loss holds the rate up: under the floor of hard
        free bits, or with a weight of the rate below 1. Soft free bits steer it to the same target
        until the end, so that its rates are comparable throughout.
        """
        has_floor = self.free_bits is FreeBits.hard and self.free_nats > 0
        floor = self.free_fraction + FREE_NATS_RAMP if has_floor else 0.0
        return min(1.0, max(floor, self.rate_warmup_fraction))

    def check(self) -> None:
        require(
            self.global_batch % self.num_streams == 0,
            f"train.global_batch={self.global_batch} cannot be shared by"
            f" train.num_streams={self.num_streams} streams; use a batch that is a multiple of"
            f" {self.num_streams}",
        )
        if self.free_bits is FreeBits.soft:
            require(
                self.free_nats > 0,
                "train.free_bits=soft needs a target for the rate; give train.free_nats above 0",
            )
            require(
                self.free_groups == 1,
                "train.free_groups divides the floor of train.free_bits=hard; with soft, leave it"
                " at 1",
            )
            require(
                self.rate_warmup_fraction == 0,
                "train.free_bits=soft sets the weight of the rate by itself; leave"
                " train.rate_warmup_fraction at 0",
            )
        require(
            self.num_steps >= 1,
            f"train.images={self.images} is less than one batch of"
            f" train.global_batch={self.global_batch}",
        )


@dataclass
class TrainConfig:
    """Train one model; the same command again resumes an interrupted run."""

    name: str | None = option(
        "the run's name; by default one made from the data set and the configuration",
        None,
        name=True,
        identity=False,
    )
    preset: str | None = option(
        "the preset that the model's options started from: a record of what model=NAME chose, or"
        " model=auto found",
        None,
        identity=False,
    )
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    dataset: DatasetOptions = section(DatasetOptions, "the images", identity=True)
    model: ModelOptions = section(ModelOptions, "the VLAE", identity=True)
    optim: OptimOptions = section(OptimOptions, "how its weights are moved", identity=True)
    train: TrainOptions = section(TrainOptions, "the run", identity=True)
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")
    registry: RegistryOptions = section(RegistryOptions, "where MLflow keeps account of it")

    def check(self) -> None:
        workers, streams = self.cluster.max_workers, self.train.num_streams
        require(
            workers <= streams,
            f"cluster.num_workers={workers}, but the data is dealt to train.num_streams={streams}"
            " streams, and each worker needs one; use fewer workers, or more streams",
        )
        groups, latents = self.train.free_groups, self.model.latents
        require(
            latents % groups == 0,
            f"train.free_groups={groups} does not divide a code of {latents} latents; use a number"
            " that does, or 1",
        )
        require(
            groups == 1 or max(self.model.flow_depth, self.model.posterior_depth) <= 1,
            f"train.free_groups={groups} needs a rate that splits over the latents, which that of a"
            " flow of more than one step does not; use train.free_groups=1, or flow depths of 0"
            " and 1",
        )
        self._check_nested()

    def _check_nested(self) -> None:
        """Raise UserError if nested training of this model is asked for and impossible."""
        model, train = self.model, self.train
        obstacles = {
            f"model.flow_depth={model.flow_depth}": model.flow_depth > 1,
            f"model.posterior_depth={model.posterior_depth}": model.posterior_depth > 0,
            "model.code=maps": model.code is Code.maps,
        }
        found = ", ".join(name for name, is_given in obstacles.items() if is_given)
        require(
            not (train.nested and found),
            f"train.nested=true sends the first latents of a code alone, but with {found} these"
            " have no density of their own; use model.flow_depth=0 or 1, model.posterior_depth=0"
            " and model.code=vector",
        )
        require(
            not train.nested or train.free_groups == 1,
            "train.nested=true sends the last latents seldom, so they cannot have an equal share of"
            " the floor; leave train.free_groups at 1",
        )

    def build(self, image_shape: tuple[int, int, int]) -> "VLAE":
        """The model, with fresh weights. Raises ValueError as ``vlae.build`` does."""
        return self.model.build(image_shape, self.dataset.binarization)

    @property
    def run_name(self) -> str:
        return self.name or f"{self.dataset.name}-{self.model.window}-{digest(self.identity())}"

    @property
    def folder(self) -> str:
        """The address of its folder."""
        return self.storage.run_folder(self.run_name)

    def identity(self) -> JsonObject:
        """The options that its weights depend on: with others, it is another run."""
        return identity(TrainConfig, to_dict(self))
