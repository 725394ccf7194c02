"""Training and evaluation on a GPU: as on a CPU, resumed, in bfloat16, and under DDP."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vlae
from pipeline import commands
from pipeline.config.evaluation import BoundOptions
from pipeline.data import DataSet
from pipeline.evaluation import estimates
from pipeline.machine import device
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.training import loop
from tests.pipeline import strokes

DOUBLE = "train.precision=float64"
CPU = torch.device("cpu")


class Interrupted(Exception):
    """What a run is interrupted by."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A storage root with a small data set."""
    root = str(tmp_path_factory.mktemp("root"))
    strokes.write(strokes.data_storage(root))
    return root


def fit(root: str, name: str, place: torch.device, *options: str) -> vlae.VLAE:
    """Train a small model on a device, and load it."""
    config = strokes.train_config(root, f"name={name}", *options)
    loop.fit(config, device=place)
    return vlae.load(f"{root}/runs/{name}/model")


def assert_same_weights(one: vlae.VLAE, other: vlae.VLAE) -> None:
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-9)


def test_training_ends_with_the_weights_of_a_cpu(root: str, gpu: torch.device) -> None:
    assert_same_weights(fit(root, "gpu", gpu, DOUBLE), fit(root, "cpu", CPU, DOUBLE))


def test_an_interrupted_run_ends_with_the_same_weights(root: str, gpu: torch.device) -> None:
    config = strokes.train_config(root, "name=cut", DOUBLE)

    def interrupt(metrics: object) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        loop.fit(config, device=gpu, on_validation=interrupt)
    assert not (Path(root) / "runs/cut/model").exists()
    assert_same_weights(fit(root, "cut", gpu, DOUBLE), fit(root, "whole", gpu, DOUBLE))


def test_a_run_continues_on_the_other_device(root: str, gpu: torch.device) -> None:
    config = strokes.train_config(root, "name=moved", DOUBLE)

    def interrupt(metrics: object) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        loop.fit(config, device=gpu, on_validation=interrupt)
    assert_same_weights(fit(root, "moved", CPU, DOUBLE), fit(root, "stayed", CPU, DOUBLE))


@pytest.mark.parametrize("optim", ["adam", "adamax", "muon"])
def test_bfloat16_learns_as_float32_does(optim: str, root: str, gpu: torch.device) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        config = strokes.train_config(
            root, f"name={optim}-{precision}", f"optim={optim}", f"train.precision={precision}",
            "train.images=1600", "train.valid_every=800",
        )  # fmt: skip
        loop.fit(config, device=gpu)
        rows = Run.of(config).rows()
        found[precision] = [row["valid/elbo_nats"] for row in rows if "valid/elbo_nats" in row]
    assert found["float32"][-1] < 0.9 * found["float32"][0]  # it has learned something
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.03)


def test_an_evaluation_has_the_figures_of_a_cpu(
    root: str, gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(root, "measured", CPU)
    device()  # which chooses the precision of convolutions
    data = DataSet.load(strokes.data_storage(root))
    bounds, found = BoundOptions(samples=100, num_images=13), []
    for place in (gpu, CPU):
        monkeypatch.setattr(estimates, "device", lambda place=place: place)
        model = Run.at(f"{root}/runs/measured").open()
        output = open_storage(str(tmp_path / str(len(found))))
        blocks = estimates.estimate_split(model, data, output, "test", bounds, None)
        found.append(list(blocks))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.iwae, other.iwae, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(one.distortion, other.distortion, rtol=1e-4, atol=1e-3)


def test_ddp_of_one_rank_has_the_gradient_of_the_model(gpu: torch.device, tmp_path: Path) -> None:
    config = commands.load("train", ["model=tiny", "dataset=synthetic"])
    model = config.build((1, 8, 8)).to(gpu, torch.float64)
    x = torch.bernoulli(torch.full((4, 1, 8, 8), 0.3, dtype=torch.float64)).to(gpu)
    noise = torch.randn(4, model.latents, dtype=torch.float64).to(gpu)

    def gradient(network: torch.nn.Module) -> torch.Tensor:
        model.zero_grad()
        network(x, noise).elbo.mean().backward()
        return torch.cat([each.grad.flatten() for each in model.parameters()])  # type: ignore[union-attr]

    expected = gradient(model)
    backend = "nccl" if gpu.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        found = gradient(DistributedDataParallel(model))
        total = torch.full((3,), 2.5, device=gpu)
        dist.all_reduce(total)
        assert total.tolist() == [2.5] * 3
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
