"""Likelihoods p(pixel | parameters): Bernoulli, and a mixture of discretized logistics.

Bernoulli is for binary images, the mixture for 8-bit grey and RGB. A likelihood states how many
parameters a pixel has and how many uniform numbers a sample of it takes, and turns parameters into
a distribution of pixels. Pixels lie in [0, 1]. In this module channels are the last dimension:
(..., height, width, channels).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Distribution(Protocol):
    """A distribution of images, or of some pixels of them."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, summed over the image: (..., height, width, channels) -> (...)."""

    def sample(self, uniform: Tensor) -> Tensor:
        """Pixels from noise in [0, 1): (..., uniforms) -> (..., channels)."""


class Likelihood(Protocol):
    """A family of distributions of a pixel."""

    num_parameters: int
    """Parameters of a pixel."""
    num_uniforms: int
    """Uniform random numbers that a sample of a pixel takes."""

    def __call__(self, parameters: Tensor) -> Distribution:
        """The distribution with these parameters: (..., num_parameters)."""


class BernoulliLikelihood:
    """Binary sub-pixels, 0 or 1, independent given their logits."""

    def __init__(self, channels: int) -> None:
        self.num_parameters = self.num_uniforms = channels

    def __call__(self, parameters: Tensor) -> "Bernoulli":
        return Bernoulli(parameters)


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


class LogisticMixtureLikelihood:
    """8-bit sub-pixels k / 255: a mixture of logistics, discretized to the 256 values.

    A pixel is autoregressive over its channels: in each component the mean of a channel is linear
    in the channels before it.

    Reference: Salimans, Karpathy, Chen, Kingma, *PixelCNN++*, ICLR 2017, arXiv:1701.05517.
    """

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
