"""MADE: networks whose i-th output depends only on the inputs before i, over vectors or maps.

Reference: Germain, Gregor, Murray, Larochelle, *MADE: Masked Autoencoder for Distribution
Estimation*, ICML 2015, arXiv:1502.03509.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], Tensor]
"""(noise, outputs) -> x, elementwise: (rows, inputs), (rows, outputs, inputs) -> (rows, inputs)."""


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a fixed 0/1 mask.

    The mask is (out_features, in_features).
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """A masked autoencoder over a vector: (..., size) -> (..., outputs, size).

    Output ``[..., k, i]`` depends on the inputs ``j < i``. There are ``layers`` hidden layers of
    ``hidden`` ReLU units. The last layer is initialised to zero, so that a flow step starts as the
    identity. With ``context`` features, (..., context), every output also depends on these.

    Raises ValueError if ``hidden`` is too small to represent every dependency.
    """

    def __init__(
        self, size: int, outputs: int, hidden: int, layers: int = 2, context: int = 0
    ) -> None:
        super().__init__()
        self.size, self.outputs = size, outputs
        # Units of degree -1 see no input. They serve the first output, which has an input only if
        # there is a context.
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
        """The x with x_i = step(noise_i, forward(x)[..., i]) for every i, found one i at a time.

        (batch, size) -> (batch, size); ``context`` is (batch, context). Each unit is evaluated
        once, as soon as the inputs it sees are known, so the total takes the arithmetic of one
        ``forward``.
        """
        layers = [(layer.weight, layer.bias) for layer in (*self.hidden, self.head)]
        if self.from_context is not None and context is not None:
            layers[0] = (layers[0][0], layers[0][1] + self.from_context(context))
        return _solve(layers, self.seen, noise, step)[0]


class MapMADE(nn.Module):
    """A masked convolutional autoencoder over maps.

    (..., channels * height * width) -> (..., outputs, channels * height * width): maps (channels,
    height, width) are flattened in this order. The autoregressive order differs: positions in
    raster order, and the channels within a position.

    Each layer, ``layers`` hidden ones of ``hidden`` ReLU maps and the head, has five taps: the
    three positions above, the one to the left, and the position itself, masked by degree as in a
    MADE over the channels. With n layers, head included, an output depends on n positions to the
    left in its own row, and in the row d <= n above on those from n to the left to d to the right.
    Positions further to the right are the *blind spot* of such layers. A flow that reverses the
    order between steps has it on the other side in every other step.

    With ``context`` maps, (..., context * height * width), an output also depends on the context
    at its own position, and at the positions that it sees.

    Raises ValueError if ``hidden`` is too small to represent every dependency.

    Reference: van den Oord, Kalchbrenner, Kavukcuoglu, *Pixel Recurrent Neural Networks*,
    ICML 2016, arXiv:1601.06759. For CIFAR-10 the VLAE paper used two hidden layers of 128 maps
    over codes of 16x8x8.
    """

    taps: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        outputs: int,
        hidden: int,
        layers: int = 2,
        context: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.outputs = shape, outputs
        channels, height, width = shape
        masks, self.seen = _masks(channels, outputs, hidden, layers, lowest=-1)
        self.hidden, self.head = _layers(map(_with_neighbours, masks))
        self.from_context = nn.Linear(context, hidden, bias=False) if context else None
        # The indices of each position's five taps in maps padded by a row of zeros above and a
        # column on either side. They are computed on the CPU even if the weights are made on
        # another device (such as meta), since their values are needed here.
        place = torch.arange(height * width, device="cpu")
        row, column = place // width, place % width
        taps = torch.tensor([0, 1, 2, width + 2, width + 3], device="cpu")
        self.register_buffer("taps", (row * (width + 2) + column)[:, None] + taps, persistent=False)
        # No position reads another with the same number: of all taps, the one above to the right
        # has the nearest number, one less.
        number = column + 2 * row
        self.wavefronts = [(number == n).nonzero()[:, 0] for n in number.unique()]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self._to_positions(x)
        for number, layer in enumerate(self.hidden):
            x = layer(self._look(x))
            if number == 0 and self.from_context is not None and context is not None:
                x = x + self.from_context(self._to_positions(context))
            x = F.relu(x)
        outputs = self.head(self._look(x)).unflatten(-1, (-1, self.outputs))
        # (..., outputs, channels, height, width), the maps then flattened.
        return outputs.movedim((-1, -2), (-4, -3)).flatten(-3)

    def solve(self, noise: Tensor, step: Step, context: Tensor | None = None) -> Tensor:
        """The x with x_i = step(noise_i, forward(x)[..., i]) for every i.

        (batch, channels * height * width) -> the same shape. The positions on a sheared diagonal do
        not read each other, so they are solved together, one channel at a time: channels *
        (width + 2 * (height - 1)) rounds. Each map is evaluated once at each position, as soon as
        its inputs are known, so the total takes the arithmetic of one ``forward``.
        """
        batch, (_, height, width) = len(noise), self.shape
        noise = self._to_positions(noise).flatten(1, 2)
        layers = (*self.hidden, self.head)
        known = [
            noise.new_zeros(batch, (height + 1) * (width + 2), layer.in_features // 5)
            for layer in layers
        ]
        shift = None
        if self.from_context is not None and context is not None:
            shift = self.from_context(self._to_positions(context)).flatten(1, 2)
        for points in self.wavefronts:
            neighbours, here = self.taps[points, :-1], self.taps[points, -1]
            # The neighbours' values are final. Folded into the biases, they leave a MADE over the
            # channels of each point.
            at_points = []
            for layer, values in zip(layers, known, strict=True):
                before = values[:, neighbours].flatten(2).flatten(0, 1)
                bias = torch.addmm(layer.bias, before, layer.weight[:, : before.shape[1]].T)
                at_points.append((layer.weight[:, before.shape[1] :], bias))
            if shift is not None:
                at_points[0] = (at_points[0][0], at_points[0][1] + shift[:, points].flatten(0, 1))
            solved = _solve(at_points, self.seen, noise[:, points].flatten(0, 1), step)
            for values, new in zip(known, solved, strict=True):
                values[:, here] = new.unflatten(0, (batch, -1))
        return known[0][:, self.taps[:, -1]].transpose(1, 2).flatten(1)

    def _to_positions(self, maps: Tensor) -> Tensor:
        """(..., channels * height * width) -> (..., height, width, channels)."""
        return maps.unflatten(-1, (-1, *self.shape[1:])).movedim(-3, -1)

    def _look(self, x: Tensor) -> Tensor:
        """Gather the five taps of each position.

        (..., height, width, maps) -> (..., height, width, 5 * maps). On a CPU a gather and a matrix
        product take about a seventh longer than a convolution (``benchmarks/flow.py``). But
        ``solve`` uses the same taps and weights, and they work for any leading dimensions.
        """
        padded = F.pad(x, (0, 0, 1, 1, 1, 0)).flatten(-3, -2)
        taps = padded.index_select(-2, self.taps.flatten())
        return taps.unflatten(-2, (*self.shape[1:], -1)).flatten(-2)


def _masks(
    size: int, outputs: int, hidden: int, layers: int, lowest: int
) -> tuple[list[Tensor], list[int]]:
    """The mask of each layer, head last, and for each output how many hidden units it sees.

    A hidden unit of degree d sees the inputs up to d, and serves the outputs after d. Degrees run
    from ``lowest`` to size - 2. Units are sorted by degree, so the units that are known after the
    first few inputs are a slice of each layer.
    """
    num_degrees = max(1, size - 1 - lowest)
    if hidden < num_degrees:
        raise ValueError(
            f"a MADE over {size} inputs needs at least {num_degrees} hidden units, not {hidden}; "
            "raise flow_hidden"
        )
    position = torch.tensor(range(size))
    degrees = [lowest + unit * num_degrees // hidden for unit in range(hidden)]
    degree, next_degree = torch.tensor(degrees), torch.tensor([each + 1 for each in degrees])
    masks = [_at_least(degree, position)]
    masks += [_at_least(degree, degree)] * (layers - 1)
    masks += [_at_least(position, next_degree)[:, None].expand(-1, outputs, -1).flatten(0, 1)]
    return masks, [bisect_left(degrees, i) for i in range(size)]


def _with_neighbours(mask: Tensor) -> Tensor:
    """The mask of a position's inputs, after those of four neighbours, of which all are seen:
    (rows, columns) -> (rows, 5 * columns).
    """
    rows, columns = mask.shape
    if mask.is_meta:
        return torch.empty(rows, 5 * columns, device="meta")
    return torch.cat([torch.ones(rows, 4 * columns), mask], 1)


def _at_least(left: Tensor, right: Tensor) -> Tensor:
    """left_i >= right_j: (rows,), (columns,) -> (rows, columns).

    On the device meta, where a mask has no values, comparing would load PyTorch's compiler: seconds
    whenever a process first opens a model. So would ``arange`` and ``cat``.
    """
    if left.is_meta:
        return torch.empty(len(left), len(right), dtype=torch.bool, device="meta")
    return left[:, None] >= right[None, :]


def _layers(masks: Iterable[Tensor]) -> tuple[nn.ModuleList, MaskedLinear]:
    """The hidden layers, and the head initialised to zero."""
    *hidden, head = (MaskedLinear(mask) for mask in masks)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.ModuleList(hidden), head


def _solve(
    layers: Sequence[tuple[Tensor, Tensor]], seen: Sequence[int], noise: Tensor, step: Step
) -> list[Tensor]:
    """Invert a MADE, given as the weight and bias of each layer.

    Biases are (units,), or (rows, units) with one for each row of ``noise``, (rows, size). Returns
    x, (rows, size), and the values of each hidden layer, (rows, hidden). Masks are not needed: when
    a unit is evaluated, only the inputs that it may see are known.
    """
    known = [noise.new_empty(len(noise), 0) for _ in layers]
    *hidden, (head_weight, head_bias) = layers
    outputs = len(head_weight) // len(seen)
    done = 0
    for i, ready in enumerate(seen):
        for number, (weight, bias) in enumerate(hidden):
            new = _part(weight, bias, slice(done, ready), known[number])
            known[number + 1] = torch.cat([known[number + 1], F.relu(new)], -1)
        own = slice(i * outputs, (i + 1) * outputs)
        value = _part(head_weight, head_bias, own, known[-1])
        known[0] = torch.cat([known[0], step(noise[:, i : i + 1], value[..., None])], -1)
        done = ready
    return known


def _part(weight: Tensor, bias: Tensor, units: slice, known: Tensor) -> Tensor:
    """Some units of a layer, evaluated from its first inputs, those that are known."""
    return torch.addmm(bias[..., units], known, weight[units, : known.shape[-1]].T)
