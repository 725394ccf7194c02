"""Probes find what is in the codes, and nothing that is not."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.config import Binarization, load, to_dict
from pipeline.errors import UserError
from pipeline.loader import EvalLoader, Integers, binarize
from pipeline.probe import Codes, Floats, Probes, encode
from pipeline.storage import open_storage
from tests.pipeline import strokes
from vlae import build

LATENTS = 3
Draw = Callable[[int, int], tuple[Floats, Integers]]


def codes(mean: Floats, labels: Integers, scale: float = 0.1) -> Codes:
    return Codes(mean, np.full_like(mean, scale), labels)


def clusters(num_images: int, seed: int) -> tuple[Floats, Integers]:
    """Three classes far apart, in order of the numbers 2, 5 and 7, of which 5 is half of all."""
    random = np.random.default_rng(seed)
    labels = random.choice([2, 5, 7], num_images, p=[0.25, 0.5, 0.25])
    return labels[:, None] + 0.2 * random.standard_normal((num_images, LATENTS)), labels


def corners(num_images: int, seed: int) -> tuple[Floats, Integers]:
    """Two classes that are each two opposite corners of a square: no line parts them."""
    random = np.random.default_rng(seed)
    signs = random.choice([-1.0, 1.0], (num_images, LATENTS))
    labels = (signs[:, 0] * signs[:, 1] > 0).astype(np.int64)
    return signs + 0.2 * random.standard_normal(signs.shape), labels


def chance(num_images: int, seed: int) -> tuple[Floats, Integers]:
    """Labels that have nothing to do with the codes."""
    random = np.random.default_rng(seed)
    return random.standard_normal((num_images, LATENTS)), random.integers(0, 4, num_images)


def accuracies(probes: Probes, mean: Floats, labels: Integers) -> dict[str, float]:
    right = probes.correct(torch.from_numpy(mean), torch.from_numpy(labels))
    return {name: values.double().mean().item() for name, values in right.items()}


Range = tuple[float, float]
ALL, HALF, QUARTER = (0.99, 1.0), (0.3, 0.7), (0.15, 0.35)


@pytest.mark.parametrize(
    ("draw", "linear", "two_layer", "majority"),
    [(clusters, ALL, ALL, HALF), (corners, HALF, ALL, HALF), (chance, QUARTER, QUARTER, QUARTER)],
)
def test_a_probe_tells_what_its_kind_can_tell(draw: Draw, linear: Range, two_layer: Range, majority: Range) -> None:
    probes = Probes(codes(*draw(1000, 0)), codes(*draw(500, 1)))
    found = accuracies(probes, *draw(500, 2))
    expected = {"linear_probe": linear, "two_layer_probe": two_layer, "majority_class": majority}
    assert found.keys() == expected.keys()
    for name, (low, high) in expected.items():
        assert low <= found[name] <= high, name


def test_the_majority_is_that_of_the_training_codes() -> None:
    train, labels = clusters(400, 0)
    probes = Probes(codes(train, labels), codes(*clusters(100, 1)))
    others = np.array([5, 2, 5, 7, 2, 2])
    right = probes.correct(torch.zeros(6, LATENTS), torch.from_numpy(others))["majority_class"]
    assert right.tolist() == [True, False, True, False, False, False]


def test_strength_is_chosen_by_the_validation_codes_of_equals_the_strongest() -> None:
    train = codes(*clusters(1000, 0))
    chosen = Probes(train, codes(*clusters(200, 1))).chosen
    assert chosen["linear_probe"] == {"C": 0.01, "valid_accuracy": 1.0}
    assert chosen["two_layer_probe"] == {"alpha": 1.0, "valid_accuracy": 1.0}
    # A class that few training images have is found only where the fit is free to follow them.
    mean, labels = clusters(1000, 0)
    rare = np.flatnonzero(labels == 7)[:3]
    rest = labels != 7
    rest[rare] = True
    few = codes(mean[rest], labels[rest])
    weaker = Probes(few, codes(np.full((50, LATENTS), 7.0), np.full(50, 7))).chosen
    assert weaker["linear_probe"]["C"] > 0.01


def test_the_same_codes_give_the_same_probes_and_their_unit_does_not_matter() -> None:
    (train, train_labels), (valid, valid_labels), (test, test_labels) = (corners(300, seed) for seed in range(3))
    found = []
    for factor, shift in ((1, 0), (1, 0), (1024, 512)):  # powers of two: nothing is rounded
        probes = Probes(
            codes(factor * train + shift, train_labels, 0.1 * factor), codes(factor * valid + shift, valid_labels, 0.1 * factor)
        )
        right = probes.correct(torch.from_numpy(factor * test + shift), torch.from_numpy(test_labels))
        found.append(({name: values.tolist() for name, values in right.items()}, probes.chosen))
    assert found[0] == found[1]
    assert found[0][0].keys() == found[2][0].keys()
    for name, values in found[0][0].items():
        assert np.mean(np.array(values) != np.array(found[2][0][name])) < 0.01


def test_images_can_be_asked_about_in_any_batches() -> None:
    probes = Probes(codes(*corners(300, 0)), codes(*corners(100, 1)))
    mean, labels = (torch.from_numpy(each) for each in corners(90, 2))
    whole = probes.correct(mean, labels)
    parts = [probes.correct(*pair) for pair in zip(mean.split(7), labels.split(7), strict=True)]
    for name, values in whole.items():
        assert torch.cat([part[name] for part in parts]).tolist() == values.tolist()


def test_codes_of_one_class_are_refused() -> None:
    mean, labels = clusters(50, 0)
    with pytest.raises(UserError, match="two classes, but the first 50 training images are of one"):
        Probes(codes(mean, np.zeros_like(labels)), codes(mean, labels))


def test_codes_are_the_posteriors_of_the_images_in_order_whatever_the_batches(tmp_path_factory: pytest.TempPathFactory) -> None:
    data = open_storage(str(tmp_path_factory.mktemp("strokes")))
    contents = strokes.write(data)
    torch.manual_seed(0)
    model = build(image_shape=contents.image_shape, **to_dict(load("train", ["model=tiny"]))["model"])

    def found(batch_size: int, threads: int) -> tuple[Codes, int]:
        loader, seen = EvalLoader(data, contents, split="train", batch_size=batch_size, num_images=70), [0]
        options = {"binarization": Binarization.dynamic, "seed": 4, "device": torch.device("cpu"), "threads": threads}
        made = encode(model, loader, progress=lambda count: seen.append(count), **options)  # type: ignore[arg-type]
        return made, sum(seen)

    expected: list[tuple[Tensor, ...]] = []
    for batch in EvalLoader(data, contents, split="train", batch_size=1, num_images=70):
        with torch.no_grad():
            posterior = model.encoder(binarize(batch, Binarization.dynamic, 4))
        expected.append((posterior.mean, posterior.log_scale.exp(), batch.labels))
    mean, scale, labels = (torch.cat(parts).numpy() for parts in zip(*expected, strict=True))
    for batch_size, threads in ((1, 1), (7, 3), (70, 2)):
        made, seen = found(batch_size, threads)
        assert seen == 70
        np.testing.assert_allclose(made.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made.scale, scale, rtol=1e-4)
        np.testing.assert_array_equal(made.labels, labels)
