"""The models of all presets compute the same on a GPU as on a CPU: bounds, gradients, samples."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

import vlae
from pipeline import commands
from pipeline.machine import device
from pipeline.training import plan

SHAPES = {
    "tiny": (1, 28, 28),
    "fast": (1, 28, 28),
    "paper_binary": (1, 28, 28),
    "colour": (3, 32, 32),
    "paper_cifar": (3, 32, 32),
    "large": (3, 64, 64),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of a bound and, relative to its norm, of a gradient. Without TF32, whose 1e-3 would show."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest) -> vlae.VLAE:
    """A preset in float64 with random weights everywhere: fresh ones ignore their input."""
    name = request.param
    kind = ["dataset.binarization=none"] if SHAPES[name][0] == 3 else []
    config = commands.load("train", [f"model={name}", "dataset=synthetic", *kind])
    torch.manual_seed(0)
    model = config.build(SHAPES[name]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def inputs(model: vlae.VLAE, dtype: torch.dtype, count: int = 2) -> tuple[Tensor, Tensor]:
    """Images as the likelihood has them, and noise for one code of each."""
    generator = torch.Generator().manual_seed(1)
    most = 2**model.decoder.likelihood.levels - 1
    x = torch.randint(0, most + 1, (count, *model.image_shape), generator=generator) / most
    return x.to(dtype), torch.randn(count, model.latents, generator=generator).to(dtype)


def on(model: vlae.VLAE, place: torch.device, dtype: torch.dtype) -> vlae.VLAE:
    """A copy of the model elsewhere."""
    device()  # which chooses the precision of convolutions
    return deepcopy(model).to(place, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bounds_are_equal(model: vlae.VLAE, dtype: torch.dtype, gpu: torch.device) -> None:
    x, noise = inputs(model, dtype)
    codes = torch.stack([noise, -noise, noise.flip(0)])
    expected = vlae.estimate(on(model, CPU, dtype), x, codes)
    found = vlae.estimate(on(model, gpu, dtype), x.to(gpu), codes.to(gpu))
    for name in ("distortion", "rate", "elbo", "iwae"):
        torch.testing.assert_close(
            getattr(found, name).cpu(), getattr(expected, name), rtol=TOLERANCE[dtype], atol=1e-3
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_are_equal(model: vlae.VLAE, dtype: torch.dtype, gpu: torch.device) -> None:
    x, noise = inputs(model, dtype)
    gradients = []
    for place in (CPU, gpu):
        copy = on(model, place, dtype)
        copy(x.to(place), noise.to(place)).elbo.mean().backward()
        gradients.append(torch.cat([each.grad.flatten().cpu() for each in copy.parameters()]))
    expected, found = gradients
    assert expected.any()
    assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_samples_and_reconstructions_are_equal(model: vlae.VLAE, gpu: torch.device) -> None:
    if model.latents > 256:
        pytest.skip("codes of maps are drawn one number at a time: minutes on a CPU")
    x, _ = inputs(model, torch.float64, 1)
    images = []
    for place in (CPU, gpu):
        copy, generator = on(model, place, torch.float64), torch.Generator().manual_seed(2)
        drawn = vlae.sample(copy, 1, generator), vlae.reconstruct(copy, x.to(place), generator)
        images.append(torch.cat([each.cpu() for each in drawn]))
    assert torch.equal(*images)


def test_a_step_takes_the_memory_that_is_planned(model: vlae.VLAE, gpu: torch.device) -> None:
    """``vlae plan`` leaves out the temporary memory of operations, so it is a lower bound."""
    if gpu.type != "cuda":
        pytest.skip("only CUDA counts the memory of tensors")
    count = 32
    copy = on(model, gpu, torch.float32)
    weights = vlae.flatten(copy)
    ema = vlae.EMA(copy, 0.999)
    optimizer = torch.optim.Adam([weights], fused=True)
    x, noise = (each.to(gpu) for each in inputs(model, torch.float32, count))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(gpu)
        optimizer.zero_grad(set_to_none=False)
        (-copy(x, noise).elbo.mean()).backward()
        optimizer.step()
        ema.update(weights, 1)
    planned = 5 * 4 * weights.numel() + count * plan.kept_for_backward(model.float())
    model.double()
    assert 0.9 * planned <= torch.cuda.max_memory_allocated(gpu) <= 3 * planned
