"""Estimate what a training run needs before it starts: shards, streams, batches and memory.

Everything follows from the order of the data (``pipeline.data.order``), the loader's limits and the
model as built. Nothing is measured.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

import vlae
from pipeline.data.order import GROUP_BYTES, Order
from pipeline.errors import UserError
from pipeline.values import JsonObject

FLOAT = 4
"""Bytes of a number."""
SHARD_BYTES = 128 << 20
"""Most bytes of a shard, which takes about a second to read and is the unit of the cache."""
MAX_SHARDS = 1 << 24
"""Most shards of a plan, whose sizes are listed in memory: two petabytes of images."""
SHARDS_PER_STREAM = 4
"""Shards of each stream, about, if there are enough images: epochs shuffle whole shards."""
NUM_STREAMS = 8
"""Fewest streams, if the batch allows it, so that small runs can change their number of workers."""


@dataclass(frozen=True)
class Plan:
    """A run on ``num_workers`` workers.

    Sizes are bytes of each worker's device memory, except ``loader_bytes``, which are of its host's
    memory.
    """

    num_workers: int
    num_streams: int
    global_batch: int
    samples_per_shard: int
    num_shards: int
    shard_bytes: int
    steps_per_epoch: int
    group_samples: int
    """Images of a stream that are shuffled together."""
    loader_bytes: int
    """Images in memory: the current group of each of the worker's streams, and the next group."""
    state_bytes: int
    """Weights, gradients, DDP's copy of them, Adam's two moments, and the moving average."""
    activation_bytes: int
    """Activations of the worker's batch that are saved for the backward pass, in float32."""
    checkpoint_bytes: int
    gradient_bytes: int
    """Gradients that each worker averages with all others at every step."""


def plan(
    *,
    image_bytes: int,
    num_parameters: int,
    kept_bytes: int,
    num_images: int,
    num_workers: int,
    local_batch: int,
) -> Plan:
    """Plan a run on ``num_images`` training images of ``image_bytes`` each.

    In a step each worker has ``local_batch`` images. ``kept_bytes`` is ``kept_for_backward`` of the
    model. Raises UserError if there are fewer images than one global batch, or too many.
    """
    global_batch = num_workers * local_batch
    if num_images < global_batch:
        raise UserError(
            f"{num_workers} workers of local_batch={local_batch} take {global_batch} images at a"
            f" step, more than num_images={num_images}; use fewer workers or smaller batches"
        )
    each = max(
        count
        for count in range(1, local_batch + 1)
        if local_batch % count == 0 and (count == 1 or count * num_workers <= NUM_STREAMS)
    )
    num_streams = each * num_workers
    samples = max(
        1,
        min(SHARD_BYTES // image_bytes, math.ceil(num_images / (SHARDS_PER_STREAM * num_streams))),
    )
    num_shards = math.ceil(num_images / samples)
    if num_shards > MAX_SHARDS:
        raise UserError(
            f"num_images={num_images} images of {image_bytes:,} bytes make {num_shards:,} shards of"
            f" at most {SHARD_BYTES >> 20} MB, more than the {MAX_SHARDS:,} that can be planned;"
            " use fewer or smaller images"
        )
    sizes = [samples] * (num_shards - 1) + [num_images - samples * (num_shards - 1)]
    order = Order(
        sizes=sizes,
        seed=0,
        global_batch=global_batch,
        num_streams=num_streams,
        group_samples=GROUP_BYTES // (image_bytes * num_streams),
    )
    in_group = min(order.group_length, order.stream_length)
    weights = FLOAT * num_parameters
    return Plan(
        num_workers=num_workers,
        num_streams=num_streams,
        global_batch=global_batch,
        samples_per_shard=samples,
        num_shards=num_shards,
        shard_bytes=samples * image_bytes,
        steps_per_epoch=order.steps_per_epoch,
        group_samples=in_group,
        loader_bytes=2 * in_group * each * image_bytes,
        state_bytes=weights * (5 if num_workers == 1 else 6),
        activation_bytes=local_batch * kept_bytes,
        checkpoint_bytes=4 * weights,
        gradient_bytes=0 if num_workers == 1 else weights,
    )


def kept_for_backward(model: vlae.VLAE) -> int:
    """Bytes that autograd saves for each image between the forward and the backward pass.

    Tensors that all images share are left out, and so is the temporary memory of operations. The
    pass runs on tensors without data, and so takes neither time nor memory.
    """
    mode = FakeTensorMode()
    state: dict[str, torch.Tensor] = {
        name: mode.from_tensor(tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}

    def of_batch(size: int) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with mode, saved_tensors_hooks(keep, lambda tensor: tensor):
            inputs = (torch.rand(size, *model.image_shape), torch.randn(size, model.latents))
            loss = functional_call(model, state, inputs).elbo.mean()
        del loss  # until here every saved tensor was alive, so no two had the same storage
        return sum(kept.values())

    return of_batch(2) - of_batch(1)


def plans(
    model: vlae.VLAE, num_images: int, num_workers: Sequence[int], local_batch: int
) -> JsonObject:
    """A plan for each number of workers, and the sizes that all plans share, as JSON.

    Raises UserError if a plan is impossible.
    """
    size = {
        "image_bytes": math.prod(model.image_shape),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "kept_bytes": kept_for_backward(model),
    }
    found = [
        plan(**size, num_images=num_images, num_workers=workers, local_batch=local_batch)
        for workers in num_workers
    ]
    return {**size, "plans": [dataclasses.asdict(each) for each in found]}
