"""Probes predict what the codes contain, and nothing else."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.commands import load
from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.data.records import Integers
from pipeline.errors import UserError
from pipeline.evaluation.probe import Codes, Floats, Probes, encode
from pipeline.noise import Purpose, normal
from pipeline.storage import open_storage
from tests.pipeline import strokes
from vlae.distributions import DiagonalGaussian

LATENTS = 3
Draw = Callable[[int, int], tuple[Floats, Integers]]
Range = tuple[float, float]
ALL, HALF, QUARTER = (0.99, 1.0), (0.3, 0.7), (0.15, 0.35)


def clusters(num_images: int, seed: int) -> tuple[Floats, Integers]:
    """Three well-separated classes, labelled 2, 5 and 7 in this order; half of the labels are 5."""
    random = np.random.default_rng(seed)
    labels = random.choice([2, 5, 7], num_images, p=[0.25, 0.5, 0.25])
    return labels[:, None] + 0.2 * random.standard_normal((num_images, LATENTS)), labels


def corners(num_images: int, seed: int) -> tuple[Floats, Integers]:
    """Two classes, each at two opposite corners of a square: no line separates them."""
    random = np.random.default_rng(seed)
    signs = random.choice([-1.0, 1.0], (num_images, LATENTS))
    labels = (signs[:, 0] * signs[:, 1] > 0).astype(np.int64)
    return signs + 0.2 * random.standard_normal(signs.shape), labels


def chance(num_images: int, seed: int) -> tuple[Floats, Integers]:
    """Labels that are independent of the codes."""
    random = np.random.default_rng(seed)
    return random.standard_normal((num_images, LATENTS)), random.integers(0, 4, num_images)


def drawn(draw: Draw, num_images: int, seed: int, noise: float = 0.0, factor: float = 1.0) -> Codes:
    """Codes of images, and samples of them with this much noise."""
    code, labels = draw(num_images, seed)
    sample = code + noise * np.random.default_rng(seed + 100).standard_normal(code.shape)
    return Codes(factor * code, factor * sample, labels)


def fitted(draw: Draw, noise: float = 0.0, factor: float = 1.0, num_images: int = 1000) -> Probes:
    return Probes(
        drawn(draw, num_images, 0, noise, factor), drawn(draw, num_images // 2, 1, noise, factor)
    )


def accuracies(probes: Probes, codes: Codes) -> dict[str, float]:
    return {name: right.double().mean().item() for name, right in probes.correct(codes).items()}


@pytest.mark.parametrize(
    ("draw", "linear", "two_layer", "majority"),
    [(clusters, ALL, ALL, HALF), (corners, HALF, ALL, HALF), (chance, QUARTER, QUARTER, QUARTER)],
)
def test_each_probe_predicts_what_its_kind_of_classifier_can(
    draw: Draw, linear: Range, two_layer: Range, majority: Range
) -> None:
    found = accuracies(fitted(draw), drawn(draw, 500, 2))
    expected = {
        "linear": linear,
        "two_layer": two_layer,
        "linear_of_sample": linear,
        "majority": majority,
    }
    assert found.keys() == expected.keys()
    for name, (low, high) in expected.items():
        assert low <= found[name] <= high, name


def test_a_signal_below_the_noise_is_found_in_the_code_but_not_in_a_sample() -> None:
    found = accuracies(fitted(clusters, noise=1000), drawn(clusters, 500, 2, noise=1000))
    assert found["linear"] > 0.99
    assert found["linear_of_sample"] < 0.6


def test_the_most_frequent_class_is_that_of_the_training_codes() -> None:
    others = np.array([5, 2, 5, 7, 2, 2])
    zeros = np.zeros((6, LATENTS))
    right = fitted(clusters).correct(Codes(zeros, zeros, others))["majority"]
    assert right.tolist() == [True, False, True, False, False, False]


def test_regularisation_is_chosen_on_the_validation_codes_and_the_strongest_wins_ties() -> None:
    chosen = fitted(clusters).chosen
    assert chosen["linear"] == {"C": 0.01, "valid_accuracy": 1.0}
    assert chosen["two_layer"] == {"alpha": 1.0, "valid_accuracy": 1.0}
    # A class with few training images is only found with weak regularisation.
    train = drawn(clusters, 1000, 0)
    some = train.labels != 7
    some[np.flatnonzero(~some)[:3]] = True
    rare = np.full((50, LATENTS), 7.0)
    weaker = Probes(
        Codes(train.code[some], train.sample[some], train.labels[some]),
        Codes(rare, rare, np.full(50, 7)),
    ).chosen
    assert weaker["linear"]["C"] > 0.01
    assert weaker["linear"]["valid_accuracy"] == 1.0


def test_probes_are_deterministic_and_do_not_depend_on_the_scale_of_the_codes() -> None:
    test = drawn(corners, 200, 2, noise=1.0)
    first, second = (
        fitted(corners, noise=1.0, num_images=300),
        fitted(corners, noise=1.0, num_images=300),
    )
    assert first.chosen == second.chosen
    scaled = fitted(
        corners, noise=1.0, factor=1024, num_images=300
    )  # a power of two: nothing is rounded
    assert scaled.chosen == first.chosen
    for name, right in first.correct(test).items():
        assert second.correct(test)[name].tolist() == right.tolist()
        assert (
            scaled.correct(drawn(corners, 200, 2, noise=1.0, factor=1024))[name].tolist()
            == right.tolist()
        )


def test_predictions_do_not_depend_on_the_batches() -> None:
    probes, test = fitted(corners, noise=1.0, num_images=300), drawn(corners, 90, 2, noise=1.0)
    parts = []
    for start in range(0, 90, 7):
        part = slice(start, start + 7)
        parts.append(probes.correct(Codes(test.code[part], test.sample[part], test.labels[part])))
    for name, right in probes.correct(test).items():
        assert torch.cat([part[name] for part in parts]).tolist() == right.tolist()


def test_a_constant_latent_does_no_harm() -> None:
    def dead(seed: int) -> Codes:
        codes = drawn(clusters, 300, seed)
        codes.code[:, 1] = codes.sample[:, 1] = 3.0
        return codes

    assert accuracies(Probes(dead(0), dead(1)), dead(2))["linear"] > 0.99


@pytest.mark.parametrize("count", [0, 300])
def test_codes_that_no_probe_can_learn_from_are_rejected(count: int) -> None:
    train, valid = drawn(clusters, 300, 0), drawn(clusters, 300 - count, 1)
    one_class = Codes(
        train.code, train.sample, np.zeros_like(train.labels) if count == 0 else train.labels
    )
    with pytest.raises(
        UserError, match=r"two classes, and validation images.*raise probe_images, or set it to 0"
    ):
        Probes(one_class, valid)


def test_codes_are_those_of_the_labelled_images_in_order_for_any_batches(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data = strokes.write(open_storage(str(tmp_path_factory.mktemp("strokes"))))
    torch.manual_seed(0)
    model = load("train", ["model=tiny"]).build(data.manifest.image_shape)

    def found(batch_size: int, threads: int) -> tuple[Codes, int]:
        loader, seen = (
            EvalLoader(data, split="train", batch_size=batch_size, num_images=70),
            [0],
        )
        options = {
            "binarization": Binarization.dynamic,
            "seed": 4,
            "device": torch.device("cpu"),
            "threads": threads,
        }
        made = encode(model, loader, progress=seen.append, **options)  # type: ignore[arg-type]
        return made, sum(seen)

    expected: list[tuple[Tensor, ...]] = []
    for batch in EvalLoader(data, split="train", batch_size=1, num_images=70):
        noise = torch.from_numpy(normal((Purpose.CODE, 4), batch.positions, model.latents))
        with torch.no_grad():
            posterior = model.encoder(binarize(batch, Binarization.dynamic, 4))
        expected.append(
            (posterior.mean, posterior.mean + posterior.log_scale.exp() * noise, batch.labels)
        )
    code, sample, labels = (torch.cat(parts).numpy() for parts in zip(*expected, strict=True))
    for batch_size, threads in ((1, 1), (7, 3), (70, 2)):
        made, seen = found(batch_size, threads)
        assert seen == 70
        np.testing.assert_allclose(made.code, code, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made.sample, sample, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(made.labels, labels)

    numbers = np.arange(4)
    batch = Batch(0, torch.zeros(4, 1, 8, 8), torch.tensor([-1, 3, -1, 0]), numbers, numbers)
    posterior = DiagonalGaussian(torch.arange(4.0)[:, None], torch.zeros(4, 1))
    known = Codes.of(posterior, torch.ones(4, 1), batch.labels)
    assert (known.code.ravel().tolist(), known.sample.ravel().tolist(), known.labels.tolist()) == (
        [1, 3],
        [2, 4],
        [3, 0],
    )
