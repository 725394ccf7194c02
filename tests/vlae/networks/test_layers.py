"""Residual blocks start as the identity, and image sizes are halved as documented."""

import pytest
import torch

from vlae.networks.layers import ResidualConv, scales


def test_a_new_residual_block_is_the_identity() -> None:
    x = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ResidualConv(4)(x), x)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((28, 28), [(28, 28), (14, 14), (7, 7)]),
        ((33, 20), [(33, 20), (17, 10)]),
        ((13, 13), [(13, 13), (7, 7)]),
        ((12, 13), [(12, 13)]),
        ((12, 100), [(12, 100)]),
        ((1, 1), [(1, 1)]),
    ],
)
def test_an_image_is_halved_while_its_shorter_side_stays_seven_or_more(
    size: tuple[int, int], expected: list[tuple[int, int]]
) -> None:
    assert scales(*size) == expected
