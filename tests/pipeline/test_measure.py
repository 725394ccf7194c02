"""Measuring does not depend on how the images are grouped."""

import math

import pytest
import torch

import vlae
from pipeline.config import Binarization
from pipeline.loader import EvalLoader
from pipeline.manifest import Manifest
from pipeline.measure import QUANTITIES, measure, report
from pipeline.storage import Storage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> vlae.VLAE:
    torch.manual_seed(0)
    return vlae.build(
        image_shape=(3, 2, 3), window="3x1", latents=3, flow_hidden=8, encoder_channels=4, decoder_channels=4, decoder_maps=4,
        decoder_features=8,
    ).double()  # fmt: skip


@pytest.mark.parametrize("binarization", Binarization)
def test_batches_and_ranks_do_not_change_what_is_measured(
    model: vlae.VLAE, storage: Storage, numbered: Manifest, binarization: Binarization
) -> None:
    def sums(batch_size: int, world_size: int) -> list[float]:
        total = dict.fromkeys(QUANTITIES, 0.0)
        for rank in range(world_size):
            loader = EvalLoader(storage, numbered, split="train", batch_size=batch_size, rank=rank, world_size=world_size)
            options = {"binarization": binarization, "seed": 3, "device": CPU}
            moments = measure(model.float(), loader, samples=4, **options)  # type: ignore[arg-type]
            for name in QUANTITIES:
                total[name] += moments.sums[name][1].item()
        return list(total.values())

    assert sums(7, 1) == pytest.approx(sums(50, 3), rel=1e-5)


def test_the_report_is_in_the_units_that_its_names_say(model: vlae.VLAE, storage: Storage, numbered: Manifest) -> None:
    loader = EvalLoader(storage, numbered, split="test", batch_size=4)
    moments = measure(model.float(), loader, samples=5, binarization=Binarization.dynamic, seed=0, device=CPU)
    values = report(moments, model, 5)
    assert values["num_images"] == 9
    assert values["elbo_nats"] == pytest.approx(values["rate_nats"] + values["distortion_nats"])
    assert values["rate_bits"] == pytest.approx(values["rate_nats"] / math.log(2))
    assert values["iwae_bits_per_dim"] == pytest.approx(values["iwae_nats"] / (18 * math.log(2)))
    assert values["iwae_nats"] <= values["elbo_nats"]
    assert values["iwae_samples"] == 5
    assert "iwae_nats" not in report(moments, model, 1)
