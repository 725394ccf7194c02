"""What a pixel of the decoder knows of the image so far: one module for each kind of receptive field.

A context maps an image in [-1, 1] of shape (batch, channels, height, width) to features of shape (batch, height, width,
features), where those of a pixel depend on earlier pixels only. Everything after it works on each pixel by itself, so a
decoder's receptive field is exactly its context's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlae.window import Window


class WindowContext(nn.Module):
    """A linear map of the pixels in an A x B window; pixels outside the image count as 0.

    One layer with the whole field, and per-pixel layers after it, in place of the paper's stack of 3x3 masked layers:
    ``benchmarks/decoder.py`` compares the two.
    """

    def __init__(self, window: Window, channels: int, features: int) -> None:
        super().__init__()
        self.window = window
        self.linear = nn.Linear(channels * len(window.offsets), features, bias=False)

    def pad(self, x: Tensor) -> Tensor:
        """Surround an image with the zeros that a pixel at its border sees."""
        return F.pad(x, (self.window.left, self.window.right, self.window.height, 0))

    def patches(self, padded: Tensor) -> Tensor:
        """What the window of each pixel holds, as a view: (batch, channels, height, width, taps of the window's bounding box)."""
        return padded.unfold(2, self.window.height + 1, 1).unfold(3, self.window.left + 1 + self.window.right, 1)

    def project(self, patches: Tensor) -> Tensor:
        """(batch, channels, ..., rows, columns) -> (batch, ..., features)."""
        # In raster order the window is the first taps of its bounding box: what follows is the pixel itself, and later ones.
        taps = patches.flatten(-2)[..., : len(self.window.offsets)]
        return self.linear(taps.movedim(1, -2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.patches(self.pad(x)))

    def at(self, padded: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The features of some pixels only: padded image, (points,), (points,) -> (batch, points, features)."""
        return self.project(self.patches(padded)[:, :, row, column])


class FullContext(nn.Module):
    """Every earlier pixel, without blind spot: dilated causal layers whose reach doubles, so log2(size) of them suffice.

    A *vertical* stack sees the rows above: each layer of it looks at its own row and ``d`` rows up, at columns -d, 0 and +d,
    so that with d = 1, 2, 4, ... it covers every row above and every column. It starts one row up. A *horizontal* stack sees
    the pixels to the left in the same way, starting one pixel to the left, and reads the vertical one at every layer. The
    two stacks and the absence of a blind spot follow van den Oord et al., *Conditional Image Generation with PixelCNN
    Decoders*, NeurIPS 2016, arXiv:1606.05328; the doubling is ours, in place of depth.
    """

    def __init__(self, image_shape: tuple[int, int, int], features: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.dilations = [1]
        while sum(self.dilations) < max(height, width) - 1:
            self.dilations.append(2 * self.dilations[-1])
        hidden = max(1, features // 2)
        self.start = nn.Linear(channels, hidden)
        self.vertical = nn.ModuleList(nn.Linear(6 * hidden, hidden) for _ in self.dilations)
        self.horizontal = nn.ModuleList(nn.Linear(3 * hidden, hidden) for _ in self.dilations)
        self.end = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        start = self.start(x.permute(0, 2, 3, 1))
        vertical, horizontal = _shift(start, 1, 0), _shift(start, 0, 1)
        for d, look_up, look_left in zip(self.dilations, self.vertical, self.horizontal, strict=True):
            above = F.relu(vertical)
            seen = [_shift(above, rows, columns) for rows in (0, d) for columns in (-d, 0, d)]
            vertical = vertical + look_up(torch.cat(seen, -1))
            before = F.relu(horizontal)
            horizontal = horizontal + look_left(torch.cat([before, _shift(before, 0, d), F.relu(vertical)], -1))
        return self.end(F.relu(horizontal))


def _shift(x: Tensor, rows: int, columns: int) -> Tensor:
    """Each pixel takes over the features of the one ``rows`` above and ``columns`` to its left; zeros come in."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, max(columns, 0), max(-columns, 0), rows, 0))
    return padded[:, :height, max(-columns, 0) : max(-columns, 0) + width]
