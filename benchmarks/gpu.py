"""What a GPU does with the models, in under eight minutes; the images are made here.

    python benchmarks/gpu.py [--device cpu --small]

* matrix_tflops: the card's own throughput, of products of square matrices.
* training: images per second of whole steps (forward, backward, clipping, Adam, moving average) of
  each preset at several batches, in float32 and bfloat16; the share of the card's throughput in
  that precision that their matrix products and convolutions reach; and the peak of memory, beside
  what ``vlae plan`` gives.
* compiled: a step of ``fast`` with ``torch.compile``, and with CUDA graphs (``reduce-overhead``).
* loader: images per second from shards on disk to the device, and of training with the loader.
* curves: the validation code length of ``fast`` on images of bars, in float32 and bfloat16.
* nccl: a step under DDP with a single rank, relative to one without.
* evaluate: (image, sample) pairs per second of ``vlae evaluate``.

Each part has a time limit, and a part that fails says why. ``--small`` only shows that all parts
run. The last line is JSON.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from pipeline import commands
from pipeline.config.evaluation import BoundOptions
from pipeline.config.run import TrainConfig
from pipeline.config.sections import Encoding
from pipeline.data import DataSet
from pipeline.data.loader import TrainLoader
from pipeline.data.manifest import Manifest
from pipeline.data.writer import write_images
from pipeline.evaluation import estimates
from pipeline.machine import device, num_cores
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.training import loop, plan
from pipeline.training.learner import Learner

SHAPES = {
    "fast": (1, 28, 28),
    "colour": (3, 32, 32),
    "paper_cifar": (3, 32, 32),
    "large": (3, 64, 64),
}
BATCHES = (16, 64, 256, 1024)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PART_SECONDS = 60.0
"""The most that one part takes, but for the measurement that it is in; ``training`` takes 3."""
LAST_START = 360.0
"""Seconds after which no further part begins."""


class Bench:
    """The device, the sizes of everything, and a clock that waits for the device."""

    def __init__(self, place: torch.device, small: bool) -> None:
        self.device, self.small = place, small
        self.deadline = 0.0

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 20) -> float:
        """The median time of a call, after three to warm up, within about two seconds."""
        for _ in range(1 if self.small else 3):
            work()
        self.sync()
        found, end = list[float](), time.perf_counter() + 2
        while len(found) < (1 if self.small else repeats) and time.perf_counter() < end:
            started = time.perf_counter()
            work()
            self.sync()
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    @property
    def is_late(self) -> bool:
        return time.perf_counter() > self.deadline


def options(preset: str, batch: int, precision: str, *more: str) -> TrainConfig:
    """The options of a run, with one stream for each image of the batch up to eight."""
    kind = [f"dataset.binarization={'none' if SHAPES[preset][0] == 3 else 'dynamic'}"]
    words = [f"model={preset}", "dataset.name=bars", f"train.precision={precision}"]
    sizes = [f"train.global_batch={batch}", f"train.num_streams={min(8, batch)}"]
    return commands.load("train", [*words, *sizes, *kind, *more])


def images_like(config: TrainConfig, preset: str, batch: int) -> torch.Tensor:
    """Random images as the preset's likelihood has them."""
    most = 255 if SHAPES[preset][0] == 3 else 1
    return torch.randint(0, most + 1, (batch, *SHAPES[preset])) / most


def step_of(bench: Bench, preset: str, batch: int, precision: str) -> tuple[Learner, Any, Any]:
    config = options(preset, batch, precision)
    learner = Learner(config, SHAPES[preset], 1, bench.device)
    x = images_like(config, preset, batch).to(bench.device)
    return learner, x, torch.randn(batch, learner.model.latents, device=bench.device)


def matrix(bench: Bench) -> dict[str, float]:
    """Tera operations per second of a matrix product in each precision."""
    size, found = 256 if bench.small else 8192, {}
    for name, dtype in PRECISIONS.items():
        left, right = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in "ab")
        seconds = bench.seconds(lambda a=left, b=right: a @ b)
        found[name] = round(2 * size**3 / seconds / 1e12, 2)
    return found


def training(bench: Bench, throughput: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each preset, precision and batch."""
    for preset, shape in SHAPES.items():
        kept = plan.kept_for_backward(options(preset, 1, "float32").build(shape))
        for batch in (2,) if bench.small else BATCHES:
            for precision in PRECISIONS:
                if bench.is_late:
                    return
                row: dict[str, Any] = {"model": preset, "batch": batch, "precision": precision}
                try:
                    row |= steps(bench, preset, batch, precision, throughput[precision])
                    row["planned_memory_mb"] = (row.pop("state_bytes") + batch * kept) >> 20
                except torch.OutOfMemoryError:
                    row |= {"images_per_s": None, "why": "out of memory"}
                yield row


def steps(
    bench: Bench, preset: str, batch: int, precision: str, throughput: float
) -> dict[str, Any]:
    """The speed and memory of steps; ``state_bytes`` are planned for all but activations."""
    learner, x, noise = step_of(bench, preset, batch, precision)
    is_cuda = bench.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counted:
        learner.backward(x, noise, 0)
    seconds = bench.seconds(lambda: learner.step(x, noise, 0))
    reached = counted.get_total_flops() / seconds / 1e12
    return {
        "images_per_s": round(batch / seconds),
        "share_of_matrix_throughput": round(reached / throughput, 4),
        "peak_memory_mb": torch.cuda.max_memory_allocated() >> 20 if is_cuda else None,
        "state_bytes": 5 * 4 * learner.weights.numel(),
    }


def compiled(bench: Bench) -> dict[str, Any]:
    """Images per second of a forward and backward pass of ``fast``, in each way to run it."""
    batch = 2 if bench.small else 256
    found: dict[str, Any] = {"batch": batch}
    for mode in (None, "default", "reduce-overhead"):
        learner, x, noise = step_of(bench, "fast", batch, "bfloat16")
        network = learner.model if mode is None else torch.compile(learner.model, mode=mode)

        def work(network: Any = network, x: Any = x, noise: Any = noise) -> None:
            with torch.autocast(bench.device.type, torch.bfloat16):
                loss = -network(x, noise).elbo.mean()
            loss.backward()

        started = time.perf_counter()
        try:
            work()
            bench.sync()
            found[mode or "eager"] = {
                "images_per_s": round(batch / bench.seconds(work)),
                "first_step_s": round(time.perf_counter() - started, 1),
            }
        except Exception as error:  # noqa: BLE001  (a compiler that is missing is a result)
            found[mode or "eager"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def make_data(root: str, small: bool) -> DataSet:
    """Shards of 28x28 images with two bright bars each, whose places and widths vary."""
    storage, splits = open_storage(f"{root}/datasets/bars"), {}
    counts = {"train": 30_000, "valid": 1_000, "test": 1_000}
    for number, (split, count) in enumerate(counts.items()):
        count = min(count, 100) if small else count
        random = np.random.default_rng(number)
        images = np.zeros((count, 28, 28, 1), np.uint8)
        places, widths = random.integers(2, 22, (count, 2)), random.integers(2, 6, (count, 2))
        for image, (row, column), (tall, wide) in zip(images, places, widths, strict=True):
            image[row : row + tall, 3:-3] = image[3:-3, column : column + wide] = 220
        shard = write_images(
            storage,
            f"{split}/00000.tar",
            0,
            list(images),
            np.full(count, -1, dtype=np.int64),
            250,
            Encoding.npy,
        )
        splits[split] = (shard,)
    recipe = {"source": "bars"}
    manifest = Manifest("bars", SHAPES["fast"], None, 250, splits, recipe, binarization="dynamic")
    manifest.publish(storage)
    return DataSet(storage, manifest)


def loader(bench: Bench, data: DataSet) -> dict[str, Any]:
    """Images per second of the loader alone, and of ``fast`` with it and without."""
    batch = 16 if bench.small else 256
    steps = 4 if bench.small else 200

    def batches() -> Iterator[Any]:
        return iter(TrainLoader(data, seed=0, global_batch=batch, num_streams=8, num_steps=steps))

    started = time.perf_counter()
    for each in batches():
        each.images.to(bench.device, non_blocking=True)
    bench.sync()
    alone = steps * batch / (time.perf_counter() - started)
    shape = data.manifest.image_shape
    config = options("fast", batch, "bfloat16")
    learner = Learner(config, shape, 1, bench.device)
    first = next(batches())
    learner.learn(first)
    bench.sync()
    started = time.perf_counter()
    for each in batches():
        learner.learn(each)
    bench.sync()
    fed = steps * batch / (time.perf_counter() - started)
    x = (first.images / 255).to(bench.device)
    noise = torch.randn(batch, learner.model.latents, device=bench.device)
    unfed = batch / bench.seconds(lambda: learner.step(x, noise, 0))
    return {"batch": batch, "loader": round(alone), "training": round(fed), "steps": round(unfed)}


def curves(bench: Bench, root: str) -> dict[str, list[list[float]]]:
    """Images seen and the code length on validation images, in nats."""
    found = {}
    for precision in PRECISIONS:
        images = 64 if bench.small else 64_000
        config = options(
            "fast", 16 if bench.small else 64, precision, f"storage.root={root}",
            f"name=curve-{precision}", f"train.images={images}",
            f"train.valid_every={images // 4}", "train.valid_images=64",
        )  # fmt: skip
        loop.fit(config, device=bench.device)
        found[precision] = [
            [row["valid/images"], round(row["valid/elbo_nats"], 3)]
            for row in Run.of(config).rows()
            if "valid/elbo_nats" in row
        ]
    return found


def nccl(bench: Bench) -> dict[str, Any]:
    """The time of a step under DDP with one rank, relative to one without."""
    batch = 2 if bench.small else 64
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            seconds = []
            for wrapped in (False, True):
                learner, x, noise = step_of(bench, "fast", batch, "float32")
                if wrapped:
                    learner.network = torch.nn.parallel.DistributedDataParallel(learner.model)
                seconds.append(bench.seconds(lambda: learner.step(x, noise, 0)))  # noqa: B023
        finally:
            dist.destroy_process_group()
    return {"backend": backend, "relative_time": round(seconds[1] / seconds[0], 3)}


def evaluate(bench: Bench, root: str, data: DataSet) -> dict[str, Any]:
    """Pairs of an image and a sample per second, of the model that ``curves`` has trained."""
    model = Run.at(f"{root}/runs/curve-float32").open()
    images, samples = (2, 64) if bench.small else (128, 4096)
    bounds = BoundOptions(samples=samples, num_images=images)

    def work(seed: int) -> None:
        bounds.seed = seed
        output = open_storage(f"{root}/evaluation")
        list(estimates.estimate_split(model, data, output, "test", bounds, None))

    work(0)
    started = time.perf_counter()
    work(1)
    return {
        "samples": samples,
        "pairs_per_s": round(images * samples / (time.perf_counter() - started)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=str(device()))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(torch.device(arguments.device), arguments.small)
    is_cuda = bench.device.type == "cuda"
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if is_cuda else platform.processor() or "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cores": num_cores(),
        "small": arguments.small,
    }
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        data = make_data(root, arguments.small)
        parts: dict[str, Callable[[], Any]] = {
            "matrix_tflops": lambda: matrix(bench),
            "training": lambda: list(training(bench, result["matrix_tflops"])),
            "loader": lambda: loader(bench, data),
            "curves": lambda: curves(bench, root),
            "nccl": lambda: nccl(bench),
            "evaluate": lambda: evaluate(bench, root, data),
            "compiled": lambda: compiled(bench),
        }
        for name, part in parts.items():
            started = time.perf_counter()
            if started > begin + LAST_START:
                result[name] = "left out: no time"
                continue
            bench.deadline = started + (3 if name == "training" else 1) * PART_SECONDS
            try:
                result[name] = part()
            except Exception as error:  # noqa: BLE001  (the other parts are worth having)
                traceback.print_exc()
                result[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} ({time.perf_counter() - started:.0f} s): {json.dumps(result[name])}")
    result["seconds"] = round(time.perf_counter() - begin)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
