"""The configuration: every option of every command, declared once, with its type, default and meaning.

YAML files in ``configs/`` only choose values. ``load`` composes them with Hydra, applies the command line's ``key=value``
overrides, and checks everything that can be checked without touching data, so that a mistake ends before any compute.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib.resources
import itertools
import json
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import hydra
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import vlae
from pipeline.errors import UserError
from pipeline.goals import ON_THE_WAY, QUANTITIES, Goals


def option(help: str, default: Any = MISSING) -> Any:
    """A dataclass field with its sentence for ``--help``."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


Config = TypeVar("Config")


def section(cls: type, help: str) -> Any:
    """A nested group of options."""
    return field(default_factory=cls, metadata={"help": help})


def _check(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


# --- sections that several commands share ------------------------------------------------------------------------------


@dataclass
class StorageOptions:
    root: str = option("where everything is kept: a folder, or s3://bucket/prefix", "vlae-store")
    endpoint_url: str | None = option("the S3 server's address, if not Amazon's; AWS_ENDPOINT_URL does the same", None)

    def check(self) -> None:
        _check(bool(self.root), "storage.root is empty; give a folder, or s3://bucket/prefix")


class Source(Enum):
    mnist = "mnist"
    idx = "idx"
    folder = "folder"
    npz = "npz"
    tar = "tar"
    webdataset = "webdataset"
    parquet = "parquet"
    synthetic = "synthetic"


class Encoding(Enum):
    auto = "auto"
    npy = "npy"
    png = "png"
    webp = "webp"


class Fit(Enum):
    crop = "crop"
    pad = "pad"
    stretch = "stretch"


class Binarization(Enum):
    dynamic = "dynamic"
    static = "static"
    none = "none"


@dataclass
class DatasetOptions:
    name: str = option("the name of the data set")
    source: Source = option(
        "what path holds: mnist (fetched), idx (IDX files), folder (images, one sub-folder per class), npz (arrays), tar (a "
        "folder tree), webdataset (shards), parquet (as Hugging Face keeps images), or synthetic (drawn "
        "from known probabilities)"
    )
    path: str | None = option(
        "where the source's files are: a file or folder; s3:// too for folder, tar, webdataset, parquet", None
    )
    url: str = option("where the shards and manifest.json are", "${storage.root}/datasets/${dataset.name}")
    binarization: Binarization = option(
        "dynamic: every pixel is drawn black or white anew each time it is seen; static: drawn once for each image; "
        "none: images keep their 256 values, and the likelihood is one of these",
        Binarization.dynamic,
    )
    cache: str | None = option(
        "a folder of each machine where training keeps the shards that it has read; none keeps none", None
    )
    cache_gb: float = option("how many gigabytes it may take; what was used longest ago makes way", 20.0)
    max_skipped: int = option(
        "how many damaged or missing images a worker may replace by others, with a warning, before it gives up", 0
    )

    def check(self) -> None:
        _check(0 < self.cache_gb < 1 << 30, f"dataset.cache_gb is {self.cache_gb}; it must be above 0")
        _check(self.max_skipped >= 0, f"dataset.max_skipped is {self.max_skipped}; it must be at least 0")


@dataclass
class ClusterOptions:
    address: str | None = option("a running Ray cluster's address, auto for one on this machine; none starts one", None)
    num_workers: Any = option(
        "workers of one training run; [MIN,MAX] goes on with what is there of them, as hosts go and come", 1
    )
    cpus_per_worker: int = option("CPU cores of each worker", 1)
    use_gpu: bool = option("give each worker a GPU", False)
    max_failures: int = option("how many times in a row a run is restarted without having got any further", 3)

    @property
    def min_workers(self) -> int:
        return self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def max_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers

    def check(self) -> None:
        numbers = self.num_workers if isinstance(self.num_workers, list) else [self.num_workers]
        _check(
            all(type(number) is int and number >= 1 for number in numbers)
            and (numbers is not self.num_workers or (len(numbers) == 2 and numbers[0] <= numbers[1])),
            f"cluster.num_workers is {self.num_workers}; it must be at least 1, or such numbers [MIN,MAX]",
        )
        _check(self.cpus_per_worker >= 1, f"cluster.cpus_per_worker is {self.cpus_per_worker}; it must be at least 1")
        _check(self.max_failures >= 0, f"cluster.max_failures is {self.max_failures}; it must be at least 0")


class Code(Enum):
    vector = "vector"
    maps = "maps"


class ActivationName(Enum):
    relu = "relu"
    elu = "elu"


@dataclass
class ModelOptions:
    window: str = option(f"the decoder's receptive field: {vlae.window.NOTATION}")
    latents: int = option("size of the code z, or how many maps it has")
    code: Code = option("vector, or maps: z keeps the place of things, at the size at which the encoder ends", Code.vector)
    flow_depth: int = option("steps of the autoregressive-flow prior; 0 is a standard normal prior")
    posterior_depth: int = option("steps of an inverse autoregressive flow in the posterior; 0 is a diagonal Gaussian", 0)
    flow_hidden: int = option("width of each step's MADE, in the prior and the posterior")
    flow_layers: int = option("hidden layers of each step's MADE", 2)
    flow_mean_only: bool = option("steps only shift, as the paper's do, and do not scale", False)
    mixtures: int = option("components of the likelihood of 256 values, a mixture of discretized logistics", 5)
    encoder_channels: int = option("width of the encoder; twice that below half the image's size")
    decoder_channels: int = option("width of the network that unfolds z; twice that at its smallest")
    blocks: int = option("residual blocks at each size below the image's, in the encoder and the decoder", 1)
    image_blocks: int = option("residual blocks at the image's own size, in the encoder and the decoder", 0)
    decoder_maps: int = option("image-sized maps that z unfolds to")
    decoder_features: int = option("width of the per-pixel network")
    decoder_blocks: int = option("layers of the per-pixel network")
    context_layers: int = option(
        "0 looks at the window with one linear layer; more stack it from so many, as the paper does", 0
    )
    activation: ActivationName = option("relu, or the paper's elu, which is slower", ActivationName.relu)

    def check(self) -> None:
        self.check_window(self.window, "model.window")
        widths = ("encoder_channels", "decoder_channels", "decoder_maps", "decoder_features")
        for name in ("latents", "flow_hidden", "flow_layers", "mixtures", *widths):
            _check(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("flow_depth", "posterior_depth", "decoder_blocks", "blocks", "image_blocks", "context_layers"):
            _check(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must be at least 0")
        self.check_flow(self.latents, self.flow_depth, "model.latents")

    def check_flow(self, latents: int, depth: int, key: str) -> None:
        """Raise UserError, naming ``key``, if flows of so many steps over so many latents need wider steps."""
        # A step has a hidden unit for every latent that another may depend on; where it also sees a context, for every latent.
        least = latents if self.posterior_depth or self.code is Code.maps else latents - 1
        _check(
            max(depth, self.posterior_depth) == 0 or self.flow_hidden >= least,
            f"model.flow_hidden={self.flow_hidden} is too narrow for {key} of {latents}: it must be at least {least}",
        )

    def check_window(self, text: str, key: str) -> None:
        """Raise UserError, naming ``key``, unless this is a window that the model can have."""
        try:
            window = vlae.Window.parse(text)
            if self.context_layers:
                window.check_stacks()
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None

    def build(self, image_shape: tuple[int, int, int], binarization: Binarization) -> vlae.VLAE:
        """The model, with fresh weights; its likelihood is the one that the images call for. Raises ValueError as ``vlae.build`` does."""
        likelihood = "logistic" if binarization is Binarization.none else "bernoulli"
        return vlae.build(image_shape=image_shape, likelihood=likelihood, **to_dict(self))


class Algorithm(Enum):
    adam = "adam"
    adamax = "adamax"


@dataclass
class OptimOptions:
    algorithm: Algorithm = option("adam, or adamax, which is Adam with the largest recent gradient for a scale")
    learning_rate: float = option("the step size at its highest")
    warmup_steps: int = option("steps over which it rises from zero")
    decay_fraction: float = option("the last part of the run over which it falls linearly to zero")
    clip_norm: float = option("gradients are scaled down to this norm")
    ema_decay: float = option("decay of the weights' moving average, which is what is evaluated and registered")

    def check(self) -> None:
        _check(
            0 < self.learning_rate < math.inf, f"optim.learning_rate is {self.learning_rate}; it must be above 0, and finite"
        )
        _check(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; it must be at least 0")
        _check(0 <= self.decay_fraction <= 1, f"optim.decay_fraction is {self.decay_fraction}; it must lie in 0..1")
        _check(self.clip_norm > 0, f"optim.clip_norm is {self.clip_norm}; it must be above 0")
        _check(0 <= self.ema_decay < 1, f"optim.ema_decay is {self.ema_decay}; it must lie in 0..1, below 1")


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
    images: int = option("how many images the run sees in all, repeats included")
    global_batch: int = option("images of one step, over all workers")
    num_streams: int = option("canonical streams the data is dealt to; any number of workers up to it gives the same run")
    precision: Precision = option(
        "bfloat16 has matrix products in it and all else in float32; auto does so on GPUs that can, and is float32 elsewhere; "
        "float64 is for checks",
        Precision.auto,
    )
    micro_batch: int | None = option(
        "images that a worker holds in memory at once; the gradients of several are added up, to the same result, but slower",
        None,
    )
    seed: int = option("decides the weights' start, the order of the data and all noise", 0)
    free_bits: FreeBits = option(
        "how free_nats is used, so that the decoder does not learn to do without z. hard: a floor early in the run, below which the "
        "rate costs nothing; soft: a target for the rate in the whole run, which the rate's weight, at most 1, is steered to",
        FreeBits.hard,
    )
    free_nats: float = option("the floor under the rate, or its target, in nats per image; 0 is none")
    free_fraction: float = option("hard: the part of the run that has this floor; over the next fifth it falls to zero")
    free_groups: int = option(
        "hard: equal parts of the code that each have their share of the floor; must divide model.latents", 1
    )
    rate_warmup_fraction: float = option("the first part of the run over which the rate's weight rises from 0 to 1")
    valid_images: int = option("validation images that progress is judged by (all of them if there are fewer)")
    valid_every: int = option("images between two validations")
    report_seconds: float = option("seconds between two reports of progress", 5.0)
    checkpoint_seconds: float = option("seconds between two checkpoints")
    keep_checkpoints: int = option("how many of the newest checkpoints are kept", 2)

    @property
    def num_steps(self) -> int:
        return self.images // self.global_batch

    def check(self) -> None:
        for name in ("images", "global_batch", "num_streams", "free_groups", "valid_images", "valid_every", "keep_checkpoints"):
            _check(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        _check(
            self.micro_batch is None or self.micro_batch >= 1, f"train.micro_batch is {self.micro_batch}; it must be at least 1"
        )
        for name in ("seed", "free_nats", "report_seconds", "checkpoint_seconds"):
            _check(
                0 <= getattr(self, name) < 1 << 63,
                f"train.{name} is {getattr(self, name)}; it must be at least 0, and below 2^63",
            )
        for name in ("free_fraction", "rate_warmup_fraction"):
            _check(0 <= getattr(self, name) <= 1, f"train.{name} is {getattr(self, name)}; it must lie in 0..1")
        _check(
            self.global_batch % self.num_streams == 0,
            f"train.global_batch={self.global_batch} cannot be shared by train.num_streams={self.num_streams} streams; "
            f"use a batch that is a multiple of {self.num_streams}",
        )
        if self.free_bits is FreeBits.soft:
            _check(self.free_nats > 0, "train.free_bits=soft needs a target for the rate; give train.free_nats above 0")
            _check(self.free_groups == 1, "train.free_groups is of train.free_bits=hard; with soft, leave it at 1")
            _check(
                self.rate_warmup_fraction == 0,
                "train.free_bits=soft sets the weight of the rate by itself; leave train.rate_warmup_fraction at 0",
            )
        _check(
            self.num_steps >= 1,
            f"train.images={self.images} is less than one batch of train.global_batch={self.global_batch}",
        )


class Sampler(Enum):
    tpe = "tpe"
    random = "random"
    grid = "grid"


class Stopping(Enum):
    asha = "asha"
    median = "median"
    none = "none"


@dataclass
class SearchOptions:
    space: dict[str, Any] = option(
        "what is tried: options of model, optim and train, each with its values, as search.space.model.window=[3x1,5x2]", {}
    )
    objectives: list[str] = option(f"min or max, and one of {', '.join(QUANTITIES)}; several are traded off", ["min nll"])
    constraints: list[str] = option("bounds of the same quantities, as ['20 <= rate_bits <= 60']", [])
    sampler: Sampler = option("how the next trial is chosen: by Optuna's TPE, at random, or all in turn", Sampler.tpe)
    stopping: Stopping = option(
        "which trials end early. asha: those that lag behind at a few numbers of images; median: those worse than most at any validation",
        Stopping.asha,
    )
    num_trials: int = option("how many models are trained, at most")
    hours: float | None = option(
        "how long the search may take; what runs then is interrupted, and goes on if there is more time", None
    )
    core_hours: float | None = option("how many core-hours its trials may take together", None)
    max_concurrent: int = option("trials that run at once, at most; 0 is as many as the cluster has room for", 0)
    grace_fraction: float = option("the part of a run that every trial is given before it may be stopped early", 0.25)
    reduction: int = option("asha: of the trials at each rung, one in this many goes on", 3)
    samples: int = option("k of the bound that finished trials are measured with; 1 is the code length", 8)
    num_images: int = option("validation images that they are measured on (all of them if there are fewer)", 1000)
    probe_images: int = option("training images that their probes are fitted on, where there are labels; 0 for no probe", 2000)

    def check(self) -> None:
        for name in ("num_trials", "samples"):
            _check(getattr(self, name) >= 1, f"search.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_concurrent", "probe_images"):
            _check(getattr(self, name) >= 0, f"search.{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("hours", "core_hours"):
            _check(
                getattr(self, name) is None or getattr(self, name) > 0,
                f"search.{name} is {getattr(self, name)}; it must be above 0",
            )
        _check(self.num_images >= 2, f"search.num_images is {self.num_images}; it must be at least 2")
        _check(0 < self.grace_fraction <= 1, f"search.grace_fraction is {self.grace_fraction}; it must lie in 0..1, above 0")
        _check(self.reduction >= 2, f"search.reduction is {self.reduction}; it must be at least 2")
        judged = self.goals.quantities
        _check(
            self.stopping is Stopping.none or bool(judged.intersection(ON_THE_WAY)),
            f"search.stopping={self.stopping.value} compares trials while they run, when only {', '.join(ON_THE_WAY)} are known: "
            "make one of them an objective, or use search.stopping=none",
        )
        _check(
            "probe_accuracy" not in judged or self.probe_images > 0,
            "search.probe_images=0 fits no probe, but probe_accuracy is searched for; raise it",
        )

    @property
    def goals(self) -> Goals:
        return Goals.parse(self.objectives, self.constraints)

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The searched options by their dotted keys, each with its values, without repeats."""
        return {
            f"{part}.{name}": list({repr(value): value for value in values}.values())
            for part, options in self.space.items()
            for name, values in options.items()
        }

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination of the values, as dotted keys; the last key's values change first."""
        return (dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values()))


@dataclass
class RegistryOptions:
    uri: str = option("MLflow's server, or a SQLite file, for runs and registered models", "sqlite:///vlae-registry.db")
    artifacts: str = option(
        "where a SQLite file's registry keeps the files of model versions; a server has a place of its own",
        "${storage.root}/registry",
    )


@dataclass
class BoundOptions:
    samples: int = option("k, the number of importance samples of the IWAE bound", 64)
    num_images: int | None = option("evaluate only the first so many images; none is all", None)
    pictures: int = option("how many images the pictures show", 40)
    seed: int = option("decides binarization and all noise", 0)

    def check(self) -> None:
        _check(self.samples >= 1, f"bounds.samples is {self.samples}; it must be at least 1")
        _check(
            self.num_images is None or self.num_images >= 2, f"bounds.num_images is {self.num_images}; it must be at least 2"
        )
        _check(self.pictures >= 1, f"bounds.pictures is {self.pictures}; it must be at least 1")


# --- commands ----------------------------------------------------------------------------------------------------------


@dataclass
class ShardOptions:
    samples_per_shard: int = option("images in one tar", 5000)
    block_size: int = option("images in one record of a tar", 250)
    encoding: Encoding = option(
        "npy keeps blocks of small images; png and webp (without loss) keep each large one; auto chooses by size", Encoding.auto
    )
    valid_fraction: float = option(
        "part of the training images kept for validation, if the source has no split of its own", 1 / 6
    )
    test_fraction: float = option("part of the images kept for the test, if the source has no split of its own", 1 / 10)
    image_size: int | None = option("image files are resized to this many pixels square; none keeps their size", None)
    fit: Fit = option("how: crop keeps the middle square, pad the whole on white, stretch the whole", Fit.crop)
    channels: int = option("1 is grey, 3 is RGB; for image files", 1)
    max_megapixels: float = option("image files with more pixels than this are not unpacked", 64.0)
    max_unreadable: int = option("image files that may be left out because they cannot be read; report.json lists them", 0)
    image_column: str = option("the column of Parquet files that holds images", "image")
    label_column: str = option("the column of Parquet files, or the key of a sample's .json, that holds labels", "label")
    seed: int = option("decides the images of a synthetic data set", 0)

    def check(self) -> None:
        _check(self.samples_per_shard >= 1, f"shard.samples_per_shard is {self.samples_per_shard}; it must be at least 1")
        _check(self.block_size >= 1, f"shard.block_size is {self.block_size}; it must be at least 1")
        _check(self.max_unreadable >= 0, f"shard.max_unreadable is {self.max_unreadable}; it must be at least 0")
        _check(0 <= self.seed < 1 << 63, f"shard.seed is {self.seed}; it must be at least 0, and below 2^63")
        _check_images(self, "shard")


@dataclass
class IndexOptions:
    train: str = option("the shards: s3://bucket/{000000..000123}.tar, https:// or local ones likewise, or a folder of tars")
    valid: str | None = option("those for validation; without, some of train's", None)
    test: str | None = option("those for the test; without, some of train's", None)
    valid_fraction: float = option("part of train's shards kept for validation, if it has none of its own", 1 / 20)
    test_fraction: float = option("part of train's shards kept for the test, if it has none of its own", 1 / 20)
    image_size: int | None = option(
        "images become this many pixels square as they are read; none: all must be of one size", None
    )
    fit: Fit = option("how: crop keeps the middle square, pad the whole on white, stretch the whole", Fit.crop)
    channels: int = option("1 is grey, 3 is RGB", 3)
    label_key: str = option("the key of a sample's .json that holds its label, if it has no .cls", "label")
    max_megapixels: float = option("images with more pixels than this are refused", 64.0)

    def check(self) -> None:
        _check_images(self, "index")


def _check_images(options: "ShardOptions | IndexOptions", name: str) -> None:
    """Checks of the options that shard and index share."""
    _check(
        options.image_size is None or options.image_size >= 1,
        f"{name}.image_size is {options.image_size}; it must be at least 1",
    )
    _check(options.channels in (1, 3), f"{name}.channels is {options.channels}; it must be 1 (grey) or 3 (RGB)")
    _check(0 < options.max_megapixels < 1e6, f"{name}.max_megapixels is {options.max_megapixels}; it must be above 0")
    for key in ("valid_fraction", "test_fraction"):
        _check(0 < getattr(options, key) < 1, f"{name}.{key} is {getattr(options, key)}; it must lie between 0 and 1")


@dataclass
class IndexConfig:
    """Make the manifest of WebDataset shards that someone else wrote, where they lie."""

    storage: StorageOptions = section(StorageOptions, "where things are kept")
    dataset: DatasetOptions = section(DatasetOptions, "the data set that they become")
    index: IndexOptions = section(IndexOptions, "the shards, and how they are read")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")


@dataclass
class DataConfig:
    """Look at a data set (inspect), or re-read and check every byte of it (verify)."""

    output: str = option("where the report goes", "outputs/data")
    pictures: int = option("how many images of each split the contact sheet shows", 50)
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    dataset: DatasetOptions = section(DatasetOptions, "the data set")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")

    def check(self) -> None:
        _check(self.pictures >= 1, f"pictures is {self.pictures}; it must be at least 1")


@dataclass
class ShardConfig:
    """Put images into WebDataset shards with a manifest."""

    storage: StorageOptions = section(StorageOptions, "where things are kept")
    dataset: DatasetOptions = section(DatasetOptions, "the images")
    shard: ShardOptions = section(ShardOptions, "how they are written")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")


@dataclass
class TrainConfig:
    """Train one model; the same command again resumes an interrupted run."""

    name: str | None = option("the run's name; by default one made from the data set and the configuration", None)
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    dataset: DatasetOptions = section(DatasetOptions, "the images")
    model: ModelOptions = section(ModelOptions, "the VLAE")
    optim: OptimOptions = section(OptimOptions, "how its weights are moved")
    train: TrainOptions = section(TrainOptions, "the run")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")
    registry: RegistryOptions = section(RegistryOptions, "where MLflow keeps account of it")

    def check(self) -> None:
        _check(
            self.name is None or bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name)),
            f"name={self.name} is no name for a run; use letters, digits, dots, underscores and hyphens",
        )
        workers, streams = self.cluster.max_workers, self.train.num_streams
        _check(
            workers <= streams,
            f"cluster.num_workers={workers}, but the data is dealt to train.num_streams={streams} streams, and each worker needs one; "
            "use fewer workers, or more streams",
        )
        groups, latents = self.train.free_groups, self.model.latents
        _check(
            latents % groups == 0,
            f"train.free_groups={groups} does not divide a code of {latents} latents; use a number that does, or 1",
        )
        _check(
            groups == 1 or max(self.model.flow_depth, self.model.posterior_depth) <= 1,
            f"train.free_groups={groups} needs a rate that splits over the latents, which that of a flow of more than one step does "
            "not; use train.free_groups=1, or flow depths of 0 and 1",
        )

    def build(self, image_shape: tuple[int, int, int]) -> vlae.VLAE:
        """The model, with fresh weights. Raises ValueError as ``vlae.build`` does."""
        return self.model.build(image_shape, self.dataset.binarization)

    @property
    def run_name(self) -> str:
        return self.name or f"{self.dataset.name}-{self.model.window}-{digest(self.identity())}"

    def identity(self) -> dict[str, Any]:
        """What makes this run this run: see ``identity``."""
        return identity(to_dict(self))


MOST_POINTS = 20_000
"""How many combinations a search's space may have: each is checked before anything is trained."""

SAME_FOR_ALL = re.compile(r"train\.(images|global_batch|num_streams|keep_checkpoints|valid_.*|.*_seconds)")
"""What the trials of a search have in common, so that they can be compared."""


@dataclass
class TuneConfig(TrainConfig):
    """Search over the decoder's window, the latent size and the prior's depth, or others; register the best models."""

    search: SearchOptions = section(SearchOptions, "what is searched, and how")
    register_best: int = option("how many of the best models are registered", 1)
    model_name: str = option("their name in the registry", "vlae-${dataset.name}")

    def check(self) -> None:
        _check(self.register_best >= 1, f"register_best is {self.register_best}; it must be at least 1")
        typed = self._typed_space()
        size = math.prod(map(len, typed.values()))
        _check(size <= MOST_POINTS, f"search.space has {size:,} combinations; it may have {MOST_POINTS:,}: leave out values")
        for values in itertools.product(*typed.values()):
            point = dict(zip(typed, values, strict=True))
            try:
                _check_all(self._at(point))
            except UserError as error:
                tried = ", ".join(f"{key}={value.value if isinstance(value, Enum) else value}" for key, value in point.items())
                raise UserError(f"{error} (search.space tries {tried})") from None

    def _typed_space(self) -> dict[str, list[Any]]:
        """The searched options with their values as a ``TrainConfig`` holds them.

        Raises UserError unless each is one that trials can differ in, and takes each of its values.
        """
        space, typed = self.search.space, dict[str, list[Any]]()
        _check(bool(space), "search.space is empty; give at least one option to vary, as search.space.model.window=[3x1,5x2]")
        for part, options in space.items():
            _check(
                isinstance(options, dict),
                f"search.space.{part} is {options}; write search.space.model.window=[3x1,5x2], and in YAML `model: {{window: [3x1, 5x2]}}`",
            )
            for name, values in options.items():
                key = f"{part}.{name}"
                _check(
                    part in ("model", "optim", "train") and not SAME_FOR_ALL.fullmatch(key),
                    f"search.space.{key}: trials differ in options of model, optim and train, but not in their budget or how they are "
                    "watched",
                )
                _check(
                    isinstance(values, list) and bool(values),
                    f"search.space.{key} is {values}; give a list of the values to choose from",
                )
                known = [option for option, _ in describe(TrainConfig)]
                if key not in known:
                    raise UserError(f"search.space.{key}: {_unknown(key, known)}")
                typed[key] = [_taken(self._at({}), key, value) for value in values]
        return typed

    def _at(self, point: dict[str, Any]) -> TrainConfig:
        """The training run of a point of the space, whose values have their types."""
        parts: dict[str, Any] = {item.name: getattr(self, item.name) for item in dataclasses.fields(TrainConfig)}
        for key, value in point.items():
            part, _, name = key.partition(".")
            parts[part] = dataclasses.replace(parts[part], **{name: value})
        return TrainConfig(**parts)


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
        "training images that the probes of labelled data are fitted on, and as many validation images choose; 0 for no probe",
        10_000,
    )
    bounds: BoundOptions = section(BoundOptions, "what is measured")
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")

    def check(self) -> None:
        _check(self.probe_images >= 0, f"probe_images is {self.probe_images}; it must be at least 0")


@dataclass
class EncodeConfig:
    """Encode a data set: the code of every image as Parquet, in parallel; the same command again goes on where it was."""

    model: str = option(A_MODEL)
    split: str = option("the part of the data set: train, valid or test", "train")
    dataset_url: str | None = option(ANOTHER_DATA_SET, None)
    output: str = option("where the codes go", "outputs/encode")
    images_per_part: int = option("the most images in one Parquet file, which one task encodes", 10_000)
    seed: int = option("decides binarization and the sample that the rate is measured with", 0)
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")
    cluster: ClusterOptions = section(ClusterOptions, "where it runs")

    def check(self) -> None:
        _check(self.images_per_part >= 1, f"images_per_part is {self.images_per_part}; it must be at least 1")


@dataclass
class SampleConfig:
    """Draw images from a model."""

    model: str = option(A_MODEL)
    num_images: int = option("how many", 40)
    seed: int = option("decides which", 0)
    output: str = option("where the picture goes", "outputs/sample")
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")

    def check(self) -> None:
        _check(self.num_images >= 1, f"num_images is {self.num_images}; it must be at least 1")


@dataclass
class ReconstructConfig:
    """Draw images of a data set, each above what a model makes of its code."""

    model: str = option(A_MODEL)
    split: str = option("the part of the data set: train, valid or test", "test")
    dataset_url: str | None = option(ANOTHER_DATA_SET, None)
    num_images: int = option("how many of its first images", 40)
    seed: int = option("decides binarization and all noise", 0)
    output: str = option("where the picture goes", "outputs/reconstruct")
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")

    def check(self) -> None:
        _check(self.num_images >= 1, f"num_images is {self.num_images}; it must be at least 1")


@dataclass
class RegistryConfig:
    """List, show, register, compare and promote models, and roll a promotion back."""

    name: str | None = option("a registered model", None)
    version: int | None = option("one of its versions; for compare and promote by default the challenger", None)
    against: str = option("what compare holds it to: an alias, or the number of a version", "champion")
    alias: str = option("the alias that promote gives", "champion")
    yes: bool = option("promote even what is not better; --yes does the same", False)
    runs: list[str] = option("the folders of finished runs that register takes; the last becomes the newest version", [])
    split: str = option("the part of the data set that models are compared on", "valid")
    dataset_url: str | None = option("another data set's folder to compare on; by default that of the version's training", None)
    output: str = option("where the result goes", "outputs/registry")
    bounds: BoundOptions = section(BoundOptions, "how models are evaluated")
    storage: StorageOptions = section(StorageOptions, "where things are kept")
    registry: RegistryOptions = section(RegistryOptions, "which registry")


@dataclass
class PlanConfig:
    """Say what a training run needs: shards, streams, batches, and memory of each worker."""

    num_images: int = option("training images of the data set", 50_000)
    image_size: int = option("their height and width in pixels", 28)
    channels: int = option("1 is grey, 3 is RGB", 1)
    binarization: Binarization = option("as dataset.binarization", Binarization.dynamic)
    num_workers: list[int] = option("numbers of workers, each with a row of its own", [1, 2, 4, 8])
    local_batch: int = option("images of each worker in a step", 16)
    output: str = option("where the result goes", "outputs/plan")
    model: ModelOptions = section(ModelOptions, "the VLAE")

    def check(self) -> None:
        for name in ("num_images", "image_size", "channels", "local_batch"):
            _check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        _check(bool(self.num_workers) and min(self.num_workers) >= 1, "num_workers must hold numbers of at least 1")


@dataclass
class TheoryConfig:
    """Hold the theory to images whose entropy is known: what three decoders leave to the code, in nats."""

    images: int = option("new images that each decoder is trained on", 120_000)
    num_images: int = option("held-out images that it is measured on", 10_000)
    seed: int = option("decides the images, the weights' start and all noise", 0)
    output: str = option("where the figures, the picture and the models go", "outputs/theory")

    def check(self) -> None:
        _check(self.images >= 32, f"images is {self.images}; it must be at least 32, one batch")
        _check(self.num_images >= 2, f"num_images is {self.num_images}; it must be at least 2")
        _check(0 <= self.seed < 1 << 60, f"seed is {self.seed}; it must be at least 0, and below 2^60")


@dataclass
class ServeStoreConfig:
    """Run an S3 server on this machine."""

    folder: str = option("where its data is kept", "vlae-objects")
    bucket: str = option("a bucket that is made at the start", "vlae")
    port: int = option("its port on loopback; 0 takes a free one", 8333)

    def check(self) -> None:
        _check(0 <= self.port < 1 << 16, f"port is {self.port}; it must lie in 0..65535")


@dataclass
class DemoConfig(TuneConfig):
    """The main job from start to end on real images: store, shards, search, registry, evaluation."""

    folder: str = option("where everything is kept", "demo")
    bounds: BoundOptions = section(BoundOptions, "the final evaluation, on test images")


COMMANDS: dict[str, type] = {
    "shard": ShardConfig,
    "index": IndexConfig,
    "data": DataConfig,
    "plan": PlanConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "encode": EncodeConfig,
    "reconstruct": ReconstructConfig,
    "sample": SampleConfig,
    "registry": RegistryConfig,
    "theory": TheoryConfig,
    "serve-store": ServeStoreConfig,
    "demo": DemoConfig,
}


@functools.cache
def compose(command: str, *chosen: str) -> tuple[DictConfig, Mapping[str, str | None]]:
    """The values that ``configs/`` gives a command, and which choice of each config group they come from.

    ``chosen`` are choices other than the command's own, such as "model=tiny". Hydra takes 0.1 s for it, so it is asked once in a
    process. Raises HydraException.
    """
    with initialize_config_module("configs", version_base=None):
        composed = hydra.compose(command, list(chosen), return_hydra_config=True)
    names = {group: choice for group, choice in composed.hydra.runtime.choices.items() if not group.startswith("hydra/")}
    with open_dict(composed):
        del composed["hydra"]
    return composed, MappingProxyType(names)


def choices(command: str) -> Mapping[str, str | None]:
    """The config groups that a command composes, each with its default choice: {"dataset": "mnist", ...}."""
    return compose(command)[1]


def options_of(group: str) -> list[str]:
    """The choices that ``configs/`` holds for a group."""
    files = importlib.resources.files("configs") / group
    return sorted(file.name.removesuffix(".yaml") for file in files.iterdir() if file.name.endswith(".yaml"))


LOCAL_PATHS = (
    "storage.root",
    "dataset.path",
    "dataset.url",
    "dataset.cache",
    "dataset_url",
    "registry.artifacts",
    "output",
    "folder",
)


def describe(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every option below a schema as (dotted key, field), sections left out."""
    for item in dataclasses.fields(schema):
        nested = item.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from describe(nested, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def load(command: str, overrides: list[str]) -> Any:
    """The configuration of ``command`` (a key of COMMANDS), from its YAML and ``key=value`` overrides.

    A key that names a config group chooses a file of it (``model=fast``); any other sets a value (``model.window=7x4``).
    Raises UserError, in one sentence, on everything that is wrong with it.
    """
    groups, schema = choices(command), COMMANDS[command]
    chosen, values = [], {}
    for text in overrides:
        try:
            key, equals, value = text.partition("=")
            quoted = (
                f"{key}='{value}'" if equals and re.search(r"\{[^{}:]*\}.", value) and "'" not in value else text
            )  # a pattern
            override = OverridesParser.create().parse_override(quoted)
        except HydraException:
            raise UserError(f"{text!r} is not understood; write key=value, and quote a value of odd characters") from None
        key = override.key_or_group
        if override.type is not OverrideType.CHANGE or override.package or override.is_sweep_override():
            raise UserError(f"{text!r} is not understood; write plain key=value (to try many values, use vlae tune)")
        if key in groups:
            if override.value() is None and groups[key] is None:
                continue
            if override.value() not in options_of(key):
                raise UserError(f"{text!r}: there is no such {key}; choose one of {', '.join(options_of(key))}")
            chosen.append(text)
        else:
            values[key] = override.value()
    try:
        composed, _ = compose(command, *chosen)
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from None
    return build(schema, composed, values)


def build(schema: type[Config], base: Any, values: Mapping[str, Any]) -> Config:
    """A checked configuration from nested values and dotted ``values`` on top of them.

    Used for the command line, and for the samples of a search. Raises UserError as ``load`` does.
    """
    known = dict(describe(schema))
    mappings = tuple(f"{key}." for key, item in known.items() if typing.get_origin(item.type) is dict)
    key = "the configuration"
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), base)
        for key, value in values.items():
            if key not in known and not key.startswith(mappings):
                raise UserError(_unknown(key, known))
            OmegaConf.update(config, key, value, force_add=True)
        for key in known:
            parent, _, name = key.rpartition(".")
            if OmegaConf.is_missing(OmegaConf.select(config, parent) if parent else config, name):
                raise UserError(f"{key} is needed; give {key}=VALUE")
        for key in set(LOCAL_PATHS).intersection(known):
            # A folder means the same to every process, whatever its working directory.
            path = OmegaConf.select(config, key)
            if path and "://" not in path:
                OmegaConf.update(config, key, str(Path(path).expanduser().absolute()))
        built = typing.cast(Config, OmegaConf.to_object(config))
        _check_all(built)
        to_dict(built)  # so that what is left to resolve is resolved now or never
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{getattr(error, 'full_key', None) or key}: {_reason(error)}") from None
    return built


def _unknown(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return f"{key} is not an option" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _reason(error: Exception) -> str:
    """What is wrong with a value, from OmegaConf's error: its first line, the rest of which repeats the key and the class."""
    reason = str(error).splitlines()[0]
    if re.search(r"Optional|NoneType|ListConfig|DictConfig|InterpolationKey|Error|resolver", reason):
        return "this is not a kind of value that it takes; see --help"
    return reason


def _taken(config: Any, key: str, value: Any) -> Any:
    """A value of a searched option as its configuration holds it. Raises UserError if it is of another kind."""
    changed = OmegaConf.structured(config)
    try:
        OmegaConf.update(changed, key, value)
        taken = OmegaConf.select(changed, key)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"search.space.{key}: {_reason(error)}") from None
    plain = taken.value if isinstance(taken, Enum) else taken
    _check(plain == value, f"search.space.{key}: {value!r} is taken for {plain!r}; write it so")
    return taken


def _check_all(config: Any) -> None:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            _check_all(value)
    if hasattr(config, "check"):
        config.check()


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values, ready for JSON."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)  # type: ignore[return-value]


def identity(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a training run's configuration, as plain values: everything that its weights depend on, and nothing else."""
    no_matter = re.compile(r"keep_checkpoints|valid_.*|.*_seconds|micro_batch")
    train = {key: value for key, value in values["train"].items() if not no_matter.fullmatch(key)}
    dataset = {key: values["dataset"][key] for key in ("name", "url", "binarization")}
    return {"dataset": dataset, "model": values["model"], "optim": values["optim"], "train": train}


def digest(value: Any) -> str:
    """Eight hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
