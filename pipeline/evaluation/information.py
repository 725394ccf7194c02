"""The information that codes hold about images, in which latents, and the rate beyond it."""

import math

import torch
from torch import Tensor

import vlae
from pipeline.evaluation.moments import Moments
from pipeline.values import JsonObject
from vlae.distributions import DiagonalGaussian
from vlae.information import ACTIVE_VARIANCE, capacity, mutual_information
from vlae.posterior import Posterior

LN_2 = math.log(2)
MAX_IMAGES = 10_000
"""The most images that the mutual information uses, the first ones.

It compares the code of each with the posteriors of all.
"""


def posterior_terms(posterior: Posterior) -> dict[str, Tensor]:
    """What ``capacities`` needs of a batch, (batch, latents) each, to be added to moments."""
    terms = {"code": posterior.code}
    if isinstance(posterior, DiagonalGaussian):
        log_scale = posterior.log_scale.double().cpu()
        terms |= {"log_scale": log_scale, "square_scale": torch.exp(2 * log_scale)}
    return terms


def capacities(moments: Moments) -> Tensor | None:
    """The capacity of each latent in nats, (latents,), from the moments of ``posterior_terms``.

    None unless the posteriors are Gaussian.
    """
    if "log_scale" not in moments.sums:
        return None
    return capacity(
        moments.variances("code"), moments.means("square_scale"), moments.means("log_scale")
    )


class Information:
    """Collects the posteriors of a split's images, batch by batch, for one ``report``.

    Memory stops growing at ``MAX_IMAGES`` images, and the result does not depend on the batches.
    """

    def __init__(self, groups: int = 1) -> None:
        """``groups``: the number of equal groups of neighbouring latents to report rates for."""
        self.groups = groups
        self.moments = Moments()
        self.kept: list[tuple[Tensor, ...]] = []
        self.room = MAX_IMAGES

    def add(self, posterior: Posterior, noise: Tensor, estimate: vlae.Estimate) -> None:
        """Add a batch: its posteriors, noise for a code of each image, and its bounds.

        noise: standard normal, (batch, latents).
        """
        rate = estimate.rate_per_latent.double().cpu()
        self.moments.add(
            posterior_terms(posterior)
            | {"rate": rate, "group_rate": rate.unflatten(1, (self.groups, -1)).sum(-1)}
        )
        if not isinstance(posterior, DiagonalGaussian):
            # An IAF's density at another image's code takes one pass per latent, which is too slow
            # for all pairs.
            return
        mean, log_scale = posterior.mean.double().cpu(), posterior.log_scale.double().cpu()
        if self.room:
            self.kept.append(
                tuple(each[: self.room] for each in (mean, log_scale, noise.cpu(), rate.sum(1)))
            )
            self.room -= len(self.kept[-1][0])

    def report(self, rate_splits: bool) -> JsonObject:
        """The figures of the whole code and, under ``latents``, lists with those of each latent.

        All are in nats or bits per image. ``mutual_information`` is I(x; z) between these images
        and their codes. ``marginal_kl`` is the rate of the same images less that:
        KL(q(z) || p(z)). These and ``capacity`` exist for Gaussian posteriors only.
        ``rate_splits``: whether latents, and groups of them, have rates of their own.
        """
        variance = self.moments.variances("code")
        values: JsonObject = {"active_units": int((variance > ACTIVE_VARIANCE).sum())}
        latents: JsonObject = {"code_variance": variance.tolist()}
        capacity_nats = capacities(self.moments)
        if capacity_nats is not None:
            values |= self._compare_pairs() | {
                "capacity_nats": capacity_nats.sum().item(),
                "capacity_bits": capacity_nats.sum().item() / LN_2,
            }
            latents |= {
                "capacity_nats": capacity_nats.tolist(),
                "capacity_bits": (capacity_nats / LN_2).tolist(),
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

    def _compare_pairs(self) -> dict[str, float | None]:
        """The figures from comparing each code with the posteriors of all images."""
        mean, log_scale, noise, rate = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        information = mutual_information(DiagonalGaussian(mean, log_scale), noise)
        compared = Moments()
        compared.add({"mutual_information": information, "marginal_kl": rate - information})
        values: dict[str, float | None] = {"mutual_information_images": len(information)}
        for name in ("mutual_information", "marginal_kl"):
            figure = compared.measured(name, "nats")
            values |= figure.to_json(f"{name}_nats") | {f"{name}_bits": figure.bits}
        return values
