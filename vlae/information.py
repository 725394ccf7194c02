"""The information that the code holds about the image, and in which latents.

Everything is computed from the posteriors q(z|x) of many images, in nats.
"""

import math

import torch
from torch import Tensor

from vlae.distributions import HALF_LOG_2PI, DiagonalGaussian

ACTIVE_VARIANCE = 0.01
"""A latent is active if its posterior mean varies by more than this over the images.

Reference: Burda, Grosse, Salakhutdinov, *Importance Weighted Autoencoders*, ICLR 2016,
arXiv:1509.00519, section 5.2.
"""


def capacity(mean_variance: Tensor, mean_square_scale: Tensor, mean_log_scale: Tensor) -> Tensor:
    """The capacity of each latent: an upper bound on I(x; z_i), independent of the prior.

        0.5 log(Var_x[mean_i] + E_x[scale_i^2]) - E_x[log scale_i]

    The bound holds because a Gaussian has the largest entropy for its variance. It is exact if the
    means are Gaussian and the scale is the same for all images: the capacity 0.5 log(1 + signal /
    noise) of a Gaussian channel. It is also the rate of z_i under the best Gaussian prior. The sum
    over the latents is at least I(x; z), and exceeds it if latents are redundant.

    The arguments are moments over images of the posterior's mean and scale. They and the result
    have one value for each latent.
    """
    return 0.5 * torch.log(mean_variance + mean_square_scale) - mean_log_scale


@torch.no_grad()
def mutual_information(posterior: DiagonalGaussian, noise: Tensor, rows: int = 256) -> Tensor:
    """I(x; z) between N equally likely images and their codes, estimated from one code of each.

        log q(z_n|x_n) - log (1/N) sum_m q(z_n|x_m),   z_n from q(z|x_n)

    Returns these terms, (N,); their mean is the estimate. No term exceeds log N, the entropy of
    the choice among N images. For images from a larger population the mean is, in expectation, a
    lower bound on its I(x; z), and useless if that is above log N.

    The posterior's parameters and the standard normal ``noise`` have the shape (N, latents). The
    N x N densities are evaluated for ``rows`` codes at a time, in float64.

    References: Hoffman, Johnson, *ELBO surgery*, NeurIPS 2016 workshop on approximate inference,
    for the quantity. Poole, Ozair, van den Oord, Alemi, Tucker, *On variational bounds of mutual
    information*, ICML 2019, arXiv:1905.06922, for the bound.
    """
    mean, log_scale = posterior.mean.double(), posterior.log_scale.double()
    # Below, z^2 and mean^2 are subtracted from each other: centering limits the cancellation.
    mean = mean - mean.mean(0)
    z = DiagonalGaussian(mean, log_scale).sample(noise.double())
    # log q(z|x_m) is linear in z^2 and z, so one matrix product gives it for all pairs.
    precision = torch.exp(-2 * log_scale)
    slopes = torch.cat([-0.5 * precision, mean * precision], 1)  # (N, 2 * latents)
    constants = -(0.5 * mean.square() * precision + log_scale + HALF_LOG_2PI).sum(1)  # (N,)
    values = []
    for start in range(0, len(z), rows):
        part = z[start : start + rows]
        log_densities = torch.cat([part.square(), part], 1) @ slopes.T + constants  # (rows, N)
        own = log_densities.diagonal(start)
        values.append(own - torch.logsumexp(log_densities, 1) + math.log(len(z)))
    return torch.cat(values)
