"""Probes: how well simple classifiers tell an image's class from its code.

A probe is fitted on the codes (posterior means) of training images; how strongly it is regularised is chosen by its accuracy on
validation images; then it is asked, once, about the images that are evaluated. *Linear* is logistic regression, *two-layer* a network
with one hidden layer. All of it is deterministic.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

import vlae
from pipeline.config import Binarization
from pipeline.errors import UserError
from pipeline.loader import Batch, EvalLoader, Integers, binarize
from pipeline.measure import several_at_once

Floats = npt.NDArray[np.float64]

# From the strongest regularisation to the weakest: of equally accurate probes the simplest is chosen.
CHOICES: dict[str, list[dict[str, float]]] = {
    "linear_probe": [{"C": strength} for strength in (0.01, 0.1, 1.0, 10.0, 100.0)],
    "two_layer_probe": [{"alpha": strength} for strength in (1.0, 0.1, 0.001)],
}
HIDDEN, EPOCHS, LEARNING_RATE = 128, 20, 3e-3


@dataclass(frozen=True)
class Codes:
    """The posteriors of labelled images."""

    mean: Floats  # (num_images, latents)
    scale: Floats  # (num_images, latents)
    labels: Integers  # (num_images,)


def encode(
    model: vlae.VLAE,
    loader: EvalLoader,
    *,
    binarization: Binarization,
    seed: int,
    device: torch.device,
    threads: int,
    progress: Callable[[int], object],
) -> Codes:
    """The codes of the labelled images among all that ``loader`` gives, in its order.

    ``threads`` batches are worked on at once; ``progress`` is called with the number of images of each.
    """

    def posterior(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():  # here, since each thread has its own switch
            found = model.encoder(binarize(batch, binarization, seed).to(device))
        return found.mean.cpu(), found.log_scale.cpu(), batch.labels

    parts = []
    for part in several_at_once(posterior, loader, threads):
        parts.append(part)
        progress(len(part[0]))
    mean, log_scale, labels = (torch.cat(each) for each in zip(*parts, strict=True))
    known = labels >= 0
    return Codes(mean[known].double().numpy(), log_scale[known].double().exp().numpy(), labels[known].numpy())


class Probes:
    """A linear and a two-layer probe, and the class that is most frequent in training, to compare them with.

    Each latent is measured by its spread under the aggregated posterior, sqrt(Var[mean] + E[scale^2]): differences between means that
    drown in the posterior's own noise stay small, instead of being blown up.

    Raises UserError if all training codes are of one class.
    """

    def __init__(self, train: Codes, valid: Codes) -> None:
        classes, counts = np.unique(train.labels, return_counts=True)
        if len(classes) < 2:
            raise UserError(
                f"a probe needs images of two classes, but the first {len(train.labels)} training images are of one"
            )
        self.majority = classes[counts.argmax()]
        self.center = train.mean.mean(0)
        self.spread = np.sqrt(train.mean.var(0) + np.square(train.scale).mean(0))
        self.classifiers: dict[str, LogisticRegression | MLPClassifier] = {}
        self.chosen: dict[str, dict[str, float]] = {}
        """Of each probe, what was chosen and its accuracy on the validation images."""
        fitted_on, chosen_on = self._scaled(train.mean), self._scaled(valid.mean)
        # Several threads add up in another order, and would decide doubtful images another way.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # to stop early is part of what a probe is
            for name, settings in CHOICES.items():
                for setting in settings:
                    classifier = _classifier(name, setting).fit(fitted_on, train.labels)
                    accuracy = float((classifier.predict(chosen_on) == valid.labels).mean())
                    if name not in self.chosen or accuracy > self.chosen[name]["valid_accuracy"]:
                        self.classifiers[name], self.chosen[name] = classifier, {**setting, "valid_accuracy": accuracy}

    def correct(self, mean: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Which images each probe, and the majority class, gets right: 1 or 0, of shape (batch,).

        mean: posterior means, (batch, latents); labels: (batch,).
        """
        codes, truth = self._scaled(mean.double().numpy()), labels.numpy()
        right = {name: classifier.predict(codes) == truth for name, classifier in self.classifiers.items()}
        return {name: torch.from_numpy(values) for name, values in (right | {"majority_class": truth == self.majority}).items()}

    def _scaled(self, mean: Floats) -> Floats:
        return (mean - self.center) / self.spread


def _classifier(name: str, setting: dict[str, float]) -> LogisticRegression | MLPClassifier:
    if name == "linear_probe":
        return LogisticRegression(max_iter=1000, **setting)
    return MLPClassifier((HIDDEN,), max_iter=EPOCHS, learning_rate_init=LEARNING_RATE, random_state=0, **setting)
