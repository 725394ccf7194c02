"""The estimates of ``vlae plan`` are what a run then needs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlae
from pipeline import commands
from pipeline.commands.models import plan
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.training import checkpoint
from pipeline.training import plan as planner
from pipeline.training.optimizer import Guard
from pipeline.training.optimizer import make as make_optimizer

ROOT = Path(__file__).parents[3]
TINY = commands.load("train", ["model=tiny"])
SHAPE = (1, 28, 28)


def planned(**changes: int) -> planner.Plan:
    values = {
        "image_bytes": 784,
        "num_parameters": 10_000,
        "kept_bytes": 1000,
        "num_images": 10**7,
        "num_workers": 1,
    }
    return planner.plan(**values | {"local_batch": 64} | changes)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    num_workers=st.integers(1, 2000),
    local_batch=st.integers(1, 100),
    num_images=st.integers(1, 10**7),
)
def test_training_accepts_a_plan_whose_shards_hold_all_images(
    num_workers: int, local_batch: int, num_images: int
) -> None:
    if num_images < num_workers * local_batch:
        with pytest.raises(UserError, match="use fewer workers or smaller batches"):
            planned(num_workers=num_workers, local_batch=local_batch, num_images=num_images)
        return
    made = planned(num_workers=num_workers, local_batch=local_batch, num_images=num_images)
    options = [
        f"train.num_streams={made.num_streams}",
        f"train.global_batch={made.global_batch}",
        "train.images=1_000_000",
    ]
    commands.load("train", ["model=tiny", f"cluster.num_workers={num_workers}", *options])
    assert made.global_batch == num_workers * local_batch
    assert (
        made.samples_per_shard * (made.num_shards - 1)
        < num_images
        <= made.samples_per_shard * made.num_shards
    )
    assert made.steps_per_epoch == num_images // made.global_batch


def test_sizes_of_the_state_and_a_checkpoint_are_those_of_a_real_step(
    tmp_path: Path,
) -> None:
    trained = TINY.build(SHAPE)
    made = planned(num_parameters=sum(weight.numel() for weight in trained.parameters()))
    flat = vlae.flatten(trained)
    ema, optimizer, guard = (
        vlae.EMA(trained, 0.9),
        make_optimizer(TINY.optim, flat, trained.hidden_weights()),
        Guard(torch.device("cpu")),
    )
    loss = -trained(torch.rand(4, *SHAPE).round(), torch.randn(4, trained.latents)).elbo.mean()
    loss.backward()
    optimizer.step()
    moments = [
        value for state in optimizer.state.values() for value in state.values() if value.ndim
    ]
    weights = list(trained.parameters())
    held = [*weights, *(weight.grad for weight in weights), *moments, *ema.module.parameters()]
    # Padding between the weights, which both moments have too. The plan leaves it out.
    between_weights = flat.nbytes - sum(weight.nbytes for weight in weights)
    assert (
        made.state_bytes
        == sum(tensor.nbytes for tensor in held if tensor is not None) - 2 * between_weights
    )

    storage = open_storage(str(tmp_path))
    state = {"model": trained, "ema": ema, "optimizer": optimizer, "guard": guard}
    checkpoint.save(storage, 1, checkpoint.snapshot(state), keep=1)
    [size] = storage.sizes("checkpoints").values()
    constants = 2 * sum(buffer.nbytes for buffer in trained.buffers())
    names = 40_000
    assert made.checkpoint_bytes <= size <= made.checkpoint_bytes + constants + names


def test_saved_activations_are_those_of_a_real_batch() -> None:
    real = TINY.build(SHAPE)
    shared = {
        tensor.untyped_storage().data_ptr() for tensor in (*real.parameters(), *real.buffers())
    }

    def kept(size: int) -> int:
        found = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            bound = real(torch.rand(size, *SHAPE).round(), torch.randn(size, real.latents))
        assert bound.elbo.shape == (size,)
        return sum(count for place, count in found.items() if place not in shared)

    assert planner.kept_for_backward(real) == pytest.approx(kept(9) - kept(8), rel=0.02)


def test_a_worker_holds_the_groups_of_its_streams_twice() -> None:
    alone, shared = planned(), planned(num_workers=8)
    assert alone.loader_bytes == pytest.approx(2 * planner.GROUP_BYTES, rel=0.01)
    assert shared.loader_bytes == pytest.approx(alone.loader_bytes / 8, rel=0.1)


def test_a_model_that_does_not_fit_the_images_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model: "):
        plan.run(commands.load("plan", ["num_images=100", "image_size=2", "model.window=9x9"]))


def test_the_tables_in_the_documents_are_those_of_the_planner(tmp_path: Path) -> None:
    text = (ROOT / "docs/cluster.md").read_text()
    text = text.replace("\\\n", " ")  # long commands are written on several lines
    found = re.findall(r"^vlae plan (.+)\n```\n\n((?:\|.+\n)+)", text, re.MULTILINE)
    assert len(found) == 2
    for arguments, table in found:
        config = commands.load("plan", [*shlex.split(arguments), f"output={tmp_path}"])
        assert plan.format_result(config, plan.run(config)) == table.strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_images": 10**12 // 2, "image_size": 8000},
            "shards of at most 128 MB, more than the",
        ),
        ({"model.flow_hidden": 10**6}, "GB of memory; the largest is prior.steps"),
        ({"model.latents": 10**6, "model.flow_depth": 0}, "the largest is decoder.unfold.weight"),
        ({"model.decoder_features": 10**6}, "the largest is decoder.per_pixel"),
    ],
)
def test_what_no_machine_holds_is_refused_before_it_is_allocated(
    options: dict[str, int], message: str
) -> None:
    if "model.latents" in options:
        options |= {"model.decoder_channels": 10**6}
    with pytest.raises(UserError, match=message):
        plan.run(commands.load("plan", [f"{key}={value}" for key, value in options.items()]))
