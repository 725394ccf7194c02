"""The child process of ``benchmarks/loader.py``: one loader, for some epochs.

To write a data set in a loader's format, it reads ``images.npy`` and ``labels.npy`` of a folder; to
measure, it reads that data set back from S3. Each loader shuffles, and yields batches of tensors:
images uint8 ``(batch, channels, height, width)``.
"""

import importlib
import io
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch

BATCH, SHARD = 128, 5000
Epoch = Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]


def upload(folder: Path, prefix: str) -> None:
    client = boto3.client("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), "benchmark", f"{prefix}/{path.relative_to(folder)}")


def keys(prefix: str) -> list[str]:
    return [
        item["Key"]
        for item in boto3.client("s3").list_objects_v2(Bucket="benchmark", Prefix=f"{prefix}/")[
            "Contents"
        ]
    ]


# --- ours ------------------------------------------------------------------------------------


def ours_write(images: np.ndarray, labels: np.ndarray, folder: Path, prefix: str) -> None:
    from pipeline.config.sections import Encoding
    from pipeline.data.manifest import Manifest
    from pipeline.data.writer import write_images
    from pipeline.storage import open_storage

    storage = open_storage(f"s3://benchmark/{prefix}")
    shards = tuple(
        write_images(
            storage,
            f"train/{n:05d}.tar",
            start,
            images[start : start + SHARD].transpose(0, 2, 3, 1),
            labels[start : start + SHARD],
            250,
            Encoding.npy,
        )
        for n, start in enumerate(range(0, len(images), SHARD))
    )
    Manifest("benchmark", images.shape[1:], 10, 250, {"train": shards}).publish(storage)


def ours(folder: Path, prefix: str, epochs: int) -> Epoch:
    return batches_of(f"s3://benchmark/{prefix}", folder / "cache", epochs)


def batches_of(url: str, cache: Path | None, epochs: int) -> Epoch:
    from pipeline.data import DataSet
    from pipeline.data.cache import ShardCache
    from pipeline.data.loader import TrainLoader
    from pipeline.data.reader import ReadOptions
    from pipeline.storage import open_storage

    data = DataSet.load(open_storage(url))
    steps = data.manifest.num_samples("train") // BATCH
    batches = iter(
        TrainLoader(
            data,
            seed=0,
            global_batch=BATCH,
            num_streams=8,
            num_steps=epochs * steps,
            options=ReadOptions(ShardCache(cache, 10**10) if cache else None),
        )
    )
    return lambda number: (
        (batch.images, batch.labels) for batch in itertools.islice(batches, steps)
    )


def ours_uncached(folder: Path, prefix: str, epochs: int) -> Epoch:
    return batches_of(f"s3://benchmark/{prefix.replace('ours_uncached', 'ours')}", None, epochs)


# --- webdataset ------------------------------------------------------------------------------


def webdataset_write(images: np.ndarray, labels: np.ndarray, folder: Path, prefix: str) -> None:
    import webdataset
    from PIL import Image

    (folder / "wds").mkdir()
    for number, start in enumerate(range(0, len(images), SHARD)):
        with webdataset.TarWriter(str(folder / f"wds/{number:05d}.tar"), encoder=False) as writer:
            for index in range(start, min(start + SHARD, len(images))):
                file = io.BytesIO()
                pixels = images[index].transpose(1, 2, 0)
                Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(
                    file, "PNG"
                )
                writer.write(
                    {
                        "__key__": f"{index:06d}",
                        "png": file.getvalue(),
                        "cls": str(labels[index]).encode(),
                    }
                )
    upload(folder / "wds", prefix)


def webdataset(folder: Path, prefix: str, epochs: int) -> Epoch:
    """One PNG per image: decoded, shuffled and batched as documented."""
    import webdataset as wds

    from_s3(wds)

    def tensor(pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(
            pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy()
        )

    def epoch(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        mode = "l8" if "grey" in prefix else "rgb8"
        urls = [f"s3://benchmark/{key}" for key in keys(prefix)]
        cache = str(folder / "cache")
        os.makedirs(cache, exist_ok=True)
        data = wds.WebDataset(
            urls, shardshuffle=len(urls), seed=number, empty_check=False, cache_dir=cache
        )
        data = data.shuffle(1000).decode(mode).to_tuple("png", "cls").map_tuple(tensor, int)
        return iter(wds.WebLoader(data.batched(BATCH), batch_size=None, num_workers=0))

    return epoch


def hand_loop(folder: Path, prefix: str, epochs: int) -> Epoch:
    """Our own tars of blocks, read by webdataset, shuffled within 4 blocks."""
    import webdataset as wds

    from_s3(wds)

    def epoch(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        urls = [
            f"s3://benchmark/{key}"
            for key in keys(prefix.replace("hand_loop", "ours"))
            if key.endswith(".tar")
        ]
        cache = str(folder / "cache")
        os.makedirs(cache, exist_ok=True)
        data = wds.WebDataset(
            urls, shardshuffle=len(urls), seed=number, empty_check=False, cache_dir=cache
        )
        generator, held = np.random.default_rng(number), list[Any]()
        for pair in data.shuffle(20).decode().to_tuple("images.npy", "labels.npy"):
            held.append(pair)
            if len(held) == 4:
                yield from batches(held, generator)
                held = []
        if held:
            yield from batches(held, generator)

    def batches(
        held: list[Any], generator: np.random.Generator
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, labels = (np.concatenate(column) for column in zip(*held, strict=True))
        order = generator.permutation(len(labels))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            yield torch.from_numpy(images[part]), torch.from_numpy(labels[part])

    return epoch


def from_s3(wds: Any) -> None:
    """Give webdataset a handler for S3, which it lacks."""
    client = boto3.client("s3")

    def get(url: str, *_: Any, **__: Any) -> Any:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return client.get_object(Bucket=bucket, Key=key)["Body"]

    sys.modules["webdataset.gopen"].gopen_schemes["s3"] = get


# --- MosaicML streaming ----------------------------------------------------------------------


def streaming_write(images: np.ndarray, labels: np.ndarray, folder: Path, prefix: str) -> None:
    from streaming import MDSWriter

    shape = ",".join(map(str, images.shape[1:]))
    with MDSWriter(
        out=str(folder / "mds"), columns={"x": f"ndarray:uint8:{shape}", "y": "int"}
    ) as writer:
        for image, label in zip(images, labels, strict=True):
            writer.write({"x": image, "y": int(label)})
    upload(folder / "mds", prefix)


def streaming(folder: Path, prefix: str, epochs: int) -> Epoch:
    from streaming import StreamingDataLoader, StreamingDataset

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    data = StreamingDataset(
        remote=f"s3://benchmark/{prefix}",
        local=str(folder / "local"),
        shuffle=True,
        batch_size=BATCH,
    )
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=0)
    return lambda number: ((batch["x"], batch["y"]) for batch in loader)


# --- litdata ---------------------------------------------------------------------------------


def litdata_write(images: np.ndarray, labels: np.ndarray, folder: Path, prefix: str) -> None:
    import litdata

    pairs = [
        (torch.from_numpy(image), int(label)) for image, label in zip(images, labels, strict=True)
    ]
    litdata.optimize(
        identity,
        pairs,
        str(folder / "lit"),
        chunk_bytes="4MB" if len(images) > 10_000 else "16MB",
        num_workers=1,
    )
    upload(folder / "lit", prefix)


def identity(item: Any) -> Any:
    return item


def litdata(folder: Path, prefix: str, epochs: int) -> Epoch:
    import litdata as lit

    downloader = importlib.import_module("litdata.streaming.downloader")
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # no public option does this
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    data = lit.StreamingDataset(
        f"s3://benchmark/{prefix}",
        cache_dir=str(folder / "local"),
        shuffle=True,
        storage_options=options,
        seed=0,
    )
    loader = lit.StreamingDataLoader(data, batch_size=BATCH, num_workers=0, shuffle=True)
    return lambda number: iter(loader)


# --- ceilings --------------------------------------------------------------------------------


def raw_get(folder: Path, prefix: str, epochs: int) -> Epoch:
    """Reads the bytes of our shards and discards them."""
    client = boto3.client("s3")
    images, labels = np.load(folder.parent / "images.npy"), np.load(folder.parent / "labels.npy")
    shards = [key for key in keys(prefix.replace("raw_get", "ours")) if key.endswith(".tar")]

    def epoch(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for key in shards:
            client.get_object(Bucket="benchmark", Key=key)["Body"].read()
        yield torch.from_numpy(images), torch.from_numpy(labels)  # so that they are counted

    return epoch


def memory(folder: Path, prefix: str, epochs: int) -> Epoch:
    """Batches of images in memory, by numpy indexing."""
    images, labels = np.load(folder.parent / "images.npy"), np.load(folder.parent / "labels.npy")

    def epoch(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = np.random.default_rng(number).permutation(len(images))
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            yield torch.from_numpy(images[part]), torch.from_numpy(labels[part])

    return epoch


def main() -> None:
    action, name, folder, prefix, epochs = (
        sys.argv[1],
        sys.argv[2],
        Path(sys.argv[3]),
        sys.argv[4],
        int(sys.argv[5]),
    )
    random.seed(0)
    loaders = dict(globals())
    if prefix.startswith("jpeg"):
        sys.modules["peers"] = sys.modules["__main__"]  # which photographs.py imports
        loaders |= vars(importlib.import_module("photographs"))
    if action == "write":
        source = folder.parent
        if prefix.startswith("jpeg"):
            loaders[f"{name}_write"](loaders["load"](source), folder, prefix)
        else:
            images, labels = np.load(source / "images.npy"), np.load(source / "labels.npy")
            loaders[f"{name}_write"](images, labels, folder, prefix)
        return
    epoch = loaders[name](folder, prefix, epochs)
    count, wall, cpu = 0, time.perf_counter(), time.process_time()
    for number in range(epochs):
        for images, labels in epoch(number):
            count += len(labels)
            assert images.dtype == torch.uint8
    found = {"images": count, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print("found: " + json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # some loaders leave threads that end slowly


if __name__ == "__main__":
    main()
