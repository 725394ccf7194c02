"""The encoder: from an image to the posterior q(z|x)."""

import torch
from torch import Tensor, nn

from vlae.distributions import DiagonalGaussian
from vlae.flow import AutoregressiveFlow
from vlae.networks.layers import Trunk, scales
from vlae.posterior import IAFPosterior, Posterior


class Encoder(nn.Module):
    """A small residual network from an image to a diagonal Gaussian over z.

    It halves the image until its shorter side is about 7. With a ``flow``, whose context has
    ``flow.context`` features, the Gaussian is the start of an inverse autoregressive flow.

    The code is a vector of ``latents``. With ``maps`` it is such a vector at each position of the
    smallest size, (latents, height, width) flattened.

    A scaled sigmoid bounds the posterior's log scale to [-5, 1], so that no single step can
    collapse the scale of a latent to zero or blow it up.
    """

    MIN_LOG_SCALE, MAX_LOG_SCALE = -5.0, 1.0
    START = 1.5
    """Added to the raw log scale, so that scales start near 1, the prior's."""

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latents: int,
        channels: int,
        *,
        maps: bool = False,
        flow: AutoregressiveFlow | None = None,
        trunk: Trunk = Trunk(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        in_channels, height, width = image_shape
        sizes = scales(height, width)
        self.activation, self.maps = trunk.activation, maps
        layers: list[nn.Module] = []
        out_channels = channels
        if trunk.image_blocks or len(sizes) == 1:
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1)]
            layers += trunk.residual(channels, max(1, trunk.image_blocks))
            in_channels = channels
        for _ in sizes[1:]:
            layers += [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)]
            layers += trunk.residual(out_channels, trunk.blocks)
            in_channels, out_channels = out_channels, 2 * channels
        self.layers = nn.Sequential(*layers)
        features = in_channels * (1 if maps else sizes[-1][0] * sizes[-1][1])
        self.head = nn.Linear(features, 2 * latents)
        self.flow = flow
        self.context = nn.Linear(features, flow.context) if flow else None

    @property
    def splits_over_latents(self) -> bool:
        """Whether the terms of its posteriors' log densities are those of single latents."""
        return self.flow is None or self.flow.splits_over_latents

    def forward(self, x: Tensor) -> Posterior:
        """Pixels in [0, 1], (batch, channels, height, width) -> q(z|x) over (batch, size of z).

        Raises ValueError on images of another shape.
        """
        # Images that are a little smaller would pass: their smallest size may be the same.
        if x.dim() != 4 or tuple(x.shape[1:]) != tuple(self.image_shape):
            raise ValueError(
                f"images have the shape {tuple(x.shape)}; it must be (batch, "
                f"{', '.join(map(str, self.image_shape))})"
            )
        h = self.activation(self.layers((2 * x - 1).contiguous(memory_format=torch.channels_last)))
        h = h.permute(0, 2, 3, 1) if self.maps else h.flatten(1)
        mean, raw = (self._flat(part) for part in self.head(h).chunk(2, -1))
        span = self.MAX_LOG_SCALE - self.MIN_LOG_SCALE
        log_scale = self.MIN_LOG_SCALE + span * torch.sigmoid(raw + self.START)
        gaussian = DiagonalGaussian(mean, log_scale)
        if self.flow is None or self.context is None:
            return gaussian
        return IAFPosterior(gaussian, self.flow, self._flat(self.context(h)))

    def _flat(self, h: Tensor) -> Tensor:
        """Maps, (batch, height, width, maps) -> (batch, maps * height * width); a vector as is."""
        return h.permute(0, 3, 1, 2).flatten(1) if self.maps else h
