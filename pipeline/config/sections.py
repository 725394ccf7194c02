"""The sections of options that several commands share."""

import os
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipeline.config.addresses import check_endpoint
from pipeline.config.options import option, require


@dataclass
class StorageOptions:
    root: str = option(
        "where all data is stored: a folder, or s3://bucket/prefix", "vlae-store", path=True
    )
    endpoint_url: str | None = option(
        "the S3 server's address, if not Amazon's; AWS_ENDPOINT_URL does the same", None
    )

    def check(self) -> None:
        require(bool(self.root), "storage.root is empty; give a folder, or s3://bucket/prefix")
        if self.endpoint_url is not None:
            check_endpoint("storage.endpoint_url", self.endpoint_url)

    def run_folder(self, run_name: str) -> str:
        """The address of the folder of the run of this name."""
        return f"{self.root}/runs/{run_name}"

    def export(self) -> None:
        """Set AWS_ENDPOINT_URL to ``endpoint_url``, if there is one.

        All S3 clients of this process read that variable: boto3's, Arrow's and MLflow's.
        """
        if self.endpoint_url:
            os.environ["AWS_ENDPOINT_URL"] = self.endpoint_url


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
    auto = "auto"
    dynamic = "dynamic"
    static = "static"
    none = "none"


@dataclass
class DatasetOptions:
    name: str = option("the name of the data set", name=True)
    source: Source = option(
        "what path holds: mnist (fetched), idx (IDX files), folder (images, one sub-folder per"
        " class), npz (arrays), tar (a folder tree), webdataset (shards), parquet (as Hugging Face"
        " keeps images), or synthetic (drawn from known probabilities)",
        identity=False,
    )
    path: str | None = option(
        "where the source's files are: a file or folder; s3:// too for folder, tar, webdataset,"
        " parquet",
        None,
        path=True,
        identity=False,
    )
    url: str = option(
        "where the shards and manifest.json are",
        "${storage.root}/datasets/${dataset.name}",
        path=True,
    )
    binarization: Binarization = option(
        "how pixels become black or white. dynamic: drawn anew each time an image is seen; static:"
        " drawn once per image; none: images keep their 256 values, and so does the likelihood;"
        " auto: as the data set's manifest says, and for vlae shard, as its source does",
        Binarization.auto,
    )
    cache: str | None = option(
        "a folder on each machine in which training caches shards, or the decoded pixels of image"
        " files if all fit; none is no cache",
        None,
        path=True,
        identity=False,
    )
    cache_gb: float = option(
        "the size limit of the cache, in gigabytes; the least recently used shards are evicted",
        20.0,
        above=0,
        below=1 << 30,
        identity=False,
    )
    max_skipped: int = option(
        "damaged or missing images that a worker may replace by others, with a warning, before it"
        " fails",
        0,
        at_least=0,
        identity=False,
    )


@dataclass
class ClusterOptions:
    address: str | None = option(
        "the address of a running Ray cluster; auto finds one on this machine, none starts one",
        None,
    )
    num_workers: Any = option(
        "workers of one training run; [MIN,MAX] is elastic: the run continues while hosts leave and"
        " join",
        1,
    )
    cpus_per_worker: int = option("CPU cores of each worker", 1, at_least=1)
    use_gpu: bool = option("give each worker a GPU", False)
    max_failures: int = option(
        "how many times in a row a run is restarted without making progress", 3, at_least=0
    )
    stuck_seconds: float = option(
        "seconds without a step after which a worker counts as stuck, and its run is restarted;"
        " reads are retried for 10 minutes while the storage is unavailable",
        660.0,
        at_least=5,
    )

    @property
    def min_workers(self) -> int:
        return self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def max_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers

    def check(self) -> None:
        numbers = self.num_workers if isinstance(self.num_workers, list) else [self.num_workers]
        require(
            all(type(number) is int and number >= 1 for number in numbers)
            and (
                numbers is not self.num_workers or (len(numbers) == 2 and numbers[0] <= numbers[1])
            ),
            f"cluster.num_workers is {self.num_workers}; it must be at least 1, or a range"
            " [MIN,MAX] of such numbers",
        )


@dataclass
class RegistryOptions:
    uri: str = option(
        "MLflow's server, or a SQLite file, for runs and registered models",
        "sqlite:///vlae-registry.db",
        path=True,
    )
    artifacts: str = option(
        "where the files of model versions are stored, if the registry is a SQLite file; a server"
        " decides for itself",
        "${storage.root}/registry",
        path=True,
    )
    pyfunc: bool = option(
        "also write MLmodel, so that mlflow.pyfunc loads a version; it checks nothing, and runs"
        " whatever module somebody with access to the bucket names there",
        False,
    )
    license: str | None = option(
        "the licence of the models that you register, as SPDX writes it, such as CC-BY-4.0", None
    )


@dataclass
class ShardOptions:
    samples_per_shard: int = option("images in one tar", 5000, at_least=1, below=1 << 32)
    block_size: int = option("images in one record of a tar", 250, at_least=1, below=1 << 32)
    encoding: Encoding = option(
        "npy stores small images in blocks; png and webp (lossless) store large ones singly; auto"
        " chooses by size",
        Encoding.auto,
    )
    valid_fraction: float = option(
        "part of the training images kept for validation, if the source has no split of its own",
        1 / 6,
        above=0,
        below=1,
    )
    test_fraction: float = option(
        "part of the images kept for the test, if the source has no split of its own",
        1 / 10,
        above=0,
        below=1,
    )
    image_size: int | None = option(
        "resize image files to this many pixels square; none keeps their size",
        None,
        at_least=1,
        below=1 << 14,
    )
    fit: Fit = option(
        "how images are resized: crop keeps the middle square, pad the whole on white, stretch the"
        " whole",
        Fit.crop,
    )
    channels: int | None = option(
        "1 makes image files grey, 3 RGB; none takes as many as any of them has", None
    )
    max_megapixels: float = option(
        "image files with more megapixels than this are not decoded", 64.0, above=0, below=1e6
    )
    max_unreadable: int = option(
        "unreadable image files that may be left out; report.json lists them",
        0,
        at_least=0,
    )
    image_column: str | None = option(
        "the column of Parquet files that holds images; none finds it", None
    )
    label_column: str | None = option(
        "the column of Parquet files, or the key of a sample's .json, that holds labels; none tries"
        " the usual names",
        None,
    )
    image_key: str | None = option(
        "which image of a WebDataset sample to take, if it has several: input for 0007.input.png",
        None,
    )
    seed: int = option("the seed of a synthetic data set's images", 0, at_least=0, below=1 << 63)

    def check(self) -> None:
        require(
            self.channels in (None, 1, 3),
            f"shard.channels is {self.channels}; it must be 1 (grey) or 3 (RGB)",
        )


@dataclass
class IndexOptions:
    train: str = option(
        "the shards: s3://bucket/{000000..000123}.tar, https:// or local ones likewise, or a folder"
        " of tars"
    )
    valid: str | None = option("the validation shards; by default some of train's", None)
    test: str | None = option("the test shards; by default some of train's", None)
    valid_fraction: float = option(
        "part of train's shards kept for validation, if it has none of its own",
        1 / 20,
        above=0,
        below=1,
    )
    test_fraction: float = option(
        "part of train's shards kept for the test, if it has none of its own",
        1 / 20,
        above=0,
        below=1,
    )
    image_size: int | None = option(
        "resize images to this many pixels square when they are read; none requires all to be of"
        " one size",
        None,
        at_least=1,
        below=1 << 14,
    )
    fit: Fit = option(
        "how images are resized: crop keeps the middle square, pad the whole on white, stretch the"
        " whole",
        Fit.crop,
    )
    channels: int | None = option(
        "1 makes images grey, 3 RGB; none takes as many as any of them has", None
    )
    label_key: str | None = option(
        "the key of a sample's .json that holds its label, if it has no .cls; none tries the usual"
        " names",
        None,
    )
    image_key: str | None = option(
        "which image of a sample to take, if it has several: input for 0007.input.png", None
    )
    max_megapixels: float = option(
        "images with more megapixels than this are refused", 64.0, above=0, below=1e6
    )

    def check(self) -> None:
        require(
            self.channels in (None, 1, 3),
            f"index.channels is {self.channels}; it must be 1 (grey) or 3 (RGB)",
        )
