"""The encoder: an image to the posterior q(z|x)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlae.distributions import DiagonalGaussian
from vlae.layers import ResidualConv, scales


class Encoder(nn.Module):
    """A small residual network that halves the image until its shorter side is about 7, and ends in a diagonal Gaussian over z.

    The posterior's log scale is bounded to [-5, 1] by a scaled sigmoid: a single step can neither collapse a latent's
    scale to zero nor blow it up.
    """

    MIN_LOG_SCALE, MAX_LOG_SCALE = -5.0, 1.0
    START = 1.5  # scales begin near 1, the prior's

    def __init__(self, image_shape: tuple[int, int, int], latents: int, channels: int) -> None:
        super().__init__()
        in_channels, height, width = image_shape
        sizes = scales(height, width)
        layers: list[nn.Module] = []
        out_channels = channels
        if len(sizes) == 1:
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), ResidualConv(channels)]
        for _ in sizes[1:]:
            layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), ResidualConv(out_channels)]
            in_channels, out_channels = out_channels, 2 * channels
        self.layers = nn.Sequential(*layers)
        with torch.no_grad():
            flat = self.layers(torch.zeros(1, *image_shape)).numel()
        self.head = nn.Linear(flat, 2 * latents)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """Pixels in [0, 1], (batch, channels, height, width) -> q(z|x) over (batch, latents)."""
        h = self.layers((2 * x - 1).contiguous(memory_format=torch.channels_last))
        mean, raw = self.head(F.relu(h).flatten(1)).chunk(2, -1)
        span = self.MAX_LOG_SCALE - self.MIN_LOG_SCALE
        return DiagonalGaussian(mean, self.MIN_LOG_SCALE + span * torch.sigmoid(raw + self.START))
