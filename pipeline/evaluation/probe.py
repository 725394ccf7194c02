"""Probes: how well simple classifiers tell an image's class from its code.

A probe is fitted on the codes of training images; how strongly it is regularised is chosen by its
accuracy on validation images; then it is asked, once, about the images that are evaluated. All of
it is deterministic.

``linear``, logistic regression, and ``two_layer``, a network with one hidden layer, see the code
that stands for an image: the posterior's mean. That has none of the posterior's noise, so they find
even what is too faint for z to carry. ``linear_of_sample`` sees a z drawn from the posterior, whose
rate bounds what any classifier can tell.
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
from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.data.manifest import Integers
from pipeline.errors import UserError
from pipeline.evaluation.measure import several_at_once
from pipeline.noise import Purpose, normal
from vlae.posterior import Posterior

Floats = npt.NDArray[np.float64]

# From the strongest regularisation to the weakest: of equally accurate probes the simplest is
# chosen.
LINEAR = [{"C": strength} for strength in (0.01, 0.1, 1.0, 10.0, 100.0)]
TWO_LAYER = [{"alpha": strength} for strength in (1.0, 0.1, 0.001)]
HIDDEN, EPOCHS, LEARNING_RATE = 128, 20, 3e-3


@dataclass(frozen=True)
class Codes:
    """Codes of labelled images."""

    code: Floats  # (num_images, latents): the one that stands for the image
    sample: Floats  # (num_images, latents): one drawn from the posterior
    labels: Integers  # (num_images,)

    @classmethod
    def of(cls, posterior: Posterior, noise: Tensor, labels: Tensor) -> "Codes":
        """The codes of those images that have a label; all arguments of a batch."""
        known = labels >= 0
        code, sample = (
            each.double().cpu()[known].numpy() for each in (posterior.code, posterior.sample(noise))
        )
        return cls(code, sample, labels[known].numpy())


def code_noise(model: vlae.VLAE, batch: Batch, seed: int) -> Tensor:
    """Standard normal noise for one code of each image: (batch, latents)."""
    return torch.from_numpy(normal((Purpose.CODE, seed), batch.positions, model.latents))


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

    ``threads`` batches are worked on at once; ``progress`` is called with the number of images of
    each.
    """

    def codes(batch: Batch) -> tuple[int, Codes]:
        with torch.no_grad():  # here, since each thread has its own switch
            posterior = model.encoder(binarize(batch, binarization, seed).to(device))
            return len(batch.labels), Codes.of(
                posterior, code_noise(model, batch, seed).to(device), batch.labels
            )

    parts = []
    for count, part in several_at_once(codes, loader, threads):
        parts.append(part)
        progress(count)
    return Codes(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("code", "sample", "labels")
        )
    )


class Probe:
    """One classifier, the best on the validation codes of those that ``settings`` make."""

    def __init__(
        self,
        make: Callable[..., LogisticRegression | MLPClassifier],
        settings: list[dict[str, float]],
        train: tuple[Floats, Integers],
        valid: tuple[Floats, Integers],
    ) -> None:
        codes, labels = train
        spread = codes.std(0)
        self.center, self.spread = codes.mean(0), np.where(spread > 0, spread, 1.0)
        self.setting, self.valid_accuracy = settings[0], -1.0
        for setting in settings:
            classifier = make(**setting).fit(self._scaled(codes), labels)
            accuracy = float((classifier.predict(self._scaled(valid[0])) == valid[1]).mean())
            if accuracy > self.valid_accuracy:
                self.classifier, self.setting, self.valid_accuracy = classifier, setting, accuracy

    def correct(self, codes: Floats, labels: Integers) -> npt.NDArray[np.bool_]:
        """Which of the images it tells right, of shape (num_images,)."""
        return self.classifier.predict(self._scaled(codes)) == labels

    def _scaled(self, codes: Floats) -> Floats:
        return (codes - self.center) / self.spread


class Probes:
    """All probes, fitted; and the class that is most frequent in training, to compare them with.

    Raises UserError if the training codes are not of two classes, or there are no validation codes.
    """

    def __init__(self, train: Codes, valid: Codes) -> None:
        classes, counts = np.unique(train.labels, return_counts=True)
        if len(classes) < 2 or not len(valid.labels):
            raise UserError(
                "probes need training images of two classes, and validation images: among the"
                f" first {len(train.labels)} and {len(valid.labels)} there are none; raise"
                " probe_images, or set it to 0 for no probe"
            )
        self.majority = classes[counts.argmax()]
        means, samples = (
            {
                "train": (getattr(train, name), train.labels),
                "valid": (getattr(valid, name), valid.labels),
            }
            for name in ("code", "sample")
        )
        # Several threads add up in another order, and would decide doubtful images another way.
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # to stop early is part of what a probe is
            self.fitted = {
                "linear": Probe(_linear, LINEAR, **means),
                "two_layer": Probe(_two_layer, TWO_LAYER, **means),
                "linear_of_sample": Probe(_linear, LINEAR, **samples),
            }

    @property
    def chosen(self) -> dict[str, dict[str, float]]:
        """Of each probe, its regularisation and its accuracy on the validation images."""
        return {
            name: {**probe.setting, "valid_accuracy": probe.valid_accuracy}
            for name, probe in self.fitted.items()
        }

    def correct(self, codes: Codes) -> dict[str, Tensor]:
        """Which images each probe, and the majority class, tells right: bool, of shape
        (num_images,).
        """
        right = {
            name: probe.correct(
                codes.sample if name == "linear_of_sample" else codes.code, codes.labels
            )
            for name, probe in self.fitted.items()
        }
        return {
            name: torch.from_numpy(each)
            for name, each in (right | {"majority": codes.labels == self.majority}).items()
        }


def _linear(**setting: float) -> LogisticRegression:
    return LogisticRegression(max_iter=1000, **setting)


def _two_layer(**setting: float) -> MLPClassifier:
    return MLPClassifier(
        (HIDDEN,), max_iter=EPOCHS, learning_rate_init=LEARNING_RATE, random_state=0, **setting
    )
