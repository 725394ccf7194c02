"""Building blocks shared by the encoder and the decoder."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"relu": F.relu, "elu": F.elu}


@dataclass(frozen=True)
class Trunk:
    """The settings that the encoder and the decoder share."""

    blocks: int = 1
    """Residual blocks at each size below the image's own."""
    image_blocks: int = 0
    """Residual blocks at the image's own size."""
    activation: Activation = F.relu

    def residual(self, channels: int, number: int) -> list[nn.Module]:
        """``number`` residual blocks."""
        return [ResidualConv(channels, self.activation) for _ in range(number)]


class ResidualConv(nn.Module):
    """x + conv(f(conv(f(x)))), both 3x3, initialised to the identity.

    (batch, channels, height, width) -> the same shape.
    """

    def __init__(self, channels: int, activation: Activation = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        assert self.second.bias is not None
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.activation(self.first(self.activation(x))))


class PixelLayer(nn.Module):
    """f(linear(x)) of each pixel separately: (..., features) -> the same shape.

    The layer has no bias, and a ReLU overwrites its input: on a CPU, passes over memory cost as
    much here as the matrix product.
    """

    def __init__(self, features: int, activation: Activation = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.linear = nn.Linear(features, features, bias=False)
        if not self.linear.weight.is_meta:  # drawing there would load PyTorch's compiler: seconds
            nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return F.relu(h, inplace=True) if self.activation is F.relu else self.activation(h)


def scales(height: int, width: int, smallest: int = 7) -> list[tuple[int, int]]:
    """The (height, width) of an image each time it is halved, rounding up.

    Halving stops before the shorter side would fall below ``smallest``: 28 x 28 gives
    [(28, 28), (14, 14), (7, 7)].
    """
    sizes = [(height, width)]
    while (min(sizes[-1]) + 1) // 2 >= smallest:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes
