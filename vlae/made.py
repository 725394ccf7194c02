"""MADE: networks whose i-th output depends only on the inputs that come before i; over vectors, and over maps.

Reference: Germain, Gregor, Murray, Larochelle, *MADE: Masked Autoencoder for Distribution Estimation*, ICML 2015,
arXiv:1502.03509.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], Tensor]
"""(noise, outputs) -> x, elementwise: (rows, inputs), (rows, outputs, inputs) -> (rows, inputs)."""


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a fixed 0/1 mask of shape (out_features, in_features)."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """A masked autoencoder over a vector: (..., size) -> (..., outputs, size).

    Output ``[..., k, i]`` depends on the inputs ``j < i``. ``layers`` counts the hidden layers, each of ``hidden`` ReLU units. The
    last layer starts at zero, so that what is built on it starts as the identity. With ``context`` features, (..., context),
    every output depends on these, too.

    Raises ValueError if ``hidden`` is too small for every dependency to be represented.
    """

    def __init__(self, size: int, outputs: int, hidden: int, layers: int = 2, context: int = 0) -> None:
        super().__init__()
        self.size, self.outputs = size, outputs
        # Units of degree -1 see no input. Only a context gives them, and through them the first output, something to say.
        masks, self.seen = _masks(size, outputs, hidden, layers, lowest=-1 if context else 0)
        self.hidden, self.head = _layers(masks)
        self.from_context = nn.Linear(context, hidden, bias=False) if context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for number, layer in enumerate(self.hidden):
            x = layer(x)
            if number == 0 and self.from_context is not None and context is not None:
                x = x + self.from_context(context)
            x = F.relu(x)
        return self.head(x).unflatten(-1, (self.size, self.outputs)).transpose(-1, -2)

    def solve(self, noise: Tensor, step: Step, context: Tensor | None = None) -> Tensor:
        """The x with x_i = step(noise_i, forward(x)[..., i]) for every i, found one i after the other: (batch, size) -> (batch, size).

        ``context`` is (batch, context). Each unit is evaluated once, as soon as the inputs it sees are known, so that all of it
        takes the arithmetic of one ``forward``.
        """
        layers = [(layer.weight, layer.bias) for layer in (*self.hidden, self.head)]
        if self.from_context is not None and context is not None:
            layers[0] = (layers[0][0], layers[0][1] + self.from_context(context))
        return _solve(layers, self.seen, noise, step)[0]


class MapMADE(nn.Module):
    """A masked convolutional autoencoder over maps: flat (..., channels * height * width) -> (..., outputs, the same).

    The maps (channels, height, width) are flattened in this order, but what comes before an element is: all channels of the
    positions before its own in raster order, and the channels before its own at its own position. Each layer, ``layers`` hidden
    ones of ``hidden`` ReLU maps and the head, looks at five taps: the three positions above, the one to the left, and, masked by
    degree as in a MADE over the channels, the position itself. So with n layers, the head included, an output is reached
    from its own row n positions to the left, and from the row d <= n above it from n positions to the left until d to the right.
    What lies further to the right is the *blind spot* of such layers; a flow that turns the order round between its
    steps has it elsewhere in every other step. With ``context`` maps, (..., context * height * width), every output depends on
    those at its own position and at the positions that reach it.

    Raises ValueError if ``hidden`` is too small for every dependency to be represented.

    Reference: van den Oord, Kalchbrenner, Kavukcuoglu, *Pixel Recurrent Neural Networks*, ICML 2016, arXiv:1601.06759; two
    hidden layers of 128 maps over codes of 16x8x8 is what the VLAE paper used for CIFAR-10.
    """

    taps: Tensor

    def __init__(self, shape: tuple[int, int, int], outputs: int, hidden: int, layers: int = 2, context: int = 0) -> None:
        super().__init__()
        self.shape, self.outputs = shape, outputs
        channels, height, width = shape
        masks, self.seen = _masks(channels, outputs, hidden, layers, lowest=-1)
        self.hidden, self.head = _layers(torch.cat([torch.ones(len(mask), 4 * mask.shape[1]), mask], 1) for mask in masks)
        self.from_context = nn.Linear(context, hidden, bias=False) if context else None
        # Where each position finds its five taps once there is a row of zeros above the maps, and a column on either side.
        # On the CPU even if the weights are made elsewhere: the numbers are needed here.
        place = torch.arange(height * width, device="cpu")
        row, column = place // width, place % width
        taps = torch.tensor([0, 1, 2, width + 2, width + 3], device="cpu")
        self.register_buffer("taps", (row * (width + 2) + column)[:, None] + taps, persistent=False)
        # No position looks at another with the same number: the tap above to the right is one number back, the nearest of all.
        number = column + 2 * row
        self.wavefronts = [(number == n).nonzero()[:, 0] for n in number.unique()]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self._to_positions(x)
        for number, layer in enumerate(self.hidden):
            x = layer(self._look(x))
            if number == 0 and self.from_context is not None and context is not None:
                x = x + self.from_context(self._to_positions(context))
            x = F.relu(x)
        said = self.head(self._look(x)).unflatten(-1, (-1, self.outputs))
        return said.movedim((-1, -2), (-4, -3)).flatten(-3)  # (..., outputs, channels, height, width), the maps flattened

    def solve(self, noise: Tensor, step: Step, context: Tensor | None = None) -> Tensor:
        """The x with x_i = step(noise_i, forward(x)[..., i]) for every i: (batch, channels * height * width) -> the same.

        Positions on a sheared diagonal do not look at each other, so they are solved together, channel by channel: channels *
        (width + 2 * (height - 1)) rounds. Each map is evaluated once at each position, as soon as what it sees is known, so that
        all of it takes the arithmetic of one ``forward``.
        """
        batch, (_, height, width) = len(noise), self.shape
        noise = self._to_positions(noise).flatten(1, 2)
        layers = (*self.hidden, self.head)
        known = [noise.new_zeros(batch, (height + 1) * (width + 2), layer.in_features // 5) for layer in layers]
        said = None
        if self.from_context is not None and context is not None:
            said = self.from_context(self._to_positions(context)).flatten(1, 2)
        for points in self.wavefronts:
            neighbours, here = self.taps[points, :-1], self.taps[points, -1]
            # What the neighbours say is settled; with that as its biases, the rest is a MADE over the channels of each point.
            at_points = []
            for layer, values in zip(layers, known, strict=True):
                before = values[:, neighbours].flatten(2).flatten(0, 1)
                bias = torch.addmm(layer.bias, before, layer.weight[:, : before.shape[1]].T)
                at_points.append((layer.weight[:, before.shape[1] :], bias))
            if said is not None:
                at_points[0] = (at_points[0][0], at_points[0][1] + said[:, points].flatten(0, 1))
            solved = _solve(at_points, self.seen, noise[:, points].flatten(0, 1), step)
            for values, new in zip(known, solved, strict=True):
                values[:, here] = new.unflatten(0, (batch, -1))
        return known[0][:, self.taps[:, -1]].transpose(1, 2).flatten(1)

    def _to_positions(self, maps: Tensor) -> Tensor:
        """(..., channels * height * width) -> (..., height, width, channels)."""
        return maps.unflatten(-1, (-1, *self.shape[1:])).movedim(-3, -1)

    def _look(self, x: Tensor) -> Tensor:
        """What the five taps of each position hold: (..., height, width, maps) -> (..., height, width, 5 * maps).

        A gather and a matrix product take about a seventh longer on a CPU than a convolution (benchmarks/flow.py), but ``solve``
        uses the same taps and weights, and they work for any leading dimensions.
        """
        padded = F.pad(x, (0, 0, 1, 1, 1, 0)).flatten(-3, -2)
        return padded.index_select(-2, self.taps.flatten()).unflatten(-2, (*self.shape[1:], -1)).flatten(-2)


def _masks(size: int, outputs: int, hidden: int, layers: int, lowest: int) -> tuple[list[Tensor], list[int]]:
    """The mask of each layer, the head's last, and how many units of a hidden layer each of the ``size`` outputs sees.

    A hidden unit of degree d sees the inputs up to d, and serves the outputs after d. Degrees run from ``lowest`` to size - 2.
    Units are in the order of their degrees, so that what is known after the first few inputs is a slice of each layer.
    """
    num_degrees = max(1, size - 1 - lowest)
    if hidden < num_degrees:
        raise ValueError(
            f"a MADE over {size} inputs needs at least {num_degrees} hidden units, not {hidden}; widen it (flow_hidden)"
        )
    position = torch.arange(size)
    degrees = [lowest + unit * num_degrees // hidden for unit in range(hidden)]
    degree = torch.tensor(degrees)
    masks = [degree[:, None] >= position[None, :]]
    masks += [degree[:, None] >= degree[None, :]] * (layers - 1)
    masks += [(position[:, None, None] > degree).expand(-1, outputs, -1).flatten(0, 1)]
    return masks, [bisect_left(degrees, i) for i in range(size)]


def _layers(masks: Iterable[Tensor]) -> tuple[nn.ModuleList, MaskedLinear]:
    """The hidden layers and the head, which starts at zero."""
    *hidden, head = (MaskedLinear(mask) for mask in masks)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.ModuleList(hidden), head


def _solve(layers: Sequence[tuple[Tensor, Tensor]], seen: Sequence[int], noise: Tensor, step: Step) -> list[Tensor]:
    """Invert a MADE given as its layers' weights and biases, the latter (units,) or one for each row, (rows, units).

    Returns x, (rows, size), and the values of each hidden layer, (rows, hidden). Masks are not needed: each unit is given what it
    may see, and nothing else is there yet.
    """
    known = [noise.new_empty(len(noise), 0) for _ in layers]
    *hidden, (head_weight, head_bias) = layers
    outputs = len(head_weight) // len(seen)
    done = 0
    for i, ready in enumerate(seen):
        for number, (weight, bias) in enumerate(hidden):
            new = _part(weight, bias, slice(done, ready), known[number])
            known[number + 1] = torch.cat([known[number + 1], F.relu(new)], -1)
        said = _part(head_weight, head_bias, slice(i * outputs, (i + 1) * outputs), known[-1])
        known[0] = torch.cat([known[0], step(noise[:, i : i + 1], said[..., None])], -1)
        done = ready
    return known


def _part(weight: Tensor, bias: Tensor, units: slice, known: Tensor) -> Tensor:
    """Some units of a layer, from as many of its first inputs as are known."""
    return torch.addmm(bias[..., units], known, weight[units, : known.shape[-1]].T)
