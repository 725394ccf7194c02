"""The decoder p(x|z): autoregressive over a window of earlier pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlae.context import FullContext, WindowContext
from vlae.distributions import Bernoulli
from vlae.layers import PixelLayer, ResidualConv, scales
from vlae.window import Window


class Decoder(nn.Module):
    """p(x|z) = prod_i p(x_i | z, x_window(i)), for pixels i in raster order.

    The code is unfolded to ``maps`` feature maps at image size; these and the context of earlier pixels enter a network that
    looks at each pixel by itself. Hence the context alone decides which pixels are seen: tests prove
    it from gradients. With window ``0x0`` there is no context, and the pixels are independent given z.
    Channels of one pixel do not see each other: for binary images there is one.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latents: int,
        window: Window,
        channels: int,
        maps: int,
        features: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.image_shape, self.window = image_shape, window
        image_channels, height, width = image_shape
        window.check_fits(height, width)
        self.sizes = scales(height, width)[::-1]
        self.unfold = nn.Linear(latents, 2 * channels * self.sizes[0][0] * self.sizes[0][1])
        layers: list[nn.Module] = [ResidualConv(2 * channels)]
        in_channels = 2 * channels
        for _ in self.sizes[1:-1]:
            layers += [nn.Conv2d(in_channels, 4 * channels, 3, padding=1), ResidualConv(channels)]
            in_channels = channels
        grow = 4 if len(self.sizes) > 1 else 1
        layers += [nn.Conv2d(in_channels, grow * maps, 3, padding=1)]
        self.layers = nn.ModuleList(layers)

        self.context: WindowContext | FullContext | None = None
        if window.full:
            self.context = FullContext(image_shape, features)
        elif window.offsets:
            self.context = WindowContext(window, image_channels, features)
        self.from_maps = nn.Linear(maps, features)
        self.per_pixel = nn.Sequential(*[PixelLayer(features) for _ in range(blocks)])
        self.head = nn.Linear(features, image_channels)

    def condition(self, z: Tensor) -> Tensor:
        """What the code says about each pixel: (..., latents) -> (..., height, width, features)."""
        h = self.unfold(z.flatten(0, -2)).unflatten(1, (-1, *self.sizes[0])).contiguous(memory_format=torch.channels_last)
        sizes = iter(self.sizes[1:])
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                h = layer(F.relu(h))
                size = next(sizes, None)
                if size is not None:
                    h = F.pixel_shuffle(h, 2)[..., : size[0], : size[1]]
            else:
                h = layer(h)
        return self.from_maps(h.permute(0, 2, 3, 1)).unflatten(0, z.shape[:-1])

    def see(self, x: Tensor) -> Tensor | float:
        """What the window says about each pixel: pixels in [0, 1], (batch, channels, height, width) -> (batch, height, width,
        features); plain 0 for window 0x0."""
        return 0.0 if self.context is None else self.context(2 * x - 1)

    def predict(self, hidden: Tensor) -> Bernoulli:
        """The distribution of pixels from ``condition + see``: (..., features) -> (..., channels)."""
        return Bernoulli(self.head(self.per_pixel(F.relu(hidden))))

    def forward(self, z: Tensor, x: Tensor) -> Bernoulli:
        """p(x|z) with every pixel given its window: z (..., batch, latents) -> logits (..., batch, height, width, channels)."""
        return self.predict(self.condition(z) + self.see(x))
