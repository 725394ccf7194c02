"""Information accounting: what the code knows of the image, in which latents, and what the prior
charges beyond that.
"""

import math
from typing import Any

import torch
from torch import Tensor

import vlae
from pipeline.evaluation.moments import Moments
from vlae.distributions import DiagonalGaussian
from vlae.information import ACTIVE_VARIANCE, capacity, mutual_information
from vlae.posterior import Posterior

LN_2 = math.log(2)
MAX_IMAGES = 10_000
"""The mutual information compares each code with the posteriors of all images: of so many at most,
the first.
"""


class Information:
    """Takes in the posteriors of a split's images, batch by batch, for one ``report``.

    What is kept does not grow with the number of images beyond ``MAX_IMAGES``, and does not depend
    on how they are batched.
    """

    def __init__(self, groups: int = 1) -> None:
        """``groups``: the number of equal parts of the code, runs of neighbouring latents, that the
        rate is to be split over, too.
        """
        self.groups = groups
        self.moments = Moments()
        self.kept: list[tuple[Tensor, ...]] = []
        self.room = MAX_IMAGES

    def add(self, posterior: Posterior, noise: Tensor, estimate: vlae.Estimate) -> None:
        """Take in a batch: its posteriors and standard normal noise for a code of each, (batch,
        latents), and its bounds.
        """
        rate = estimate.rate_per_latent.double().cpu()
        self.moments.add(
            {
                "code": posterior.code,
                "rate": rate,
                "group_rate": rate.unflatten(1, (self.groups, -1)).sum(-1),
            }
        )
        if not isinstance(posterior, DiagonalGaussian):
            # An IAF's density at another image's code takes one pass per latent: too slow for
            # all pairs.
            return
        mean, log_scale = posterior.mean.double().cpu(), posterior.log_scale.double().cpu()
        self.moments.add({"log_scale": log_scale, "square_scale": torch.exp(2 * log_scale)})
        if self.room:
            self.kept.append(
                tuple(each[: self.room] for each in (mean, log_scale, noise.cpu(), rate.sum(1)))
            )
            self.room -= len(self.kept[-1][0])

    def report(self, rate_splits: bool) -> dict[str, Any]:
        """The figures of the code as a whole, and under ``latents`` lists of those of each; nats
        and bits per image.

        ``mutual_information`` is I(x; z) between these images and their codes; ``marginal_kl``, the
        rate of the same images less that, is KL(q(z) || p(z)). These and ``capacity`` are known of
        Gaussian posteriors only. ``rate_splits`` says whether latents, and groups of them, have
        rates of their own.
        """
        variance = self.moments.variances("code")
        values: dict[str, Any] = {"active_units": int((variance > ACTIVE_VARIANCE).sum())}
        latents: dict[str, Any] = {"code_variance": variance.tolist()}
        if self.kept:
            capacities = capacity(
                variance, self.moments.means("square_scale"), self.moments.means("log_scale")
            )
            values |= self._of_pairs() | {
                "capacity_nats": capacities.sum().item(),
                "capacity_bits": capacities.sum().item() / LN_2,
            }
            latents |= {
                "capacity_nats": capacities.tolist(),
                "capacity_bits": (capacities / LN_2).tolist(),
            }
        names = [] if not rate_splits else ["rate"] if self.groups == 1 else ["rate", "group_rate"]
        for name in names:
            rates = self.moments.means(name)
            latents |= {
                f"{name}_nats": rates.tolist(),
                f"{name}_nats_se": self.moments.standard_errors(name),
                f"{name}_bits": (rates / LN_2).tolist(),
            }
        return values | {"latents": latents}

    def _of_pairs(self) -> dict[str, float | None]:
        """What comparing codes with the posteriors of other images tells."""
        mean, log_scale, noise, rate = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        information = mutual_information(DiagonalGaussian(mean, log_scale), noise)
        compared = Moments()
        compared.add({"mutual_information": information, "marginal_kl": rate - information})
        values: dict[str, float | None] = {"mutual_information_images": len(information)}
        for name in ("mutual_information", "marginal_kl"):
            values[f"{name}_nats"] = compared.mean(name)
            values[f"{name}_nats_se"] = compared.standard_error(name)
            values[f"{name}_bits"] = compared.mean(name) / LN_2
        return values
