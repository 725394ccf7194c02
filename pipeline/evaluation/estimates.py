"""The bounds of each image of a split, in blocks that Ray tasks share and that are kept.

A block is some neighbouring images. The images of one pass through the model, and the noise of each
sample, depend on the images' numbers and k alone: however the images are cut into blocks, whoever
measures them, and whether a command was killed between two blocks, the figures are the same to the
last bit on machines of one kind.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

import vlae
from pipeline.config.evaluation import BoundOptions
from pipeline.config.sections import Binarization
from pipeline.data import DataSet
from pipeline.data.loader import EvalLoader
from pipeline.errors import UserError
from pipeline.evaluation.measure import concatenate, estimates, images_in_pass, pairs_in_pass
from pipeline.machine import device, keep_freed_memory, num_threads
from pipeline.progress import progress_bar
from pipeline.runs import OpenedModel
from pipeline.storage.base import Storage, to_json
from pipeline.tasks import here_or_in_tasks

FOLDER = "estimates"
"""The folder of the blocks, each set of them in one named after what it depends on."""
BLOCK = 512
"""Passes of a block: half a minute on one core for a small model."""
ALONE = 8192
"""Passes up to which this process alone is faster than starting Ray and its tasks."""


def estimate_split(
    model: OpenedModel,
    data: DataSet,
    output: Storage,
    split: str,
    bounds: BoundOptions,
    connect: Callable[[], None] | None,
    use_gpu: bool = False,
) -> Iterator[vlae.Estimate]:
    """The estimates of a split's images, in their order, block by block.

    Blocks that ``output`` holds are read, the others measured first and written there: by Ray tasks
    if there is much to do, to which ``connect`` connects; if it is None, always in this process.
    Raises UserError if there is no such split, or a kept block is damaged.
    """
    total = data.manifest.num_samples(split)
    if bounds.num_images is not None:
        total = min(total, bounds.num_images)
    pairs = pairs_in_pass(model.network, device())
    images = images_in_pass(bounds.samples, pairs)
    size = images * max(1, BLOCK * pairs // (images * bounds.samples))
    folder = _folder(model, data, split, bounds)
    ends = [(start, min(start + size, total)) for start in range(0, total, size)]
    done = set(output.list(folder))
    missing = [each for each in ends if _key(folder, *each) not in done]
    left = sum(stop - start for start, stop in missing)
    if left * bounds.samples <= ALONE * pairs:
        connect = None
    settings = (split, model.binarization, bounds.seed, bounds.samples)
    name = f"IWAE-{bounds.samples}"
    with progress_bar(total, name, initial=total - left) as bar:
        progress = bar.update if connect is None else None  # a task cannot reach the bar
        shared = (model.network.cpu(), data)
        calls = ((*settings, *each, progress) for each in missing)
        for start, block in here_or_in_tasks(estimate_block, shared, calls, connect, use_gpu):
            stop = start + len(block.iwae)
            output.write(_key(folder, start, stop), save(block._asdict()))
            if progress is None:
                bar.update(stop - start)
    return (_read(output, _key(folder, *each), model.network.latents) for each in ends)


def estimate_block(
    model: vlae.VLAE,
    data: DataSet,
    split: str,
    binarization: Binarization,
    seed: int,
    samples: int,
    start: int,
    stop: int,
    progress: Callable[[int], object] | None,
) -> tuple[int, vlae.Estimate]:
    """Measure the images from number ``start`` to ``stop - 1``; returns ``start`` as well.

    ``progress``, if any, is called with the number of images of each pass.
    """
    keep_freed_memory()
    torch.set_num_threads(1)  # several threads sum in another order
    place = device()
    pairs = pairs_in_pass(model, place)
    loader = EvalLoader(
        data, split=split, batch_size=images_in_pass(samples, pairs), start=start, num_images=stop
    )
    found = estimates(
        model.to(place),
        loader,
        samples=samples,
        binarization=binarization,
        seed=seed,
        device=place,
        threads=num_threads(place),
    )
    parts = list[vlae.Estimate]()
    for part in found:
        parts.append(part)
        if progress:
            progress(len(part.iwae))
    return start, concatenate(parts)


def in_batches(blocks: Iterable[vlae.Estimate], size: int) -> Iterator[vlae.Estimate]:
    """The same images in batches of ``size``, of which the last may be smaller."""
    kept: vlae.Estimate | None = None
    for block in blocks:
        kept = block if kept is None else concatenate([kept, block])
        while len(kept.iwae) >= size:
            yield vlae.Estimate(*(each[:size] for each in kept))
            kept = vlae.Estimate(*(each[size:] for each in kept))
    if kept is not None and len(kept.iwae):
        yield kept


def _folder(model: OpenedModel, data: DataSet, split: str, bounds: BoundOptions) -> str:
    """The folder of the blocks that agree in everything but the number of images."""
    recipe = {
        "weights": model.weights,
        "manifest": data.manifest.digest,
        "split": split,
        "binarization": model.binarization.value,
        "seed": bounds.seed,
        "samples": bounds.samples,
    }
    return f"{FOLDER}/{hashlib.sha256(to_json(recipe)).hexdigest()[:16]}"


def _key(folder: str, start: int, stop: int) -> str:
    return f"{folder}/{start:09d}-{stop:09d}.safetensors"


def _read(output: Storage, key: str, latents: int) -> vlae.Estimate:
    """A kept block. Raises UserError if it is damaged."""
    try:
        block = vlae.Estimate(**load(output.read(key)))
        images = len(block.iwae)
        whole = {each.dtype for each in block} == {torch.float64} and [
            tuple(each.shape) for each in block
        ] == [(images,), (images, latents), (images,)]
    except (SafetensorError, TypeError):
        whole = False
    first, last = key.rpartition("/")[2].removesuffix(".safetensors").split("-")
    if not whole or images != int(last) - int(first):
        raise UserError(
            f"{output.url}/{key} is damaged; delete it, and run the command again to measure its"
            " images anew"
        )
    return block
