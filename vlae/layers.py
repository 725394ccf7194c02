"""Building blocks shared by the encoder and the decoder."""

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualConv(nn.Module):
    """x + conv(relu(conv(relu(x)))), both 3x3; it starts as the identity. (batch, channels, height, width) -> same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        assert self.second.bias is not None
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


class PixelLayer(nn.Module):
    """relu(linear(x)) of each pixel by itself: (..., features) -> same.

    It has no bias, and the relu overwrites its input: on a CPU, passes over memory cost as much here as the matrix product.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x), inplace=True)


def scales(height: int, width: int, smallest: int = 7) -> list[tuple[int, int]]:
    """The sizes an image passes through when it is halved (rounding up) while its shorter side stays >= ``smallest``.

    28 x 28 gives [(28, 28), (14, 14), (7, 7)].
    """
    sizes = [(height, width)]
    while (min(sizes[-1]) + 1) // 2 >= smallest:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes
