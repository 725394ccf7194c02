"""The options of a training run: its model, optimizer and course."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from pipeline.config.options import digest, identity, option, require, section, to_dict
from pipeline.config.sections import (
    Binarization,
    ClusterOptions,
    DatasetOptions,
    RegistryOptions,
    StorageOptions,
)
from pipeline.errors import UserError
from pipeline.values import JsonObject
from vlae.window import NOTATION, Window

if TYPE_CHECKING:
    from vlae import VLAE


class Code(Enum):
    vector = "vector"
    maps = "maps"


class ActivationName(Enum):
    relu = "relu"
    elu = "elu"


WIDEST, DEEPEST = 1 << 20, 1 << 8
"""Limits of widths and of numbers of layers. ``ModelOptions.build`` limits the model as a whole."""
ORDINARY = 1 << 27
"""A model is only measured if its three largest numbers multiply to more: measuring takes seconds,
for PyTorch loads much that it does not need otherwise.
"""


@dataclass
class ModelOptions:
    window: str = option(f"the decoder's receptive field: {NOTATION}")
    latents: int = option("size of the code z, or how many maps it has", at_least=1, below=WIDEST)
    code: Code = option(
        "vector, or maps: z keeps positions, at the size at which the encoder ends",
        Code.vector,
    )
    flow_depth: int = option(
        "steps of the autoregressive-flow prior; 0 is a standard normal prior",
        at_least=0,
        below=DEEPEST,
    )
    posterior_depth: int = option(
        "steps of an inverse autoregressive flow in the posterior; 0 is a diagonal Gaussian",
        0,
        at_least=0,
        below=DEEPEST,
    )
    flow_hidden: int = option(
        "width of each step's MADE, in the prior and the posterior", at_least=1, below=WIDEST
    )
    flow_layers: int = option("hidden layers of each step's MADE", 2, at_least=1, below=DEEPEST)
    flow_mean_only: bool = option("steps only shift, as the paper's do, and do not scale", False)
    mixtures: int = option(
        "components of the likelihood of 256 values, a mixture of discretized logistics",
        5,
        at_least=1,
        below=WIDEST,
    )
    encoder_channels: int = option(
        "width of the encoder; twice that below half the image's size", at_least=1, below=WIDEST
    )
    decoder_channels: int = option(
        "width of the network that unfolds z; twice that at its smallest", at_least=1, below=WIDEST
    )
    blocks: int = option(
        "residual blocks at each size below the image's, in the encoder and the decoder",
        1,
        at_least=0,
        below=DEEPEST,
    )
    image_blocks: int = option(
        "residual blocks at the image's own size, in the encoder and the decoder",
        0,
        at_least=0,
        below=DEEPEST,
    )
    decoder_maps: int = option("image-sized maps that z unfolds to", at_least=1, below=WIDEST)
    decoder_features: int = option("width of the per-pixel network", at_least=1, below=WIDEST)
    decoder_blocks: int = option("layers of the per-pixel network", at_least=0, below=DEEPEST)
    context_layers: int = option(
        "0 looks at the window with one linear layer; more stack it from so many, as the paper"
        " does",
        0,
        at_least=0,
        below=DEEPEST,
    )
    activation: ActivationName = option(
        "relu, or the paper's elu, which is slower", ActivationName.relu
    )

    def check(self) -> None:
        self.check_window(self.window, "model.window")
        self.check_flow(self.latents, self.flow_depth, "model.latents")

    def check_flow(self, latents: int, depth: int, key: str) -> None:
        """Raise UserError, naming ``key``, if flows of so many steps over so many latents need
        wider steps.
        """
        # A step has a hidden unit for every latent that another may depend on; where it also sees a
        # context, for every latent.
        least = latents if self.posterior_depth or self.code is Code.maps else latents - 1
        require(
            max(depth, self.posterior_depth) == 0 or self.flow_hidden >= least,
            f"model.flow_hidden={self.flow_hidden} is too narrow for {key} of {latents}: it must be"
            f" at least {least}",
        )

    def check_window(self, text: str, key: str) -> None:
        """Raise UserError, naming ``key``, unless this is a window that the model can have."""
        try:
            window = Window.parse(text)
            if self.context_layers:
                window.check_stacks()
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None

    def build(self, image_shape: tuple[int, int, int], binarization: Binarization) -> "VLAE":
        """The model, with fresh weights; its likelihood is the one that the images call for.

        Raises ValueError as ``vlae.build`` does, and on a model whose weights alone would take more
        than this machine's memory, before it takes any.
        """
        import vlae  # here, since it loads PyTorch, which a check of the options does without

        likelihood = "logistic" if binarization is Binarization.none else "bernoulli"
        arguments = {"image_shape": image_shape, "likelihood": likelihood, **to_dict(self)}
        numbers = sorted(value for value in arguments.values() if type(value) is int)
        if math.prod(numbers[-3:]) > ORDINARY:
            _check_size(arguments)
        return vlae.build(**arguments)


def _check_size(arguments: dict[str, Any]) -> None:
    """Raise ValueError if a model's weights alone take more than this machine's memory."""
    import torch

    import vlae
    from pipeline.machine import MEMORY

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # takes no memory
            shapes = vlae.build(**arguments).state_dict()
    except RuntimeError as error:  # a shape that no tensor can have
        raise ValueError(f"no model can be that large ({error})") from None
    size = sum(4 * value.numel() for value in shapes.values())
    if size > MEMORY:
        largest = max(shapes, key=lambda name: shapes[name].numel())
        raise ValueError(
            f"its weights take {size / 1e9:,.0f} GB, more than this machine's"
            f" {MEMORY / 1e9:,.0f} GB of memory; the largest is {largest}, of the shape"
            f" {tuple(shapes[largest].shape)}"
        )


LARGE = 64
"""The least height and width in pixels of images that ``model=auto`` gives a code of maps."""


def preset_for(image_shape: tuple[int, int, int], binarization: Binarization) -> str:
    """The preset in ``configs/model`` that ``model=auto`` stands for, for images of this shape."""
    if min(image_shape[1:]) >= LARGE:
        return "large"
    return "colour" if binarization is Binarization.none else "fast"


class Algorithm(Enum):
    adam = "adam"
    adamax = "adamax"


@dataclass
class OptimOptions:
    algorithm: Algorithm = option(
        "adam, or adamax, which scales steps by the largest recent gradient"
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
                "train.free_groups is of train.free_bits=hard; with soft, leave it at 1",
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
