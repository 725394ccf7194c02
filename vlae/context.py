"""What a pixel of the decoder knows of the image so far: one module for each kind of receptive field.

A context maps an image in [-1, 1] of shape (batch, channels, height, width) to features of shape (batch, height, width,
features), where those of a pixel depend on earlier pixels only. Everything after it works on each pixel by itself, so a
decoder's receptive field is exactly its context's.

For sampling, ``context.front(...)`` gives the same features a few pixels at a time, as the image becomes known, each
evaluated once. It asks for a *shear*: the features of pixel (row, column) can be had as soon as all pixels with a smaller
``column + shear * row`` are drawn.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlae.window import Window

Offsets = Sequence[tuple[int, int]]
LUMINANCE = (0.299, 0.587, 0.114)


def visible(x: Tensor, window: Window) -> Tensor:
    """What a window may see of pixels, (batch, channels, ...): all of it, or the luminance of RGB, (batch, 1, ...)."""
    if not window.grey:
        return x
    weights = torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)
    return torch.einsum("bc...,c->b...", x, weights)[:, None]


class WindowContext(nn.Module):
    """A linear map of the pixels in an A x B window; pixels outside the image count as 0.

    One layer with the whole field, and per-pixel layers after it, in place of the paper's stack of 3x3 masked layers:
    ``benchmarks/decoder.py`` compares the two. In a down-sampled window all pixels of a cell have the same weight.
    """

    cells: Tensor
    cell_sizes: Tensor

    def __init__(self, window: Window, channels: int, features: int) -> None:
        super().__init__()
        self.window = window
        sizes = Counter(window.cells)
        self.register_buffer("cells", torch.tensor(window.cells), persistent=False)
        self.register_buffer("cell_sizes", torch.tensor([float(sizes[cell]) for cell in window.cells]), persistent=False)
        self.linear = nn.Linear(channels * (max(window.cells) + 1), features, bias=False)

    def weight(self) -> Tensor:
        """The weight of each pixel of the window: (features, channels * pixels)."""
        if self.window.down == 1:
            return self.linear.weight
        by_cell = self.linear.weight.unflatten(1, (-1, int(self.cells.max()) + 1))
        return (by_cell[..., self.cells] / self.cell_sizes).flatten(1)

    def pad(self, x: Tensor) -> Tensor:
        """Surround an image with the zeros that a pixel at its border sees."""
        return F.pad(x, (self.window.left, self.window.right, self.window.rows, 0))

    def patches(self, padded: Tensor) -> Tensor:
        """What the window of each pixel holds, as a view: (batch, channels, height, width, taps of the window's bounding box)."""
        return padded.unfold(2, self.window.rows + 1, 1).unfold(3, self.window.left + 1 + self.window.right, 1)

    def project(self, patches: Tensor, weight: Tensor) -> Tensor:
        """(batch, channels, ..., rows, columns) -> (batch, ..., features)."""
        # In raster order the window is the first taps of its bounding box: what follows is the pixel itself, and later ones.
        taps = patches.flatten(-2)[..., : len(self.window.offsets)]
        return F.linear(taps.movedim(1, -2).flatten(-2), weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.patches(self.pad(x)), self.weight())

    def front(self, batch: int, height: int, width: int) -> "WindowFront":
        """The features pixel by pixel, of ``batch`` images of ``height`` x ``width`` that are yet to be drawn."""
        return WindowFront(self, batch, height, width)


class WindowFront:
    """A ``WindowContext``, a few pixels at a time."""

    ahead = 0

    def __init__(self, context: WindowContext, batch: int, height: int, width: int) -> None:
        self.context, self.window = context, context.window
        self.shear = self.window.right + 1 if self.window.rows else 0
        self.weight = context.weight()
        channels = self.weight.shape[1] // len(self.window.offsets)
        self.canvas = context.pad(self.weight.new_zeros(batch, channels, height, width))

    def features(self, row: Tensor, column: Tensor) -> Tensor:
        """Of the pixels at (row, column), each of shape (points,): (batch, points, features)."""
        return self.context.project(self.context.patches(self.canvas)[:, :, row, column], self.weight)

    def draw(self, row: Tensor, column: Tensor, pixels: Tensor) -> None:
        """Make pixels known: in [-1, 1], (batch, channels, points)."""
        self.canvas[:, :, row + self.window.rows, column + self.window.left] = pixels.to(self.canvas.dtype)


class StackContext(nn.Module):
    """Several layers that each look a little further, without blind spot.

    A *vertical* stack sees the rows above: it starts one row up, and each layer of it looks at its own row and further up, to
    the left and to the right. A *horizontal* stack sees the pixels to the left in the same way, starting one pixel to the left,
    and reads the vertical one at every layer. The two stacks and the absence of a blind spot follow van den Oord et al.,
    *Conditional Image Generation with PixelCNN Decoders*, NeurIPS 2016, arXiv:1606.05328.

    ``layers`` holds for each layer the (rows up, columns left) offsets that its vertical and its horizontal part look at.
    """

    def __init__(self, layers: Sequence[tuple[Offsets, Offsets]], channels: int, hidden: int, features: int) -> None:
        super().__init__()
        self.layers = list(layers)
        self.hidden = hidden
        self.start_vertical = nn.Linear(channels, hidden)
        self.start_horizontal = nn.Linear(channels, hidden)
        self.vertical = nn.ModuleList(nn.Linear(len(up) * hidden, hidden) for up, _ in self.layers)
        self.horizontal = nn.ModuleList(nn.Linear((len(left) + 1) * hidden, hidden) for _, left in self.layers)
        self.end = nn.Linear(hidden, features)

    @classmethod
    def windowed(cls, window: Window, depth: int, channels: int, features: int) -> "StackContext":
        """``depth`` layers that together see exactly ``window``, each its share of it.

        The paper's way: 7x4 are three layers, each one row up and one column to both sides. Raises ValueError for windows
        without a row above or without a pixel to the left, and for down-sampled ones.
        """
        window.check_stacks()
        ups, lefts, rights = (_shares(total, depth) for total in (window.height - 1, window.left, window.right))
        # The horizontal stack starts one pixel to the left, so it has one column less to go. No layer of it goes further than
        # the vertical one's, or what the vertical stack sees would be carried out of the window.
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
        """Every earlier pixel: layers whose reach doubles, so log2(size) of them suffice; half as wide as what they give."""
        dilations = [1]
        while sum(dilations) < max(height, width) - 1:
            dilations.append(2 * dilations[-1])
        layers = [([(row, column) for row in (0, d) for column in (-d, 0, d)], [(0, 0), (0, d)]) for d in dilations]
        return cls(layers, channels, max(1, features // 2), features)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        vertical, horizontal = _shift(self.start_vertical(pixels), 1, 0), _shift(self.start_horizontal(pixels), 0, 1)
        for (up, left), look_up, look_left in zip(self.layers, self.vertical, self.horizontal, strict=True):
            above = F.relu(vertical)
            vertical = vertical + look_up(torch.cat([_shift(above, *offset) for offset in up], -1))
            before = F.relu(horizontal)
            seen = [_shift(before, *offset) for offset in left]
            horizontal = horizontal + look_left(torch.cat([*seen, F.relu(vertical)], -1))
        return self.end(F.relu(horizontal))

    def front(self, batch: int, height: int, width: int) -> "StackFront":
        """The features pixel by pixel, of ``batch`` images of ``height`` x ``width`` that are yet to be drawn."""
        return StackFront(self, batch, height, width)


class StackFront:
    """A ``StackContext``, a few pixels at a time: every layer keeps what it has evaluated.

    The vertical stack depends on rows above only, so it can run ahead in a pixel's own row: layer n is evaluated as many
    columns further right as the layers after it still look to the right. ``ahead`` is how far the first one is.
    """

    def __init__(self, context: StackContext, batch: int, height: int, width: int) -> None:
        self.context, self.height, self.width = context, height, width
        rights = [max(-column for _, column in up) for up, _ in context.layers]
        self.ahead = sum(rights)
        self.shear = self.ahead + 1
        self.leads = [sum(rights[n + 1 :]) for n in range(len(rights))]
        reach = [abs(number) for up, left in context.layers for offset in (*up, *left) for number in offset]
        self.margin = max(reach) + 1  # on every side: zeros, as outside the image
        shape = (batch, height + 2 * self.margin, width + 2 * self.margin, context.hidden)
        weight = context.end.weight
        self.vertical = [weight.new_zeros(shape) for _ in range(len(rights) + 1)]
        self.horizontal = [weight.new_zeros(shape) for _ in range(len(rights) + 1)]

    def features(self, row: Tensor, column: Tensor) -> Tensor:
        """Of the pixels at (row, column), each of shape (points,); those with a column below 0 only run ahead and have none.

        Returns (batch, points with a column of at least 0, features).
        """
        context = self.context
        for number, (up, _) in enumerate(context.layers):
            at = column + self.leads[number]
            inside = (at >= 0) & (at < self.width)
            place = (row[inside], at[inside])
            seen = F.relu(torch.cat([self._read(self.vertical[number], place, offset) for offset in up], -1))
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
        """Make pixels known: in [-1, 1], (batch, channels, points)."""
        pixels = pixels.transpose(1, 2)
        # What lies beyond the last row or column goes to the margin, which must stay zero.
        below, beside = row + 1 < self.height, column + 1 < self.width
        self._write(self.vertical[0], (row[below] + 1, column[below]), self.context.start_vertical(pixels[:, below]))
        self._write(self.horizontal[0], (row[beside], column[beside] + 1), self.context.start_horizontal(pixels[:, beside]))

    def _read(self, canvas: Tensor, place: tuple[Tensor, Tensor], offset: tuple[int, int] = (0, 0)) -> Tensor:
        return canvas[:, place[0] - offset[0] + self.margin, place[1] - offset[1] + self.margin]

    def _write(self, canvas: Tensor, place: tuple[Tensor, Tensor], value: Tensor) -> None:
        canvas[:, place[0] + self.margin, place[1] + self.margin] = value.to(canvas.dtype)


def _shares(total: int, parts: int) -> list[int]:
    """``total`` as a sum of ``parts`` integers that differ by one at most."""
    return [total * (n + 1) // parts - total * n // parts for n in range(parts)]


def _shift(x: Tensor, rows: int, columns: int) -> Tensor:
    """Each pixel takes over the features of the one ``rows`` above and ``columns`` to its left; zeros come in."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, max(columns, 0), max(-columns, 0), rows, 0))
    return padded[:, :height, max(-columns, 0) : max(-columns, 0) + width]
