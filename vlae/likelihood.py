"""Likelihoods p(pixel | parameters): Bernoulli, and a mixture of discretized logistics.

Bernoulli is for binary images, the mixture for 8-bit grey and RGB. A likelihood states how many
parameters a pixel has and how many uniform numbers a sample of it takes, and turns parameters into
a distribution of pixels. Pixels lie in [0, 1]. In this module channels are the last dimension:
(..., height, width, channels).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vlae.coding.decisions import Cells, Decide, digits


class Distribution(Protocol):
    """A distribution of images, or of some pixels of them."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, summed over the image: (..., height, width, channels) -> (...)."""

    def sample(self, uniform: Tensor) -> Tensor:
        """Pixels from noise in [0, 1): (..., uniforms) -> (..., channels)."""

    def mode(self) -> Tensor:
        """The most likely pixels, channel by channel: (..., channels)."""

    def draw(self, decide: Decide) -> Tensor:
        """Pixels by binary decisions, whose probabilities are this distribution's: (..., channels).

        Probabilities are computed in double precision. The order of the decisions is that of
        ``Likelihood.digits``.
        """


class Likelihood(Protocol):
    """A family of distributions of a pixel."""

    num_parameters: int
    """Parameters of a pixel."""
    num_uniforms: int
    """Uniform random numbers that a sample of a pixel takes."""

    levels: int
    """Bits of a sub-pixel: its values are k / (2^levels - 1)."""

    def __call__(self, parameters: Tensor) -> Distribution:
        """The distribution with these parameters: (..., num_parameters)."""

    def digits(self, x: Tensor) -> Iterator[Tensor]:
        """The decisions that ``Distribution.draw`` takes to draw pixels x, (..., channels)."""


class BernoulliLikelihood:
    """Binary sub-pixels, 0 or 1, independent given their logits."""

    levels = 1

    def __init__(self, channels: int) -> None:
        self.num_parameters = self.num_uniforms = channels

    def __call__(self, parameters: Tensor) -> "Bernoulli":
        return Bernoulli(parameters)

    def digits(self, x: Tensor) -> Iterator[Tensor]:
        """The pixels themselves."""
        yield x.round().to(torch.int64)


@dataclass(frozen=True)
class Bernoulli:
    """Binary sub-pixels with the given ``logits``, of shape (..., height, width, channels)."""

    logits: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, summed over the image: (..., height, width, channels) -> (...)."""
        return F.logsigmoid((2 * x - 1) * self.logits).sum((-3, -2, -1))

    def sample(self, uniform: Tensor) -> Tensor:
        """1 where ``uniform`` noise in [0, 1) falls below the probability, else 0."""
        return (uniform < torch.sigmoid(self.logits)).to(self.logits.dtype)

    def mode(self) -> Tensor:
        """The most likely pixels: (..., channels)."""
        return (self.logits > 0).to(self.logits.dtype)

    def draw(self, decide: Decide) -> Tensor:
        """Pixels by one decision for each sub-pixel: (..., channels)."""
        return decide(torch.sigmoid(self.logits.double())).to(self.logits.dtype)


class LogisticMixtureLikelihood:
    """8-bit sub-pixels k / 255: a mixture of logistics, discretized to the 256 values.

    A pixel is autoregressive over its channels: in each component the mean of a channel is linear
    in the channels before it.

    Reference: Salimans, Karpathy, Chen, Kingma, *PixelCNN++*, ICLR 2017, arXiv:1701.05517.
    """

    levels = 8

    def __init__(self, channels: int, mixtures: int) -> None:
        self.channels, self.mixtures = channels, mixtures
        self.pairs = [(later, earlier) for later in range(channels) for earlier in range(later)]
        self.num_parameters = mixtures * (1 + 2 * channels + len(self.pairs))
        self.num_uniforms = 1 + channels

    def __call__(self, parameters: Tensor) -> "LogisticMixture":
        logits, means, raw, slopes = parameters.unflatten(-1, (-1, self.mixtures)).split(
            (1, self.channels, self.channels, len(self.pairs)), -2
        )
        coefficients = means.new_zeros(
            *means.shape[:-2], self.channels, self.channels, self.mixtures
        )
        for number, (later, earlier) in enumerate(self.pairs):
            coefficients[..., later, earlier, :] = torch.tanh(slopes[..., number, :])
        return LogisticMixture(
            logits.squeeze(-2), means, raw.clamp(*LogisticMixture.LOG_SCALES), coefficients
        )

    def digits(self, x: Tensor) -> Iterator[Tensor]:
        """The bits of each channel's value, one channel after the other."""
        for channel in (255 * x).round().to(torch.int64).unbind(-1):
            yield from digits(channel, self.levels)


@dataclass(frozen=True)
class LogisticMixture:
    """A mixture of discretized logistics over the channels of a pixel.

    logits: (..., mixtures). means, log_scales: (..., channels, mixtures), for channels scaled to
    [-1, 1]. coefficients: (..., channels, channels, mixtures); entry [later, earlier] is the weight
    of the earlier channel in the mean of the later one, and all others are zero.
    """

    LOG_SCALES = (-7.0, 5.0)
    """Bounds of a log scale.

    Scales far below the distance of two values, or far above the whole range, make no difference.
    """

    logits: Tensor
    means: Tensor
    log_scales: Tensor
    coefficients: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, summed over the image: (..., height, width, channels) -> (...).

        Values of x are 0, 1/255, ..., 1. The probability of a value is the logistic's mass between
        the midpoints to its neighbours. The lowest and the highest value also take the tails, so
        the 256 probabilities sum to 1. With a and b the standardized upper and lower midpoint,

            sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)),

        which avoids the cancellation of nearly equal numbers.
        """
        y = 2 * x - 1
        means = self.means + torch.einsum("...cdk,...d->...ck", self.coefficients, y)
        inverse_scale = torch.exp(-self.log_scales)
        away = (y[..., None] - means) * inverse_scale
        half = inverse_scale / 255
        lowest, highest = (x < 0.5 / 255)[..., None], (x > 254.5 / 255)[..., None]
        below_upper = F.logsigmoid(away + half).masked_fill(highest, 0)
        above_lower = F.logsigmoid(half - away).masked_fill(lowest, 0)
        between = torch.log(-torch.expm1(-2 * half)).masked_fill(lowest | highest, 0)
        components = (below_upper + above_lower + between).sum(-2)
        return torch.logsumexp(components + F.log_softmax(self.logits, -1), -1).sum((-2, -1))

    def sample(self, uniform: Tensor) -> Tensor:
        """Pixels with values 0, 1/255, ..., 1: (..., 1 + channels) -> (..., channels).

        The first uniform number selects the component; the others give the channels in order.
        """
        up_to = torch.softmax(self.logits, -1).cumsum(-1)[..., :-1]
        chosen = (uniform[..., :1] >= up_to).sum(-1, keepdim=True)
        logistic = torch.logit(uniform[..., 1:].clamp(2**-25, 1 - 2**-24))
        drawn: list[Tensor] = []
        for channel in range(self.means.shape[-2]):
            mean = self.means[..., channel, :].gather(-1, chosen).squeeze(-1)
            scale = self.log_scales[..., channel, :].gather(-1, chosen).squeeze(-1).exp()
            for earlier, value in enumerate(drawn):
                coefficients = self.coefficients[..., channel, earlier, :]
                mean = mean + coefficients.gather(-1, chosen).squeeze(-1) * value
            y = (mean + scale * logistic[..., channel]).clamp(-1, 1)
            drawn.append(torch.round((y + 1) * 127.5) / 127.5 - 1)
        return (torch.stack(drawn, -1) + 1) / 2

    def mode(self) -> Tensor:
        """The most likely value of each channel given those before: (..., channels)."""

        def choose(cells: Cells) -> Tensor:
            values = torch.arange(256)
            masses = [
                cells.masses(value.expand(len(cells.weight))).sum(-1) for value in values.unbind()
            ]
            return torch.stack(masses, -1).argmax(-1)

        return self._by_channel(choose)

    def draw(self, decide: Decide) -> Tensor:
        """Pixels by eight decisions for each channel: (..., channels)."""
        return self._by_channel(lambda cells: cells.draw(decide))

    def _by_channel(self, choose: Callable[[Cells], Tensor]) -> Tensor:
        """Pixels whose channels are chosen in order, each given those before: (..., channels).

        Once a channel is known, each component counts as much as it had predicted it.
        """
        logits, means, log_scales, coefficients = (
            value.double().flatten(0, self.logits.dim() - 2)
            for value in (self.logits, self.means, self.log_scales, self.coefficients)
        )
        weight, drawn = torch.softmax(logits, -1), list[Tensor]()
        for channel in range(means.shape[1]):
            mean = means[:, channel]
            for earlier, value in enumerate(drawn):
                mean = mean + coefficients[:, channel, earlier] * (value[:, None] / 127.5 - 1)
            inverse_scale = torch.exp(-log_scales[:, channel])
            # The edge below value v lies at (2 v - 1) / 255 - 1 on the scale of the means.
            cells = Cells(
                (-1 / 255 - 1 - mean) * inverse_scale,
                2 / 255 * inverse_scale,
                weight,
                LogisticMixtureLikelihood.levels,
                torch.sigmoid,
            )
            drawn.append(choose(cells))
            masses = cells.masses(drawn[-1])
            weight = torch.where(
                (total := masses.sum(-1, keepdim=True)) > 0, masses / total, weight
            )
        pixels = torch.stack(drawn, -1) / 255
        return pixels.to(self.logits.dtype).unflatten(0, self.logits.shape[:-1])
