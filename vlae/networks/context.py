"""Contexts: what the decoder sees of the earlier pixels, one module for each receptive field.

A context maps an image in [-1, 1], (batch, channels, height, width), to features, (batch, height,
width, features). The features of a pixel depend on earlier pixels only. The decoder's remaining
layers work on each pixel separately, so its receptive field is exactly that of its context.

For sampling, ``context.front(...)`` computes the same features a few pixels at a time, while the
image is drawn, and evaluates each only once. A front has a *shear*: the features of pixel (row,
column) are available once all pixels with a smaller ``column + shear * row`` are drawn.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlae.window import Window

Offsets = Sequence[tuple[int, int]]
"""(rows up, columns left) offsets of the pixels that a layer reads."""

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


def visible(x: Tensor, window: Window) -> Tensor:
    """The channels that a window sees of pixels, (batch, channels, ...).

    All of them; or, if the window is grey, the luminance of RGB, (batch, 1, ...).
    """
    if not window.grey:
        return x
    weights = torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)
    return torch.einsum("bc...,c->b...", x, weights)[:, None]


class WindowContext(nn.Module):
    """A linear map of the pixels in an A x B window; pixels outside the image count as 0.

    A single layer covers the whole window and per-pixel layers follow, where the paper stacks 3x3
    masked layers; ``benchmarks/decoder.py`` compares the two. In a down-sampled window all pixels
    of a cell have the same weight.
    """

    cells: Tensor
    cell_sizes: Tensor

    def __init__(self, window: Window, channels: int, features: int) -> None:
        super().__init__()
        self.window = window
        sizes = Counter(window.cells)
        self.register_buffer("cells", torch.tensor(window.cells), persistent=False)
        cell_sizes = torch.tensor([float(sizes[cell]) for cell in window.cells])
        self.register_buffer("cell_sizes", cell_sizes, persistent=False)
        self.linear = nn.Linear(channels * (max(window.cells) + 1), features, bias=False)

    def weight(self) -> Tensor:
        """The weight of each pixel in the window: (features, channels * pixels)."""
        if self.window.down == 1:
            return self.linear.weight
        by_cell = self.linear.weight.unflatten(1, (-1, max(self.window.cells) + 1))
        return (by_cell[..., self.cells] / self.cell_sizes).flatten(1)

    def pad(self, x: Tensor) -> Tensor:
        """Pad an image with the zeros that pixels at its border see."""
        return F.pad(x, (self.window.left, self.window.right, self.window.rows, 0))

    def patches(self, padded: Tensor) -> Tensor:
        """The bounding box of each pixel's window in a padded image, as a view.

        (batch, channels, height, width, rows, columns).
        """
        rows, columns = self.window.rows + 1, self.window.left + 1 + self.window.right
        return padded.unfold(2, rows, 1).unfold(3, columns, 1)

    def project(self, patches: Tensor, weight: Tensor) -> Tensor:
        """(batch, channels, ..., rows, columns) -> (batch, ..., features)."""
        # In raster order the window comes first in its bounding box, before the pixel itself and
        # later pixels.
        taps = patches.flatten(-2)[..., : len(self.window.offsets)]
        return F.linear(taps.movedim(1, -2).flatten(-2), weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.patches(self.pad(x)), self.weight())

    def front(self, batch: int, height: int, width: int) -> "WindowFront":
        """The features of ``batch`` images of ``height`` x ``width`` while they are drawn."""
        return WindowFront(self, batch, height, width)


class WindowFront:
    """The features of a ``WindowContext``, a few pixels at a time."""

    ahead = 0

    def __init__(self, context: WindowContext, batch: int, height: int, width: int) -> None:
        self.context, self.window = context, context.window
        self.shear = self.window.right + 1 if self.window.rows else 0
        self.weight = context.weight()
        channels = self.weight.shape[1] // len(self.window.offsets)
        self.canvas = context.pad(self.weight.new_zeros(batch, channels, height, width))

    def features(self, row: Tensor, column: Tensor) -> Tensor:
        """The features of the pixels at (row, column), each of shape (points,).

        Returns (batch, points, features).
        """
        patches = self.context.patches(self.canvas)[:, :, row, column]
        return self.context.project(patches, self.weight)

    def draw(self, row: Tensor, column: Tensor, pixels: Tensor) -> None:
        """Record drawn pixels, in [-1, 1]: (batch, channels, points)."""
        row, column = row + self.window.rows, column + self.window.left
        self.canvas[:, :, row, column] = pixels.to(self.canvas.dtype)


class StackContext(nn.Module):
    """A stack of layers without blind spot, each of which extends the receptive field.

    The *vertical* stack sees the rows above. It starts one row up, and each of its layers reads
    its own row and rows further up, to the left and to the right. The *horizontal* stack sees the
    pixels to the left. It starts one pixel to the left, and each of its layers also reads the
    vertical stack.

    ``layers`` holds, for each layer, the (rows up, columns left) offsets that its vertical and its
    horizontal part read.

    Reference: van den Oord et al., *Conditional Image Generation with PixelCNN Decoders*,
    NeurIPS 2016, arXiv:1606.05328.
    """

    def __init__(
        self, layers: Sequence[tuple[Offsets, Offsets]], channels: int, hidden: int, features: int
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        self.hidden = hidden
        self.start_vertical = nn.Linear(channels, hidden)
        self.start_horizontal = nn.Linear(channels, hidden)
        self.vertical = nn.ModuleList(nn.Linear(len(up) * hidden, hidden) for up, _ in self.layers)
        self.horizontal = nn.ModuleList(
            nn.Linear((len(left) + 1) * hidden, hidden) for _, left in self.layers
        )
        self.end = nn.Linear(hidden, features)

    @classmethod
    def windowed(cls, window: Window, depth: int, channels: int, features: int) -> "StackContext":
        """``depth`` layers that together see exactly ``window``, in equal shares.

        This is the paper's form: 7x4 is three layers, each one row up and one column to either
        side. Raises ValueError for windows without a row above or a pixel to the left, and for
        down-sampled windows.
        """
        window.check_stacks()
        ups, lefts, rights = (
            _shares(total, depth) for total in (window.height - 1, window.left, window.right)
        )
        # The horizontal stack starts one pixel to the left, so its layers share one column less.
        # None of them may reach further left than the vertical layer of the same number: it would
        # carry what the vertical stack sees out of the window.
        own = list(lefts)
        own[next(n for n, share in enumerate(own) if share)] -= 1
        return cls(
            [
                (
                    [(row, column) for row in range(up + 1) for column in range(-right, left + 1)],
                    [(0, column) for column in range(before + 1)],
                )
                for up, left, right, before in zip(ups, lefts, rights, own, strict=True)
            ],
            channels,
            features,
            features,
        )

    @classmethod
    def unlimited(cls, height: int, width: int, channels: int, features: int) -> "StackContext":
        """Layers that see every earlier pixel.

        Their reach doubles from layer to layer, so about log2(size) layers suffice. Hidden layers
        are half as wide as the features.
        """
        dilations = [1]
        while sum(dilations) < max(height, width) - 1:
            dilations.append(2 * dilations[-1])
        layers = [
            ([(row, column) for row in (0, d) for column in (-d, 0, d)], [(0, 0), (0, d)])
            for d in dilations
        ]
        return cls(layers, channels, max(1, features // 2), features)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        vertical = _shift(self.start_vertical(pixels), 1, 0)
        horizontal = _shift(self.start_horizontal(pixels), 0, 1)
        for (up, left), look_up, look_left in zip(
            self.layers, self.vertical, self.horizontal, strict=True
        ):
            above = F.relu(vertical)
            vertical = vertical + look_up(torch.cat([_shift(above, *offset) for offset in up], -1))
            before = F.relu(horizontal)
            seen = [_shift(before, *offset) for offset in left]
            horizontal = horizontal + look_left(torch.cat([*seen, F.relu(vertical)], -1))
        return self.end(F.relu(horizontal))

    def front(self, batch: int, height: int, width: int) -> "StackFront":
        """The features of ``batch`` images of ``height`` x ``width`` while they are drawn."""
        return StackFront(self, batch, height, width)


class StackFront:
    """The features of a ``StackContext``, a few pixels at a time; each layer keeps its values.

    The vertical stack depends only on the rows above, so it can run ahead of the current pixel.
    Layer n is evaluated further right by as many columns as the layers after it reach to the
    right. ``ahead`` is this lead of the first layer.
    """

    def __init__(self, context: StackContext, batch: int, height: int, width: int) -> None:
        self.context, self.height, self.width = context, height, width
        rights = [max(-column for _, column in up) for up, _ in context.layers]
        self.ahead = sum(rights)
        self.shear = self.ahead + 1
        self.leads = [sum(rights[n + 1 :]) for n in range(len(rights))]
        reach = [
            abs(number)
            for up, left in context.layers
            for offset in (*up, *left)
            for number in offset
        ]
        self.margin = max(reach) + 1  # zeros on every side, as outside the image
        shape = (batch, height + 2 * self.margin, width + 2 * self.margin, context.hidden)
        weight = context.end.weight
        self.vertical = [weight.new_zeros(shape) for _ in range(len(rights) + 1)]
        self.horizontal = [weight.new_zeros(shape) for _ in range(len(rights) + 1)]

    def features(self, row: Tensor, column: Tensor) -> Tensor:
        """The features of the pixels at (row, column), each of shape (points,).

        Columns below 0 are for the layers that run ahead: these points have no features. Returns
        (batch, points with a column of at least 0, features).
        """
        context = self.context
        for number, (up, _) in enumerate(context.layers):
            at = column + self.leads[number]
            inside = (at >= 0) & (at < self.width)
            place = (row[inside], at[inside])
            taps = [self._read(self.vertical[number], place, offset) for offset in up]
            seen = F.relu(torch.cat(taps, -1))
            value = self._read(self.vertical[number], place) + context.vertical[number](seen)
            self._write(self.vertical[number + 1], place, value)
        inside = column >= 0
        place = (row[inside], column[inside])
        for number, (_, left) in enumerate(context.layers):
            taps = [self._read(self.horizontal[number], place, offset) for offset in left]
            seen = F.relu(torch.cat([*taps, self._read(self.vertical[number + 1], place)], -1))
            value = self._read(self.horizontal[number], place) + context.horizontal[number](seen)
            self._write(self.horizontal[number + 1], place, value)
        return context.end(F.relu(self._read(self.horizontal[-1], place)))

    def draw(self, row: Tensor, column: Tensor, pixels: Tensor) -> None:
        """Record drawn pixels, in [-1, 1]: (batch, channels, points)."""
        pixels = pixels.transpose(1, 2)
        # Values beyond the last row or column would fall into the margin, which must stay zero.
        below, beside = row + 1 < self.height, column + 1 < self.width
        self._write(
            self.vertical[0],
            (row[below] + 1, column[below]),
            self.context.start_vertical(pixels[:, below]),
        )
        self._write(
            self.horizontal[0],
            (row[beside], column[beside] + 1),
            self.context.start_horizontal(pixels[:, beside]),
        )

    def _read(
        self, canvas: Tensor, place: tuple[Tensor, Tensor], offset: tuple[int, int] = (0, 0)
    ) -> Tensor:
        return canvas[:, place[0] - offset[0] + self.margin, place[1] - offset[1] + self.margin]

    def _write(self, canvas: Tensor, place: tuple[Tensor, Tensor], value: Tensor) -> None:
        canvas[:, place[0] + self.margin, place[1] + self.margin] = value.to(canvas.dtype)


def _shares(total: int, parts: int) -> list[int]:
    """``total`` as a sum of ``parts`` integers that differ by at most one."""
    return [total * (n + 1) // parts - total * n // parts for n in range(parts)]


def _shift(x: Tensor, rows: int, columns: int) -> Tensor:
    """Move features down by ``rows`` and right by ``columns``, with zeros entering at the border.

    (batch, height, width, features) -> the same shape.
    """
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, max(columns, 0), max(-columns, 0), rows, 0))
    return padded[:, :height, max(-columns, 0) : max(-columns, 0) + width]
