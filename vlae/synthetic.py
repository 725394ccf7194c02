"""Synthetic images with an exact likelihood and entropy: a global pattern under a local texture.

The theory of the VLAE makes statements about nats, so a distribution whose nats are known can test
it. It tells how far a model's code length is above the entropy, which is the lower limit for every
model, and how much information of an image is global.
"""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vlae.window import Window

STRENGTH = 1.25
"""Height of the clouds in log odds.

High enough for a whole image to show where they are, and too low for a few pixels to show it.
"""

COUPLINGS = (0.1, 0.6, 0.2, 0.6)
"""Couplings to the pixels above left, above, above right, and left, in log odds."""


class PatternedTexture:
    """Binary images x: one of ``classes`` patterns, under a causal Markov random field as texture.

    The class c is uniform. Given c, pixels are drawn in raster order. With spins s = 2x - 1, which
    are 0 outside the image, the log odds of a pixel are

        log p(x_i = 1 | earlier, c) / p(x_i = 0 | earlier, c)
            = pattern_c(i) + sum_o coupling_o s_(i+o)

    for the offsets o of a window. A decoder that sees this window and knows c can be exact: only c
    is not local. p(x) is the mean over classes of the products of these conditionals.

    patterns: log odds, (classes, height, width). couplings: log odds, one for each of
    ``window.offsets``.

    Raises ValueError if there are more or fewer couplings than offsets, and if the window is more
    than one row tall: the exact entropy would then need too many states, 2^(rows * width).
    """

    def __init__(self, patterns: Tensor, window: Window, couplings: tuple[float, ...]) -> None:
        self.classes, self.height, self.width = patterns.shape
        window.check_fits(self.height, self.width)
        if window.full or window.rows > 1:
            raise ValueError(
                f"a texture over the window {window} has too many states; use one of at most one "
                "row, such as 3x1"
            )
        if len(couplings) != len(window.offsets):
            raise ValueError(
                f"the window {window} has {len(window.offsets)} pixels, but there are "
                f"{len(couplings)} couplings; pass one for each pixel"
            )
        self.patterns, self.window, self.couplings = patterns.double(), window, couplings

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return 1, self.height, self.width

    # --- sampling ---

    def sample(self, num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images, (num_images, 1, height, width), of pixels 0 or 1, and their classes."""
        labels = torch.randint(self.classes, (num_images,), generator=generator)
        return self.draw(
            labels, torch.rand(num_images, *self.image_shape, generator=generator)
        ), labels

    def draw(self, labels: Tensor, uniform: Tensor) -> Tensor:
        """Images of the given classes, (num_images,), from uniform noise in [0, 1).

        Noise and result are (num_images, 1, height, width). An image depends only on its own class
        and noise. The images are float32, as from a data loader.
        """
        # Pixels come first and images last, so that each step works on contiguous memory.
        threshold = torch.logit(uniform[:, 0]).permute(1, 2, 0).contiguous()
        pattern = self.patterns.to(uniform).permute(1, 2, 0)
        spins = torch.zeros(self.height, self.width, len(labels))
        for row in range(self.height):
            field = pattern[row][:, labels]
            for column in range(self.width):
                log_odds = field[column]
                for (down, right), coupling in self._seen(row, column):
                    log_odds = log_odds + coupling * spins[row + down, column + right]
                spins[row, column] = (threshold[row, column] < log_odds).to(spins) * 2 - 1
        return ((spins + 1) / 2).permute(2, 0, 1)[:, None].contiguous()

    # --- likelihood ---

    def log_prob_given_class(self, x: Tensor) -> Tensor:
        """log p(x|c) for every class, in nats: (batch, 1, height, width) -> (batch, classes)."""
        pixels = x[:, 0].long()
        padded = F.pad(pixels, (self.window.left, self.window.right, self.window.rows, 0))
        place = (
            torch.arange(self.height * self.width).view(self.height, self.width).expand_as(pixels)
        )
        for down, right in self.window.offsets:
            top, left = self.window.rows + down, self.window.left + right
            place = 2 * place + padded[:, top : top + self.height, left : left + self.width]
        return F.embedding_bag(
            (2 * place + pixels).flatten(1), self._conditional.flatten(0, -2), mode="sum"
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats: (batch, 1, height, width) -> (batch,)."""
        return self.log_prob_given_class(x).logsumexp(1) - math.log(self.classes)

    def class_entropy(self, x: Tensor) -> Tensor:
        """The entropy of the class given the image, -sum_c p(c|x) log p(c|x), in nats.

        (batch, 1, height, width) -> (batch,). The mean over images is H(c|x). The global
        information is I(c; x) = log(classes) - H(c|x), and the entropy of the images
        H(x) = H(x|c) + I(c; x).
        """
        log_posterior = self.log_prob_given_class(x).log_softmax(1)
        return -(log_posterior.exp() * log_posterior).sum(1)

    # --- exact entropies ---

    @cached_property
    def entropy_given_class(self) -> float:
        """H(x|c) in nats per image, exact."""
        log_conditional = self._conditional.unflatten(0, (self.height, self.width)).movedim(-1, 0)
        return (
            -float((self._neighbourhoods * log_conditional.view_as(self._neighbourhoods)).sum())
            / self.classes
        )

    def code_length_without_class(self, window: Window) -> float:
        """sum_i H(x_i | x_window(i)), exact, in nats per image.

        It is the least code length of a decoder with this window and no code. Its excess over the
        entropy is the most that a code can save such a decoder. Raises ValueError if the window
        sees pixels outside the texture's own.
        """
        if window.full or not set(window.offsets) <= set(self.window.offsets):
            raise ValueError(
                f"the window {window} sees more than the texture's own, {self.window}; use that "
                "one or a smaller one"
            )
        joint = self._neighbourhoods.mean(0)
        unseen = [
            2 + number
            for number, offset in enumerate(self.window.offsets)
            if offset not in window.offsets
        ]
        if unseen:
            joint = joint.sum(unseen)
        return float(
            torch.xlogy(joint.sum(-1), joint.sum(-1)).sum() - torch.xlogy(joint, joint).sum()
        )

    @cached_property
    def _conditional(self) -> Tensor:
        """log p(x_i | pixels of its window, c), from which everything else is computed.

        (pixels, 2, ..., 2, 2, classes): one dimension of 2 for each of the window's offsets, then
        one for x_i. The value of a pixel outside the image makes no difference.
        """
        tables = []
        for row in range(self.height):
            for column in range(self.width):
                log_odds, inside = self.patterns[:, row, column], dict(self._seen(row, column))
                for offset in reversed(self.window.offsets):
                    coupling = inside.get(offset, 0.0)
                    log_odds = torch.stack([log_odds - coupling, log_odds + coupling])
                tables.append(torch.stack([F.logsigmoid(-log_odds), F.logsigmoid(log_odds)], -2))
        return torch.stack(tables)

    @cached_property
    def _neighbourhoods(self) -> Tensor:
        """P(pixels at the window's offsets, the pixel itself | c).

        (classes, height, width, 2, ..., 2, 2); pixels outside the image count as 0. Later pixels
        depend only on the last row and a few pixels more. The probabilities of all their
        2^(width + left) configurations are carried from pixel to pixel.
        """
        num_above, num_left = len(self.window.offsets) - self.window.left, self.window.left
        memory = max(1, self.width + num_left if num_above else num_left)
        conditional = (
            self._conditional[..., 1, :]
            .exp()
            .view(self.height, self.width, 2**num_above, 1, 2**num_left, self.classes)
        )
        shape = (2**num_above, 2 ** (memory - num_above - num_left), 2**num_left)
        # Rows of a few numbers would be multiplied one at a time: p is repeated to longer ones.
        repeats = min(32, shape[1])
        white = torch.empty(shape, dtype=torch.float64).view(shape[0], -1, repeats * shape[2])
        black = torch.empty_like(white)
        seen = torch.empty(
            self.classes, self.height, self.width, shape[0], shape[2], dtype=torch.float64
        )
        for c in range(self.classes):
            # The bits of a state are its pixels in raster order: first those above, last those to
            # the left.
            states = torch.zeros(2**memory, dtype=torch.float64)
            states[0] = 1
            repeated = conditional[..., c].repeat(1, 1, 1, 1, repeats)
            for row in range(self.height):
                for column in range(self.width):
                    torch.sum(states.view(shape), 1, out=seen[c, row, column])
                    # The new pixel becomes the last bit, and the first bit is dropped.
                    torch.mul(states.view(white.shape), repeated[row, column], out=white)
                    torch.sub(states.view(white.shape), white, out=black)
                    torch.add(*black.view(2, -1), out=states.view(-1, 2)[:, 0])
                    torch.add(*white.view(2, -1), out=states.view(-1, 2)[:, 1])
        p = conditional[:, :, :, 0].movedim(-1, 0)
        joint = torch.stack([seen * (1 - p), seen * p], -1).view(
            self.classes, self.height, self.width, *(2 for _ in self.window.offsets), 2
        )
        for row in range(self.height):
            for column in range(self.width):
                joint[:, row, column] = self._inside(joint[:, row, column], row, column)
        return joint

    def _seen(self, row: int, column: int) -> list[tuple[tuple[int, int], float]]:
        """The offsets from (row, column) that lie within the image, with their couplings."""
        pairs = zip(self.window.offsets, self.couplings, strict=True)
        return [
            ((r, c), coupling)
            for (r, c), coupling in pairs
            if row + r >= 0 and 0 <= column + c < self.width
        ]

    def _inside(self, joint: Tensor, row: int, column: int) -> Tensor:
        """Move the probability of pixels outside the image to the value 0, for every class.

        Their bits of the state hold pixels of other rows.
        """
        inside = dict(self._seen(row, column))
        for dimension, offset in enumerate(self.window.offsets, 1):
            if offset not in inside:
                both = joint.sum(dimension, keepdim=True)
                joint = torch.cat([both, torch.zeros_like(both)], dimension)
        return joint


def clouds(size: int = 16, places: int = 12) -> PatternedTexture:
    """The distribution of ``vlae theory``: light and dark clouds with a ragged texture.

    The pattern is cos(x) + cos(y), with two periods across the image. The class is its position,
    one of ``places`` x ``places`` that cover three quarters of a period in both directions. These
    lie so close that an image does not tell neighbouring positions apart. A Gaussian posterior can
    code such a position, known up to an error, without loss. The texture correlates a pixel with
    its neighbours in the window 3x1.
    """
    place = 0.75 * torch.linspace(0, 1, places, dtype=torch.float64)[:, None]
    wave = STRENGTH * torch.cos(
        2 * math.pi * (2 * torch.arange(size, dtype=torch.float64) / size - place)
    )  # (places, size)
    patterns = (wave[:, None, :, None] + wave[None, :, None, :]).flatten(0, 1)
    return PatternedTexture(patterns, Window(3, 1), COUPLINGS)
