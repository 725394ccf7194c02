r"""Codes of a chosen number of bits: the number of a candidate drawn from the prior.

Sender and receiver draw the same 2^bits candidates from p(z). The sender chooses one by its weight
q(z|x) / p(z), and sends its number. Once 2^bits is well above exp(rate), the chosen candidate is
almost a sample of q(z|x); with fewer it is the best of what is there. So the length is chosen when
an image is sent, for any prior from which samples can be drawn.

Reference: Havasi, Peharz, Hernandez-Lobato, *Minimal Random Code Learning: Getting Bits Back from
Compressed Model Parameters*, ICLR 2019, arXiv:1810.00440, algorithm 1.
"""

import torch
from torch import Tensor

from vlae.distributions import DiagonalGaussian
from vlae.posterior import Posterior

CHUNK = 1 << 14
"""Candidates whose weights are computed at once."""


@torch.no_grad()
def choose(
    posterior: Posterior, candidates: Tensor, prior_log_prob: Tensor, gumbel: Tensor
) -> Tensor:
    """The number of a candidate for each image, int64 (batch,).

    candidates: (number, sent), the first latents of codes; with sent = latents, the whole. The
    posterior's other latents play no part. prior_log_prob: the candidates' log p(z), (number,).
    gumbel: independent standard Gumbel noise, (number,): the largest sum of it and a log weight is
    a draw in proportion to the weights. All images may share it, as they share the candidates.

    Raises ValueError unless the posterior is a diagonal Gaussian. The density of an IAF posterior
    at given candidates is sequential, and takes a pass for each of them and each image.
    """
    if not isinstance(posterior, DiagonalGaussian):
        raise ValueError(
            "codes of a chosen length need a diagonal Gaussian posterior, not "
            f"{type(posterior).__name__}; use a model with posterior_depth=0"
        )
    # -(z - mean)^2 / (2 scale^2) as a product of matrices, without what all candidates share.
    sent = candidates.shape[-1]
    precision = torch.exp(-2 * posterior.log_scale[:, :sent])
    by_image = torch.cat([-0.5 * precision, precision * posterior.mean[:, :sent]], -1)
    best = by_image.new_full((len(by_image),), -torch.inf)
    chosen = torch.zeros(len(by_image), dtype=torch.int64)
    for start in range(0, len(candidates), CHUNK):
        part = slice(start, start + CHUNK)
        by_candidate = torch.cat([candidates[part].square(), candidates[part]], -1)
        score, place = (by_image @ by_candidate.T - prior_log_prob[part] + gumbel[part]).max(-1)
        chosen = torch.where(score > best, start + place, chosen)
        best = torch.maximum(best, score)
    return chosen
