"""Other people's training loops on a data set: PyTorch's DDP, and Lightning."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from pipeline.data import DataSet
from pipeline.data.loader import Batches
from tests.pipeline.data.conftest import BATCH, STEPS, numbers


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 10)).double()


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(network(images.double() / 255), labels)


def train(network: nn.Module, batches: Batches, steps: int) -> list[int]:
    """Plain SGD, as in PyTorch's tutorials; returns the numbers of the images of this rank."""
    optimizer, seen = torch.optim.SGD(network.parameters(), lr=0.1), list[int]()
    for images, labels in islice(batches, steps):
        optimizer.zero_grad()
        loss_of(network, images, labels).backward()
        optimizer.step()
        seen += numbers(images)
    return seen


def train_on_rank(rank: int, folder: str, batches: Batches, steps: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    network = model()
    seen = train(nn.parallel.DistributedDataParallel(network), batches, steps)
    torch.save(seen, f"{folder}/seen-{rank}.pt")
    if rank == 0:
        state = {"network": network.state_dict(), "batches": batches.state_dict()}
        torch.save(state, f"{folder}/state.pt")
    dist.destroy_process_group()


def test_ddp_on_two_processes_and_then_one_trains_as_one_process(
    local: DataSet, tmp_path: Path
) -> None:
    alone = model()
    train(alone, local.batches(BATCH, epochs=None), 10)
    # The batches are made before the process group: they ask for the rank when the loop begins.
    spawn(train_on_rank, (str(tmp_path), local.batches(BATCH, epochs=None), 4), nprocs=2)
    seen = [torch.load(tmp_path / f"seen-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(seen[0]) == len(seen[1]) == len(set(seen[0] + seen[1])) / 2 == 4 * BATCH / 2
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, batches = model(), local.batches(BATCH, epochs=None)
    resumed.load_state_dict(state["network"])
    batches.load_state_dict(state["batches"])
    train(resumed, batches, 6)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-12, atol=1e-12)


# --- Lightning ------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What Lightning did: the epoch and the image numbers of each step, and its weights."""

    trained: list[tuple[int, list[int]]]
    validated: list[int]
    weights: dict[str, Tensor]


def fit(data: DataSet, folder: Path, resume: Path | None = None, **limits: int) -> Seen:
    import pytorch_lightning as lightning  # here: it takes seconds, and DDP's processes need it not

    seen = Seen([], [], {})

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = model()

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.trained.append((self.current_epoch, numbers(batch[0])))
            return loss_of(self.network, *batch)

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            seen.validated.extend(numbers(batch[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    steps = limits.get("max_steps", 1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            lightning.callbacks.ModelCheckpoint(
                folder, "{step}", every_n_train_steps=steps, save_top_k=-1
            )
        ],
        num_sanity_val_steps=0,
        **limits,
    )
    classifier, batches = Classifier(), data.batches(BATCH)
    path = None if resume is None else str(resume)
    trainer.fit(classifier, batches, data.in_order(4), ckpt_path=path, weights_only=True)
    seen.weights.update(classifier.state_dict())
    return seen


@pytest.fixture(scope="module")
def whole(local: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Three epochs in one go."""
    return fit(local, tmp_path_factory.mktemp("whole"), max_epochs=3)


def test_lightning_trains_and_validates_on_every_image(local: DataSet, whole: Seen) -> None:
    expected = [numbers(images) for images, _ in local.batches(BATCH, epochs=3)]
    assert whole.trained == [(step // STEPS, seen) for step, seen in enumerate(expected)]
    assert whole.validated == list(range(9)) * 3


@pytest.mark.parametrize("stop", [4, STEPS, STEPS + 2, 2 * STEPS])
def test_lightning_resumes_within_and_between_epochs(
    local: DataSet, whole: Seen, tmp_path: Path, stop: int
) -> None:
    first = fit(local, tmp_path, max_steps=stop)
    rest = fit(local, tmp_path, tmp_path / f"step={stop}.ckpt", max_epochs=3)
    assert first.trained + rest.trained == whole.trained
    for name, value in whole.weights.items():
        assert torch.equal(rest.weights[name], value)
