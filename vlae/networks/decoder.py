"""The decoder p(x|z): autoregressive over a window of earlier pixels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlae.distributions import at_least_float32
from vlae.likelihood import Distribution, Likelihood
from vlae.networks.context import StackContext, WindowContext, visible
from vlae.networks.layers import PixelLayer, Trunk, scales
from vlae.window import Window

CACHE_BYTES = 1 << 20
"""Features of pixels that fit into a core's own cache; beyond it, their layers take 1.5 times as
long."""


class Decoder(nn.Module):
    """p(x|z) = prod_i p(x_i | z, x_window(i)), for pixels i in raster order.

    The code is unfolded to ``maps`` feature maps of the image's size. These and the context of
    earlier pixels enter a network that works on each pixel separately. So the context alone
    decides which pixels are seen; tests prove it from gradients. With window ``0x0`` there is no
    context, and pixels are independent given z. Whether a channel of a pixel sees the channels
    before it is decided by the likelihood.

    ``context_layers``: 0 covers the window with a single linear layer; more are stacked.
    ``code_maps``: z is (latents, height, width) at the smallest size, flattened.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latents: int,
        window: Window,
        likelihood: Likelihood,
        *,
        channels: int,
        maps: int,
        features: int,
        pixel_layers: int,
        context_layers: int = 0,
        code_maps: bool = False,
        trunk: Trunk = Trunk(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__()
        self.image_shape, self.window, self.likelihood, self.activation = (
            image_shape,
            window,
            likelihood,
            trunk.activation,
        )
        image_channels, height, width = image_shape
        window.check_fits(height, width)
        if window.grey and image_channels != 3:
            raise ValueError(
                f"window {window} shows the luminance of RGB images, but these have "
                f"{image_channels} channels; use a window without -grey"
            )
        self.sizes = scales(height, width)[::-1]
        self.code_shape = (latents, *self.sizes[0]) if code_maps else None
        size = 1 if code_maps else self.sizes[0][0] * self.sizes[0][1]
        self.unfold = nn.Linear(latents, 2 * channels * size)
        layers: list[nn.Module] = trunk.residual(2 * channels, trunk.blocks)
        in_channels = 2 * channels
        for _ in self.sizes[1:-1]:
            layers += [nn.Conv2d(in_channels, 4 * channels, 3, padding=1)]
            layers += trunk.residual(channels, trunk.blocks)
            in_channels = channels
        grow = 4 if len(self.sizes) > 1 else 1
        layers += [nn.Conv2d(in_channels, grow * maps, 3, padding=1)]
        layers += trunk.residual(maps, trunk.image_blocks)
        self.layers = nn.ModuleList(layers)

        self.context: WindowContext | StackContext | None = None
        seen_channels = 1 if window.grey else image_channels
        if window.full:
            self.context = StackContext.unlimited(height, width, seen_channels, features)
        elif window.offsets and context_layers:
            self.context = StackContext.windowed(window, context_layers, seen_channels, features)
        elif window.offsets:
            self.context = WindowContext(window, seen_channels, features)
        self.from_maps = nn.Linear(maps, features)
        self.per_pixel = nn.Sequential(
            *[PixelLayer(features, trunk.activation) for _ in range(pixel_layers)]
        )
        self.head = nn.Linear(features, likelihood.num_parameters)

    def condition(self, z: Tensor) -> Tensor:
        """The features of each pixel from z: (..., size of z) -> (..., height, width, features)."""
        return self.from_maps(self.spread(z))

    def spread(self, z: Tensor) -> Tensor:
        """The maps of the image's size from z: (..., size of z) -> (..., height, width, maps)."""
        h = z.flatten(0, -2)
        if self.code_shape:
            h = self.unfold(h.unflatten(1, self.code_shape).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            h = self.unfold(h).unflatten(1, (-1, *self.sizes[0]))
        h = h.contiguous(memory_format=torch.channels_last)
        sizes = iter(self.sizes[1:])
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                h = layer(self.activation(h))
                size = next(sizes, None)
                if size is not None:
                    h = F.pixel_shuffle(h, 2)[..., : size[0], : size[1]]
            else:
                h = layer(h)
        return h.permute(0, 2, 3, 1).unflatten(0, z.shape[:-1])

    def see(self, x: Tensor) -> Tensor | float:
        """The features of each pixel from its window; 0.0 for window 0x0.

        Pixels in [0, 1], (batch, channels, height, width) -> (batch, height, width, features).
        """
        return 0.0 if self.context is None else self.context(self.show(x))

    def show(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1], (batch, channels, ...), as the context's input.

        They are scaled to [-1, 1], and reduced to the luminance if the window is grey.
        """
        return visible(2 * x - 1, self.window)

    def predict(self, hidden: Tensor) -> Distribution:
        """Pixels from ``condition + see``: (..., features) -> a distribution of (..., channels)."""
        h = self.per_pixel(self.activation(hidden))
        # The parameters of a distribution need more precision than bfloat16 has.
        with torch.autocast(h.device.type, enabled=False):
            parameters = self.head(h.to(self.head.weight.dtype))
            return self.likelihood(parameters.to(at_least_float32(parameters.dtype)))

    def forward(self, z: Tensor, x: Tensor) -> Distribution:
        """p(x|z), with every pixel given its window in x.

        z (..., batch, latents), x (batch, channels, height, width) -> a distribution of pixels,
        (..., batch, height, width, channels).
        """
        return self.predict(self.condition(z) + self.see(x))

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """log p(x|z), in nats per image: (..., batch, latents) and images -> (..., batch).

        Without gradients, several codes of each image are evaluated on a CPU a few at a time, which
        their features and the processor's cache decide.
        """
        maps, seen, pixels = self.spread(z), self.see(x), x.permute(0, 2, 3, 1)
        parts: Sequence[Tensor] = [maps]
        if maps.dim() > 4 and not torch.is_grad_enabled() and x.device.type == "cpu":
            features = maps[0].nbytes // maps.shape[-1] * self.from_maps.out_features
            parts = maps.split(max(1, CACHE_BYTES // features))
        # The density sums hundreds of terms, which bfloat16 would round too coarsely.
        found = []
        for part in parts:
            distribution = self.predict(self.from_maps(part) + seen)
            with torch.autocast(x.device.type, enabled=False):
                found.append(distribution.log_prob(pixels))
        return torch.cat(found)
