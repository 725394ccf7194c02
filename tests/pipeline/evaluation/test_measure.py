"""Threads, batches and ranks do not change a measurement: it is that of each image by itself."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import vlae
from pipeline.commands import load
from pipeline.config.evaluation import MAX_SAMPLES
from pipeline.config.options import to_dict
from pipeline.config.sections import Binarization
from pipeline.data import DataSet
from pipeline.data.batch import binarize
from pipeline.data.loader import EvalLoader
from pipeline.errors import UserError
from pipeline.evaluation.measure import QUANTITIES, estimates, measure, quantities, report
from pipeline.evaluation.moments import Moments
from pipeline.noise import Purpose, normal
from pipeline.storage import open_storage
from tests.pipeline import strokes

CPU = torch.device("cpu")
SAMPLES = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return strokes.write(open_storage(str(tmp_path_factory.mktemp("strokes"))))


@pytest.fixture(scope="module")
def model() -> vlae.VLAE:
    """A model with random weights everywhere, since a fresh one ignores its input.

    The weights are small enough for exp(elbo) not to overflow: the bound is compared with its
    definition.
    """
    model = vlae.build(
        image_shape=(1, strokes.SIZE, strokes.SIZE),
        **to_dict(load("train", ["model=tiny"]))["model"],
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def sums(moments: Moments) -> Tensor:
    return torch.stack([moments.sums[name] for name in QUANTITIES])


@pytest.fixture(scope="module", params=Binarization)
def binarization(request: pytest.FixtureRequest) -> Binarization:
    mode: Binarization = request.param
    return mode


@pytest.fixture(scope="module")
def one_by_one(model: vlae.VLAE, data: DataSet, binarization: Binarization) -> Tensor:
    """The sums, image by image, from the model's own bound."""
    moments = Moments()
    for batch in EvalLoader(data, split="train", batch_size=1):
        x = binarize(batch, binarization, 5)
        ids = batch.positions * MAX_SAMPLES + np.arange(SAMPLES)
        codes = torch.from_numpy(normal((Purpose.IMPORTANCE, 5), ids, model.latents))
        with torch.no_grad():
            bounds = [model(x, code[None]) for code in codes]
        elbos = torch.stack([bound.elbo for bound in bounds])
        moments.add(
            {
                "distortion": torch.stack([bound.distortion for bound in bounds]).mean(0),
                "rate": torch.stack([bound.rate for bound in bounds]).mean(0),
                "elbo": elbos.mean(0),
                "iwae": torch.logsumexp(elbos, 0) - math.log(SAMPLES),
                "slack": torch.logsumexp(elbos, 0) - math.log(SAMPLES) - elbos.mean(0),
            }
        )
    return sums(moments)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "threads"),
    [(1, 1, 1), (96, 1, 1), (7, 3, 1), (7, 1, 4), (96, 1, 5), (10, 2, 2)],
)
def test_the_result_is_that_of_each_image_by_itself(
    batch_size: int,
    world_size: int,
    threads: int,
    model: vlae.VLAE,
    data: DataSet,
    binarization: Binarization,
    one_by_one: Tensor,
) -> None:
    total = torch.zeros(len(QUANTITIES), 3, dtype=torch.float64)
    for rank in range(world_size):
        loader = EvalLoader(
            data, split="train", batch_size=batch_size, rank=rank, world_size=world_size
        )
        moments = Moments()
        for estimate in estimates(
            model,
            loader,
            samples=SAMPLES,
            binarization=binarization,
            seed=5,
            device=CPU,
            threads=threads,
        ):
            moments.add(quantities(estimate))
        total += sums(moments)
    torch.testing.assert_close(total, one_by_one, rtol=1e-5, atol=1e-4)


def figures(
    model: vlae.VLAE,
    data: DataSet,
    seed: int,
    num_images: int | None = None,
    samples: int = SAMPLES,
) -> dict[str, float]:
    loader = EvalLoader(data, split="train", batch_size=32, num_images=num_images)
    moments = measure(
        model,
        loader,
        samples=samples,
        binarization=Binarization.dynamic,
        seed=seed,
        device=CPU,
    )
    return report(moments, model, samples)


def test_the_seed_determines_the_figures(model: vlae.VLAE, data: DataSet) -> None:
    assert figures(model, data, 1) == figures(model, data, 1)
    assert figures(model, data, 1)["elbo_nats"] != figures(model, data, 2)["elbo_nats"]


def test_the_report_is_of_the_images_that_were_measured(model: vlae.VLAE, data: DataSet) -> None:
    values = figures(model, data, 1, num_images=10)
    assert values["num_images"] == 10
    assert values["elbo_nats"] == pytest.approx(values["distortion_nats"] + values["rate_nats"])
    assert values["elbo_bits_per_dim"] == pytest.approx(values["elbo_nats"] / (64 * math.log(2)))
    assert values["iwae_bits_per_dim"] == pytest.approx(values["iwae_nats"] / (64 * math.log(2)))
    assert values["rate_bits"] == pytest.approx(values["rate_nats"] / math.log(2))
    assert 0 < values["iwae_nats"] < values["elbo_nats"]
    assert values["slack_nats"] == pytest.approx(values["elbo_nats"] - values["iwae_nats"])
    for name in ("rate", "distortion", "elbo", "iwae", "slack"):
        assert 0 < values[f"{name}_nats_se"] < abs(values[f"{name}_nats"])
    assert values["iwae_samples"] == SAMPLES
    assert not [name for name in figures(model, data, 1, samples=1) if "iwae" in name]


def test_damaged_data_ends_the_measurement(
    model: vlae.VLAE, tmp_path_factory: pytest.TempPathFactory
) -> None:
    storage = open_storage(str(tmp_path_factory.mktemp("damaged")))
    data = strokes.write(storage)
    damaged = data.manifest.shards("train")[1].name
    storage.write(damaged, storage.read(damaged)[:-5000] + b"?" * 5000)
    with pytest.raises(UserError, match=damaged):
        figures(model, data, 1)
