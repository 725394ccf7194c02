"""Loaders of JPEG files for ``benchmarks/peers.py``: 256 x 256 in tars, read at 64 x 64.

The files are crops of scikit-learn's two photographs, of any size and place, mirrored and of any
brightness, in tars as img2dataset writes them: ``000000000.jpg``, ``.txt`` and ``.json``, at its
quality of 95. ``ours``, ``webdataset_pil``, ``webdataset_simplejpeg`` and ``spdl`` read these tars;
``streaming`` and ``litdata`` keep the same files as JPEG fields of their own formats.
"""

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import BATCH, Epoch, batches_of, from_s3, keys, upload
from PIL import Image

SIDE, WANTED, SHARD = 256, 64, 1000
Decode = Callable[[bytes], torch.Tensor]


def make(photographs: list[np.ndarray], count: int, seed: int = 0) -> Iterator[bytes]:
    """JPEG files, all different."""
    random = np.random.default_rng(seed)
    for number in range(count):
        whole = photographs[number % len(photographs)]
        side = int(random.integers(160, min(whole.shape[:2]) + 1))
        top, left = (int(random.integers(0, extent - side + 1)) for extent in whole.shape[:2])
        piece = whole[top : top + side, left : left + side, :][:, :: 1 if number % 4 < 2 else -1]
        brightness = random.uniform(0.7, 1.2)
        pixels = np.clip(piece * brightness, 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        yield file.getvalue()


def save(files: list[bytes], folder: Path) -> None:
    """For ``load``, in another process."""
    np.savez(folder / "files.npz", *(np.frombuffer(file, np.uint8) for file in files))


def load(folder: Path) -> list[bytes]:
    with np.load(folder / "files.npz") as saved:
        return [saved[name].tobytes() for name in saved.files]


def write_tars(files: list[bytes], folder: Path) -> None:
    """As img2dataset does."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(files), SHARD)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for index, content in enumerate(files[start : start + SHARD]):
                key = f"{number:05d}{index:04d}"
                stated = {"caption": f"photograph {key}", "key": key, "status": "success"}
                described = stated | {
                    "width": SIDE,
                    "height": SIDE,
                    "url": f"https://x.invalid/{key}",
                }
                for extension, part in (
                    ("jpg", content),
                    ("txt", stated["caption"].encode()),
                    ("json", json.dumps(described).encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(part)
                    archive.addfile(member, io.BytesIO(part))


# --- ours ------------------------------------------------------------------------------------


def ours_write(files: list[bytes], folder: Path, prefix: str) -> None:
    """The tars, and what ``vlae index`` writes: an index of each, and the manifest."""
    from pipeline.data import tar
    from pipeline.data.manifest import Manifest
    from pipeline.data.records import Index, Shard, checksum
    from pipeline.storage import open_storage

    write_tars(files, folder / "tars")
    storage, shards = open_storage(f"s3://benchmark/{prefix}"), []
    for path in sorted((folder / "tars").iterdir()):
        content = path.read_bytes()
        found = [
            member
            for member in tar.members(io.BytesIO(content), len(content))
            if member.name.endswith(".jpg")
        ]
        index = Index.to_bytes(
            [member.offset for member in found],
            [member.size for member in found],
            [checksum(member.content) for member in found],
            labels=[-1] * len(found),
            keys=[member.name.removesuffix(".jpg") for member in found],
        )
        name = f"train/{path.name}"
        index_name = name.replace(".tar", ".index.json")
        storage.write(name, content)
        storage.write(index_name, index)
        digests = [hashlib.sha256(each).hexdigest() for each in (content, index)]
        shards.append(Shard(name, len(content), digests[0], len(found), index_name, digests[1]))
    shape = (3, WANTED, WANTED)
    Manifest(
        "benchmark", shape, None, 1, {"train": tuple(shards)}, encoding="image", fit="crop"
    ).publish(storage)


# --- webdataset ------------------------------------------------------------------------------


def webdataset_pil(folder: Path, prefix: str, epochs: int) -> Epoch:
    """Decoded and resized by Pillow, as documented."""
    return _webdataset(folder, prefix, _by_pillow)


def webdataset_simplejpeg(folder: Path, prefix: str, epochs: int) -> Epoch:
    """libjpeg-turbo at a quarter of the size, with no filter after it: 37 dB from a full decode."""
    import simplejpeg

    def decode(content: bytes) -> torch.Tensor:
        pixels = simplejpeg.decode_jpeg(content, min_height=WANTED, min_width=WANTED)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    return _webdataset(folder, prefix, decode)


def _by_pillow(content: bytes) -> torch.Tensor:
    return _resized(Image.open(io.BytesIO(content)))


def _resized(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image.convert("RGB").resize((WANTED, WANTED)))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _webdataset(folder: Path, prefix: str, decode: Decode) -> Epoch:
    import webdataset as wds

    from_s3(wds)

    def epoch(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        urls = [f"s3://benchmark/{key}" for key in keys(_ours(prefix)) if key.endswith(".tar")]
        cache = str(folder / "cache")
        os.makedirs(cache, exist_ok=True)
        data = wds.WebDataset(
            urls, shardshuffle=len(urls), seed=number, empty_check=False, cache_dir=cache
        )
        data = data.shuffle(1000).to_tuple("jpg", "__key__").map_tuple(decode, int)
        return iter(wds.WebLoader(data.batched(BATCH), batch_size=None, num_workers=0))

    return epoch


def _ours(prefix: str) -> str:
    """Where ``ours`` keeps the tars."""
    return f"{prefix.rpartition('/')[0]}/ours"


# --- SPDL ------------------------------------------------------------------------------------


def spdl(folder: Path, prefix: str, epochs: int) -> Epoch:
    """Decoded and resized by FFmpeg, in as many threads as there are cores."""
    import boto3
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    client = boto3.client("s3")
    scaled = spdl.io.get_video_filter_desc(scale_width=WANTED, scale_height=WANTED, pix_fmt="rgb24")

    def contents(number: int) -> Iterator[bytes]:
        tars = [key for key in keys(_ours(prefix)) if key.endswith(".tar")]
        for shard in np.random.default_rng(number).permutation(len(tars)).tolist():
            body = client.get_object(Bucket="benchmark", Key=tars[shard])["Body"].read()
            with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    if member.name.endswith(".jpg") and file is not None:
                        yield file.read()

    def decode(content: bytes) -> np.ndarray:
        return spdl.io.to_numpy(spdl.io.load_image(content, filter_desc=scaled))

    def epoch(number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        threads = len(os.sched_getaffinity(0))
        pipeline = (
            PipelineBuilder()
            .add_source(contents(number))
            .pipe(decode, concurrency=threads)
            .aggregate(BATCH)
            .add_sink(2)
            .build(num_threads=threads)
        )
        with pipeline.auto_stop():
            for images in pipeline:
                pixels = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
                yield pixels, torch.zeros(len(images))

    return epoch


# --- MosaicML streaming ----------------------------------------------------------------------


def streaming_write(files: list[bytes], folder: Path, prefix: str) -> None:
    from streaming import MDSWriter

    path = folder / "photograph.jpg"
    with MDSWriter(out=str(folder / "mds"), columns={"x": "jpeg", "y": "int"}) as writer:
        for number, content in enumerate(files):
            path.write_bytes(content)
            writer.write({"x": Image.open(path), "y": number})  # it copies the file
    upload(folder / "mds", prefix)


def streaming(folder: Path, prefix: str, epochs: int) -> Epoch:
    from streaming import StreamingDataLoader, StreamingDataset

    class Photographs(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, number: int) -> Any:
            item = super().__getitem__(number)
            return _resized(item["x"]), item["y"]

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    data = Photographs(
        remote=f"s3://benchmark/{prefix}",
        local=str(folder / "local"),
        shuffle=True,
        batch_size=BATCH,
    )
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=0)
    return lambda number: iter(loader)


# --- litdata ---------------------------------------------------------------------------------


def litdata_write(files: list[bytes], folder: Path, prefix: str) -> None:
    import litdata

    (folder / "files").mkdir()
    inputs = []
    for number, content in enumerate(files):
        path = folder / f"files/{number:06d}.jpg"
        path.write_bytes(content)
        inputs.append((str(path), number))
    litdata.optimize(opened, inputs, str(folder / "lit"), chunk_bytes="16MB", num_workers=1)
    upload(folder / "lit", prefix)


def opened(item: tuple[str, int]) -> tuple[Image.Image, int]:
    return Image.open(item[0]), item[1]


def litdata(folder: Path, prefix: str, epochs: int) -> Epoch:
    """Decoded and resized by torchvision."""
    import importlib

    import litdata as lit
    from torchvision.transforms.v2.functional import resize

    class Photographs(lit.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            image, label = super().__getitem__(index)
            return resize(image, [WANTED, WANTED], antialias=True), label

    downloader = importlib.import_module("litdata.streaming.downloader")
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # no public option does this
    data = Photographs(
        f"s3://benchmark/{prefix}",
        cache_dir=str(folder / "local"),
        shuffle=True,
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        seed=0,
    )
    loader = lit.StreamingDataLoader(data, batch_size=BATCH, num_workers=0, shuffle=True)
    return lambda number: iter(loader)


# --- ceilings --------------------------------------------------------------------------------


def one_core(folder: Path, prefix: str, epochs: int) -> Epoch:
    """Ours on one core, from a local folder: the server needs cores too."""
    return _on_cores(1, folder, prefix, epochs)


def two_cores(folder: Path, prefix: str, epochs: int) -> Epoch:
    return _on_cores(2, folder, prefix, epochs)


def _on_cores(count: int, folder: Path, prefix: str, epochs: int) -> Epoch:
    from pipeline.storage import open_storage

    place = folder / "local"
    source, target = open_storage(f"s3://benchmark/{_ours(prefix)}"), open_storage(str(place))
    for key in source.list():
        target.write(key, source.read(key))
    os.sched_setaffinity(0, set(itertools.islice(sorted(os.sched_getaffinity(0)), count)))
    return batches_of(str(place), None, epochs)
