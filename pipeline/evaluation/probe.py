"""Probes: how accurately simple classifiers predict an image's class from its code.

A probe is fitted on the codes of training images, its regularisation is chosen by the accuracy on
validation images, and it is applied once to the evaluated images. All of this is deterministic.

``linear``, logistic regression, and ``two_layer``, a network with one hidden layer, see the
posterior's mean. It has none of the posterior's noise, so they also find what is too faint for z to
carry. ``linear_of_sample`` sees a z drawn from the posterior, whose rate bounds what any classifier
can learn from it.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

import vlae
from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.data.records import Integers
from pipeline.errors import UserError
from pipeline.evaluation.measure import map_batches
from pipeline.evaluation.moments import Moments
from pipeline.noise import Purpose, normal
from pipeline.values import Measured
from vlae.posterior import Posterior

# Imported where a probe is fitted: scikit-learn takes a second of processor time to import, and the
# tasks of other commands use only the codes of this module.
if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

Floats = npt.NDArray[np.float64]

LINEAR = [{"C": strength} for strength in (0.01, 0.1, 1.0, 10.0, 100.0)]
"""The settings of the linear probe, the strongest regularisation first.

Of equally accurate probes the first, and so the simplest, is chosen.
"""
TWO_LAYER = [{"alpha": strength} for strength in (1.0, 0.1, 0.001)]
"""The settings of the two-layer probe, in the same order."""
HIDDEN, EPOCHS, LEARNING_RATE = 128, 20, 3e-3
"""The two-layer probe's hidden width and training."""


@dataclass(frozen=True)
class Codes:
    """Codes of labelled images."""

    code: Floats
    """(num_images, latents): the means of the posteriors."""
    sample: Floats
    """(num_images, latents): one sample of each posterior."""
    labels: Integers
    """(num_images,)"""

    @classmethod
    def of(cls, posterior: Posterior, noise: Tensor, labels: Tensor) -> "Codes":
        """The codes of a batch's labelled images."""
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
    """The codes of the labelled images of ``loader``, in its order.

    ``threads`` batches are processed at once; ``progress`` is called with the number of images of
    each.
    """

    def codes(batch: Batch) -> tuple[int, Codes]:
        with torch.no_grad():  # here, since the setting is per thread
            posterior = model.encoder(binarize(batch, binarization, seed).to(device))
            return len(batch.labels), Codes.of(
                posterior, code_noise(model, batch, seed).to(device), batch.labels
            )

    parts = []
    for count, part in map_batches(codes, loader, threads):
        parts.append(part)
        progress(count)
    return Codes(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("code", "sample", "labels")
        )
    )


class TooFewLabels(UserError):
    """The images do not have the labels that probes need; the message says what to do."""


class Probe:
    """A fitted classifier: of all ``settings``, the most accurate on the validation codes."""

    def __init__(
        self,
        make: "Callable[..., LogisticRegression | MLPClassifier]",
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
        """Whether it predicts the class of each image, of shape (num_images,)."""
        return self.classifier.predict(self._scaled(codes)) == labels

    def _scaled(self, codes: Floats) -> Floats:
        return (codes - self.center) / self.spread


class Probes:
    """All fitted probes and, as a baseline, the most frequent class of the training images.

    Raises TooFewLabels if the training codes have fewer than two classes, or there are no
    validation codes.
    """

    def __init__(self, train: Codes, valid: Codes) -> None:
        classes, counts = np.unique(train.labels, return_counts=True)
        if len(classes) < 2 or not len(valid.labels):
            raise TooFewLabels(
                "probes need training images of two classes, and validation images, but the first"
                f" {len(train.labels)} and {len(valid.labels)} labelled ones are not enough; raise"
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
        with _alike_everywhere():
            self.fitted = {
                "linear": Probe(_linear, LINEAR, **means),
                "two_layer": Probe(_two_layer, TWO_LAYER, **means),
                "linear_of_sample": Probe(_linear, LINEAR, **samples),
            }

    @property
    def chosen(self) -> dict[str, dict[str, float]]:
        """The regularisation of each probe, and its accuracy on the validation images."""
        return {
            name: {**probe.setting, "valid_accuracy": probe.valid_accuracy}
            for name, probe in self.fitted.items()
        }

    def correct(self, codes: Codes) -> dict[str, Tensor]:
        """Whether each probe, and the most frequent class, is right: bool, (num_images,)."""
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


def accuracy_of_first(train: Codes, valid: Codes, test: Codes, sent: int) -> Measured:
    """The share of ``test`` that a linear probe of the first ``sent`` latents' means gets right."""
    with _alike_everywhere():
        parts = [(codes.code[:, :sent], codes.labels) for codes in (train, valid, test)]
        right = Moments()
        right.add(
            {"right": torch.from_numpy(Probe(_linear, LINEAR, *parts[:2]).correct(*parts[2]))}
        )
        return right.measured("right")


@contextmanager
def _alike_everywhere() -> Iterator[None]:
    """Fit probes to the same result on any number of threads."""
    # All of scikit-learn that is used, since the limit reaches only libraries that are loaded.
    from sklearn import linear_model, neural_network  # noqa: F401
    from sklearn.exceptions import ConvergenceWarning

    # Several threads sum in another order, which would change the class of borderline images.
    with threadpool_limits(1), warnings.catch_warnings():
        # Stopping early is part of a probe's definition.
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _linear(**setting: float) -> "LogisticRegression":
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000, **setting)


def _two_layer(**setting: float) -> "MLPClassifier":
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier(
        (HIDDEN,), max_iter=EPOCHS, learning_rate_init=LEARNING_RATE, random_state=0, **setting
    )
