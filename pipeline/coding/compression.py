"""A split of a data set to a file, and the file to a data set: a Ray task for each block.

Blocks depend only on the number of images and the options, so any number of tasks writes the same
file. A file of one block is written and read in this process, without Ray.
"""

import hashlib
import math
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline import noise
from pipeline.coding import blocks, container, lossy
from pipeline.coding.container import Frame, Header, Reader, Writer
from pipeline.config.sections import Binarization, Encoding
from pipeline.data import DataSet
from pipeline.data.batch import binarize
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Manifest, load_made_by
from pipeline.data.order import even_part
from pipeline.data.records import Shard
from pipeline.data.writer import write_images
from pipeline.errors import DamagedData, UserError
from pipeline.machine import keep_freed_memory
from pipeline.noise import Purpose
from pipeline.progress import progress_bar
from pipeline.runs import OpenedModel
from pipeline.storage.base import Storage
from pipeline.tasks import here_or_in_tasks
from pipeline.values import JsonObject
from vlae.model import VLAE

BATCH = 64
"""Images that are read at a time."""
RATE_IMAGES = 500
"""Images on which the rate is measured, from which the length of a lossy code follows."""
RECORD = 100
"""Images of a record of the data set that is given back."""


def compress(
    model: OpenedModel,
    data: DataSet,
    split: str,
    output: Storage,
    key: str,
    *,
    images_per_block: int,
    names: bool,
    bits: int | None,
    sent: int | None,
    seed: int,
    connect: Callable[[], None],
) -> JsonObject:
    """Write a split to the object ``key`` of ``output``, atomically. Returns what was written.

    ``names`` keeps keys and labels. With ``bits`` an image's code is sent alone, in that many bits:
    its first ``sent`` latents, by default all. ``connect`` connects to Ray, and is
    called if there is more than one block. Raises UserError if there is no such split, or images of
    this model cannot be coded exactly.
    """
    network, total = ready(model.network), data.manifest.num_samples(split)
    num_blocks = math.ceil(total / images_per_block)
    codes = None if bits is None else lossy.candidates(network, bits, seed, sent)
    header = Header(
        model=model.weights,
        data=data.manifest.digest,
        name=data.manifest.name,
        split=split,
        image_shape=list(network.image_shape),
        num_classes=data.manifest.num_classes if names else None,
        class_names=data.manifest.class_names if names else None,
        images=total,
        blocks=num_blocks,
        seed=seed,
        bits=bits,
        canary=canary(network) if codes is None else "",
        machine=machine(),
        sent=sent,
    )
    _check_output(output, key, header)
    settings = (split, model.binarization, seed, names, num_blocks)
    initial = names_bytes = payload = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / key
        with path.open("wb") as file:
            writer = Writer(file, header)
            calls = ((*settings, number) for number in range(num_blocks))
            parts = here_or_in_tasks(
                compress_block,
                (network, data, codes),
                calls,
                connect if num_blocks > 1 else None,
            )
            with progress_bar(total, split) as bar:
                for frame in parts:
                    writer.add(frame)
                    bar.update(frame.images)
                    initial += 32 * frame.initial_words
                    names_bytes += len(frame.names)
                    payload += len(frame.payload)
            writer.finish()
        size = path.stat().st_size
        output.upload(key, path)
    pixels = math.prod(network.image_shape)
    return {
        "model": model.reference,
        "weights": model.weights,
        "manifest": data.manifest.digest,
        "split": split,
        "url": f"{output.url}/{key}",
        "images": total,
        "blocks": num_blocks,
        "lossy_bits": bits,
        "lossy_latents": sent,
        "bytes": size,
        "initial_bits": initial,
        "names_bytes": names_bytes,
        "container_bytes": size - payload - names_bytes,
        "bits_per_image": 8 * size / total if total else None,
        "bits_per_dim": 8 * size / (total * pixels) if total else None,
    }


def _check_output(output: Storage, key: str, header: Header) -> None:
    """Raise UserError if there is another file, which may be the only copy of its images."""
    if not output.exists(key):
        return
    with suppress(UserError):
        if Reader(output.stream(key), key).header == header:
            return
    raise UserError(
        f"{output.url}/{key} holds other compressed images, or is damaged; give another output=, or"
        " delete that file"
    )


def compress_block(
    model: VLAE,
    data: DataSet,
    codes: Tensor | None,
    split: str,
    binarization: Binarization,
    seed: int,
    names: bool,
    num_blocks: int,
    number: int,
) -> Frame:
    """Compress one block of a split."""
    keep_freed_memory()
    loader = EvalLoader(data, split=split, batch_size=BATCH, rank=number, world_size=num_blocks)
    images, keys, labels = list[Tensor](), list[str](), list[int]()
    for batch in loader:
        images.append(binarize(batch, binarization, seed))
        if names:
            keys += loader.keys(batch) or []
            labels += batch.labels.tolist()
    x = torch.cat(images)
    packed = container.pack_names(keys or None, labels) if names else b""
    try:
        if codes is not None:
            with blocks.single_thread():
                payload = lossy.encode(model, x, codes, seed)
            return Frame(number, len(x), 0, bytes(container.CHECKSUM), packed, payload)
        block = blocks.encode(model, x, seed, number)
    except ValueError as error:  # a prior or posterior without an exact code
        raise UserError(str(error)) from None
    return Frame(number, len(x), block.initial_words, block.pixels, packed, block.payload)


def decompress(
    model: OpenedModel,
    source: Storage,
    key: str,
    output: Storage,
    *,
    most_likely: bool,
    connect: Callable[[], None],
) -> JsonObject:
    """Write the images of a file as a data set to ``output``, one shard for each block.

    The manifest, written last, makes the data set exist. ``most_likely`` gives the most likely
    pixels of a lossy file instead of a draw. Raises UserError if the file is none, or another model
    wrote it, or this machine computes other probabilities; DamagedData if it is damaged.
    """
    url, network = f"{source.url}/{key}", ready(model.network)
    reader = Reader(source.stream(key), url)
    header = reader.header
    _check(header, model, network, url, most_likely)
    recipe = {
        "source": "decompressed",
        "file": url,
        "header": container.checksum(header.to_bytes()).hex(),
        "draw": "mode" if most_likely else "sample",
    }
    load_made_by(output, recipe)
    codes = (
        None
        if header.bits is None
        else lossy.candidates(network, header.bits, header.seed, header.sent)
    )
    shards: dict[int, Shard] = {}
    calls = ((header, url, most_likely, frame) for frame in reader.frames())
    given = (network, output, codes)
    with progress_bar(header.images, "images") as bar:
        shards_made = here_or_in_tasks(
            decompress_block, given, calls, connect if header.blocks > 1 else None
        )
        for number, shard in shards_made:
            shards[number] = shard
            bar.update(shard.num_samples)
    found = sum(shard.num_samples for shard in shards.values())
    if found != header.images:
        raise DamagedData(f"{url} is damaged: it holds {found:,} of its {header.images:,} images")
    manifest = Manifest(
        header.name,
        network.image_shape,
        header.num_classes,
        RECORD,
        {header.split: tuple(shards[number] for number in sorted(shards))},
        recipe,
        pixels="binary" if model.binarization is not Binarization.none else "values",
        binarization=model.binarization.value,
        class_names=header.class_names,
    )
    manifest.publish(output)
    return {
        "url": output.url,
        "file": url,
        "split": header.split,
        "images": header.images,
        "lossy_bits": header.bits,
        "manifest": manifest.digest,
    }


def decompress_block(
    model: VLAE,
    output: Storage,
    codes: Tensor | None,
    header: Header,
    url: str,
    most_likely: bool,
    frame: Frame,
) -> tuple[int, Shard]:
    """Decompress one block to a shard; returns the block's number and the shard."""
    keep_freed_memory()
    first, stop = even_part(header.images, frame.number, header.blocks)
    try:
        keys, labels = container.unpack_names(frame.names, frame.images)
        if stop - first != frame.images:
            raise DamagedData(f"it has {frame.images} images, not {stop - first}")
        x = _images(model, codes, header, frame, first, most_likely)
    except DamagedData as error:
        raise DamagedData(f"{url} is damaged: block {frame.number}: {error}") from None
    return frame.number, write_images(
        output,
        f"{header.split}/{frame.number:05d}.tar",
        first,
        list(blocks.to_bytes(x).transpose(0, 2, 3, 1)),
        np.array(labels, dtype=np.int64),
        RECORD,
        Encoding.npy,
        keys,
    )


def _images(
    model: VLAE,
    codes: Tensor | None,
    header: Header,
    frame: Frame,
    first: int,
    most_likely: bool,
) -> Tensor:
    if codes is None or header.bits is None:
        block = blocks.Block(frame.payload, frame.initial_words, frame.pixels)
        return blocks.decode(model, block, frame.images, header.seed, frame.number)
    if 8 * len(frame.payload) < frame.images * header.bits:
        raise DamagedData("it is too short")
    numbers = lossy.unpack(frame.payload, frame.images, header.bits)
    with blocks.single_thread():
        z = codes[torch.from_numpy(numbers)]
        return lossy.redraw(model, z, header.seed, first, most_likely)


def _check(header: Header, model: OpenedModel, network: VLAE, url: str, most_likely: bool) -> None:
    """Raise UserError if this model on this machine cannot decompress the file."""
    if header.model != model.weights:
        raise UserError(
            f"{url} was compressed with the model of sha256 {header.model[:12]}, not with"
            f" {model.reference} of sha256 {model.weights[:12]}; give that model by model="
        )
    if header.image_shape != list(network.image_shape):
        raise DamagedData(
            f"{url} is damaged: its images have the shape {header.image_shape}, those of its model"
            f" {list(network.image_shape)}"
        )
    if header.bits is None and most_likely:
        raise UserError(
            f"draw=mode redraws the images of a lossy file, but {url} holds every pixel; leave"
            " draw= out"
        )
    if header.bits is None and canary(network) != header.canary:
        raise UserError(
            f"this machine computes other probabilities than the one that wrote {url}: it has"
            f" {machine()}, and the file was written with {header.machine}; decompress it there, or"
            " with the same versions on such a processor"
        )


def ready(model: VLAE) -> VLAE:
    """A model as it codes: in single precision, on the CPU."""
    return model.to("cpu", torch.float32).eval()


def canary(model: VLAE) -> str:
    """The checksum of compressed test images, which tells whether probabilities are the same.

    The test images are a few full batches, so that networks run on tensors of the sizes that
    compressing uses.
    """
    shape, levels = model.image_shape, model.decoder.likelihood.levels
    count = 4 if math.prod(shape) > 4096 else blocks.BATCH
    numbers = noise.uniform((0, Purpose.CANARY), np.arange(count), math.prod(shape))
    pixels = np.floor(numbers * (1 << levels)) / ((1 << levels) - 1)
    x = torch.from_numpy(pixels.astype(np.float32)).view(count, *shape)
    try:
        block = blocks.encode(model, x, 0, 0)
    except ValueError as error:
        raise UserError(str(error)) from None
    return hashlib.blake2b(block.payload, digest_size=container.CHECKSUM).hexdigest()


def machine() -> str:
    """What probabilities depend on beside the model: versions and the processor's instructions."""
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"torch {torch.__version__} ({capability}, {platform.machine()}), constriction"
        f" {version('constriction')}"
    )


@torch.no_grad()
def rate_bits(model: VLAE, data: DataSet, split: str, binarization: Binarization) -> Tensor:
    """The mean rate of the first images of a split in bits, split over the latents: (latents,).

    Single terms are rates only if ``VLAE.rate_splits``. Without images it is 0.
    """
    batch = next(iter(EvalLoader(data, split=split, batch_size=RATE_IMAGES)), None)
    if batch is None:
        return torch.zeros(model.latents)
    normal = noise.normal((0, Purpose.CODE), batch.samples, model.latents)
    rate = model.rate_per_latent(binarize(batch, binarization, 0), torch.from_numpy(normal))
    return rate.double().mean(0) / math.log(2)


def latents_within(rates: Tensor, bits: int) -> int:
    """The most latents, at least one, the first of which have rates that sum to ``bits`` or less.

    rates: (latents,), in bits.
    """
    return max(1, int((rates.cumsum(0) <= bits).sum()))
