"""What a training run needs, before anything is made or hired: shards, streams, batches, and
memory.

Everything follows from the order of the data (``pipeline.order``), the loader's bounds, and the
model as it is built; nothing is measured.
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
from pipeline.data.loader import GROUP_BYTES
from pipeline.data.order import Order
from pipeline.errors import UserError
from pipeline.values import JsonObject

FLOAT = 4
"""Bytes."""
SHARD_BYTES = (
    128 << 20
)  # at most, if there are images enough: a read of a second or so, and a cache's smallest unit
SHARDS_PER_STREAM = (
    4  # about, if there are images enough: shards are what an epoch shuffles over all streams
)
NUM_STREAMS = 8
"""At least, so that small runs can move to other numbers of workers."""


@dataclass(frozen=True)
class Plan:
    """A run on ``num_workers`` workers. Bytes of a worker are those of its device's memory, or, for
    ``loader_bytes``, of its host's.
    """

    num_workers: int
    num_streams: int
    global_batch: int
    samples_per_shard: int
    num_shards: int
    shard_bytes: int
    steps_per_epoch: int
    group_samples: int
    """Images of each stream that are shuffled together."""
    loader_bytes: int
    """Images in memory: the groups of this worker's streams that are in use, and as many that come
    next.
    """
    state_bytes: int
    """Weights, gradients, DDP's copy of these, Adam's two moments, and the weights' moving average.
    """
    activation_bytes: int
    """What the forward pass keeps of this worker's batch for the backward pass, in float32."""
    checkpoint_bytes: int
    gradient_bytes: int
    """What each worker has averaged with all others at every step."""


def plan(
    *,
    image_bytes: int,
    num_parameters: int,
    kept_bytes: int,
    num_images: int,
    num_workers: int,
    local_batch: int,
) -> Plan:
    """The run of a model on so many training images of ``image_bytes`` each, with ``local_batch``
    images of each worker in a step.

    ``kept_bytes`` is what ``kept_for_backward`` says of the model. Raises UserError if there are
    fewer images than one global batch.
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
    """Bytes that autograd keeps of each image, between the forward and the backward pass; what all
    images share is left out.

    The pass runs on tensors without data, so it takes neither time nor memory. What operations use
    in passing is not counted.
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
        del loss  # until here every kept tensor was alive, so that no two had the same storage
        return sum(kept.values())

    return of_batch(2) - of_batch(1)


def plans(
    model: vlae.VLAE, num_images: int, num_workers: Sequence[int], local_batch: int
) -> JsonObject:
    """A plan for each number of workers, and what they have in common, as JSON.

    Raises UserError if one of them is impossible.
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
