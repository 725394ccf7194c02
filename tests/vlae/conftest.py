"""Fixtures of the model library's tests: small models whose weights are all random."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vlae

SMALL = {
    "latents": 2,
    "flow_depth": 2,
    "flow_hidden": 8,
    "encoder_channels": 4,
    "decoder_channels": 4,
    "decoder_maps": 4,
    "decoder_features": 16,
    "decoder_blocks": 2,
}


@pytest.fixture(scope="session")
def randomize() -> Callable[..., None]:
    """Replace every parameter of a module by random values.

    Several layers are initialised to zero, where many claims of the tests would hold trivially.
    """

    def randomize(module: nn.Module, seed: int = 0, gain: float = 1.2) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                scale = gain / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.25 * gain
                parameter.copy_(
                    scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                )

    return randomize


@pytest.fixture(scope="session")
def small_arguments() -> Callable[..., dict[str, Any]]:
    """The arguments of ``vlae.build`` for a small model."""

    def small_arguments(
        image_shape: tuple[int, int, int], window: str, **widths: int
    ) -> dict[str, Any]:
        return {"image_shape": image_shape, "window": window, **SMALL, **widths}

    return small_arguments


@pytest.fixture(scope="session")
def make_model(
    randomize: Callable[..., None], small_arguments: Callable[..., dict[str, Any]]
) -> Callable[..., vlae.VLAE]:
    """A small model with random weights, in double precision unless asked otherwise."""

    def make_model(
        image_shape: tuple[int, int, int],
        window: str,
        *,
        seed: int = 0,
        gain: float = 1.2,
        dtype: torch.dtype = torch.float64,
        **widths: int,
    ) -> vlae.VLAE:
        model = vlae.build(**small_arguments(image_shape, window, **widths)).to(dtype)
        randomize(model, seed, gain)
        return model

    return make_model


@pytest.fixture(scope="session")
def all_images() -> Callable[..., torch.Tensor]:
    """Every binary image of a shape: (2 ** sub-pixels, channels, height, width).

    The pixels of image number n are the binary digits of n.
    """

    def all_images(channels: int, height: int, width: int) -> torch.Tensor:
        size = channels * height * width
        numbers = torch.arange(2**size)
        bits = (numbers[:, None] >> torch.arange(size - 1, -1, -1)) & 1
        return bits.double().unflatten(1, (channels, height, width))

    return all_images
