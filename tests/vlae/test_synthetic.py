"""The exact figures of synthetic images agree with enumeration (small images) and with counts."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlae import Window
from vlae.synthetic import PatternedTexture, clouds

AllImages = Callable[..., Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_texture(
    classes: int, height: int, width: int, window: str, seed: int = 0
) -> PatternedTexture:
    """Patterns and couplings of any size and sign."""
    draw, parsed = generator(seed), Window.parse(window)
    patterns = torch.randn(classes, height, width, generator=draw)
    return PatternedTexture(
        patterns, parsed, tuple(torch.randn(len(parsed.offsets), generator=draw).tolist())
    )


@st.composite
def textures(draw: st.DrawFn) -> PatternedTexture:
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    window = draw(
        st.sampled_from(
            ["0x0", *(f"{columns}x{rows}" for columns in range(1, width + 1) for rows in (0, 1))]
        )
    )
    return random_texture(
        draw(st.integers(1, 3)), height, width, window, draw(st.integers(0, 1000))
    )


def probability_by_definition(texture: PatternedTexture, image: list[list[int]], c: int) -> float:
    """p(x|c) by the formula of ``PatternedTexture``, pixel by pixel."""
    probability = 1.0
    for row, column in itertools.product(range(texture.height), range(texture.width)):
        log_odds = float(texture.patterns[c, row, column])
        for (down, right), coupling in zip(texture.window.offsets, texture.couplings, strict=True):
            if row + down >= 0 and 0 <= column + right < texture.width:
                log_odds += coupling * (2 * image[row + down][column + right] - 1)
        white = 1 / (1 + math.exp(-log_odds))
        probability *= white if image[row][column] else 1 - white
    return probability


def entropy(probabilities: Tensor) -> float:
    """The entropy in nats of probabilities that sum to 1."""
    return -float(torch.xlogy(probabilities, probabilities).sum())


@given(textures())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_the_likelihood_is_the_product_of_its_conditionals_and_sums_to_one(
    all_images: AllImages, texture: PatternedTexture
) -> None:
    x = all_images(*texture.image_shape)
    given_class = texture.log_prob_given_class(x).exp()
    torch.testing.assert_close(given_class.sum(0), torch.ones(texture.classes, dtype=torch.float64))
    torch.testing.assert_close(texture.log_prob(x).exp(), given_class.mean(1))
    for number in range(0, len(x), max(1, len(x) // 8)):
        image = x[number, 0].int().tolist()
        for c in range(texture.classes):
            assert given_class[number, c].item() == pytest.approx(
                probability_by_definition(texture, image, c), rel=1e-12
            )


@given(textures())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_entropies_and_information_agree_with_enumerated_probabilities(
    all_images: AllImages, texture: PatternedTexture
) -> None:
    x = all_images(*texture.image_shape)
    given_class, p = texture.log_prob_given_class(x).exp(), texture.log_prob(x).exp()
    expected = sum(entropy(each) for each in given_class.unbind(1)) / texture.classes
    assert texture.entropy_given_class == pytest.approx(expected, rel=1e-10)
    # Mutual information by definition: the sum of p(c, x) log p(c, x) / (p(c) p(x)).
    joint = given_class / texture.classes
    information = float((joint * (joint / (p[:, None] / texture.classes)).log()).sum())
    assert math.log(texture.classes) - float(p @ texture.class_entropy(x)) == pytest.approx(
        information, abs=1e-10
    )
    assert texture.entropy_given_class + information == pytest.approx(entropy(p), rel=1e-10)


@given(textures(), st.data())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_the_code_length_without_class_is_the_sum_of_conditional_entropies(
    all_images: AllImages, texture: PatternedTexture, data: st.DataObject
) -> None:
    own = texture.window
    smaller = [
        f"{columns}x{rows}" for columns in range(1, own.width + 1) for rows in range(own.height + 1)
    ]
    window = Window.parse(data.draw(st.sampled_from(["0x0", *smaller])))
    if not set(window.offsets) <= set(own.offsets):
        with pytest.raises(ValueError, match="sees more than the texture's own"):
            texture.code_length_without_class(window)
        return
    x = all_images(*texture.image_shape)
    p, pixels = texture.log_prob(x).exp(), x[:, 0].int().tolist()
    expected = 0.0
    for row, column in itertools.product(range(texture.height), range(texture.width)):
        seen = [
            (row + r, column + c)
            for r, c in window.offsets
            if row + r >= 0 and 0 <= column + c < texture.width
        ]
        counts: dict[tuple[int, ...], float] = {}
        for image, probability in zip(pixels, p.tolist(), strict=True):
            key = (*(image[r][c] for r, c in seen), image[row][column])
            counts[key] = counts.get(key, 0.0) + probability
        before: dict[tuple[int, ...], float] = {}
        for key, probability in counts.items():
            before[key[:-1]] = before.get(key[:-1], 0.0) + probability
        expected -= sum(
            probability * math.log(probability / before[key[:-1]])
            for key, probability in counts.items()
        )
    assert texture.code_length_without_class(window) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("window", ["0x0", "1x1", "3x0", "2x1", "3x1"])
def test_images_and_classes_are_drawn_with_their_probabilities(
    all_images: AllImages, window: str
) -> None:
    texture, n = random_texture(3, 2, 3, window), 60_000
    x, labels = texture.sample(n, generator())
    numbers = (x.flatten(1).long() << torch.arange(5, -1, -1)).sum(1)
    counts = torch.bincount(numbers * 3 + labels, minlength=64 * 3).double().view(64, 3)
    expected = n / 3 * texture.log_prob_given_class(all_images(1, 2, 3)).exp()
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 5).all()
    common = expected > 20
    assert common.sum() > 40, "the test is vacuous if only few images are likely"
    freedom = int(common.sum())
    assert ((counts - expected).square() / expected)[common].sum() < freedom + 5 * (
        2 * freedom
    ) ** 0.5


def test_an_image_depends_only_on_its_own_class_and_noise() -> None:
    texture = clouds()
    labels, uniform = torch.tensor([5, 60, 9]), torch.rand(3, 1, 16, 16, generator=generator())
    images = texture.draw(labels, uniform)
    for number in range(3):
        part = slice(number, number + 1)
        assert torch.equal(texture.draw(labels[part], uniform[part]), images[part])
    assert not torch.equal(texture.draw(labels.flip(0), uniform), images)


def test_a_sample_is_binary_and_determined_by_its_generator() -> None:
    texture, before = clouds(), torch.get_rng_state()
    images, labels = texture.sample(50, generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert images.shape == (50, 1, 16, 16)
    assert images.dtype == torch.float32
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert 0 <= labels.min() < labels.max() < texture.classes
    for again, same in ((0, True), (1, False)):
        assert torch.equal(texture.sample(50, generator(again))[0], images) == same


@pytest.fixture(scope="module")
def some_clouds() -> PatternedTexture:
    """``clouds`` with only four patterns: with all of them the exact sums take long."""
    whole = clouds()
    return PatternedTexture(
        whole.patterns[:: whole.classes // 4][:4], whole.window, whole.couplings
    )


def test_at_full_size_the_entropy_is_the_mean_code_length_of_its_images(
    some_clouds: PatternedTexture,
) -> None:
    x, labels = some_clouds.sample(20_000, generator())
    given_class = some_clouds.log_prob_given_class(x)
    of_class = -given_class.gather(1, labels[:, None])[:, 0]
    assert of_class.mean().item() == pytest.approx(
        some_clouds.entropy_given_class, abs=4 * of_class.std().item() / 20_000**0.5
    )
    # The surprise of the true class and the class's entropy have the same mean.
    surprise = -given_class.log_softmax(1).gather(1, labels[:, None])[:, 0]
    difference = surprise - some_clouds.class_entropy(x)
    assert difference.mean().item() == pytest.approx(
        0, abs=4 * difference.std().item() / 20_000**0.5
    )
    information = math.log(4) - some_clouds.class_entropy(x).mean().item()
    lengths = -some_clouds.log_prob(x)
    exact = some_clouds.entropy_given_class + information
    assert lengths.mean().item() == pytest.approx(exact, abs=4 * lengths.std().item() / 20_000**0.5)


def test_a_smaller_window_has_a_longer_code_without_class(
    some_clouds: PatternedTexture,
) -> None:
    lengths = [
        some_clouds.code_length_without_class(Window.parse(text))
        for text in ("3x1", "2x1", "1x1", "0x0")
    ]
    assert some_clouds.entropy_given_class < lengths[0]
    assert lengths == sorted(lengths)
    assert lengths[-1] < 256 * math.log(2)


def test_with_one_class_the_code_length_is_the_entropy_of_the_texture(
    some_clouds: PatternedTexture,
) -> None:
    one = PatternedTexture(some_clouds.patterns[:1], some_clouds.window, some_clouds.couplings)
    assert one.code_length_without_class(one.window) == pytest.approx(
        one.entropy_given_class, rel=1e-12
    )
    assert torch.equal(
        one.class_entropy(one.sample(10, generator())[0]), torch.zeros(10, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("window", "couplings", "sentence"),
    [
        ("3x2", (0.1,) * 7, "the window 3x2 has too many states; use one of at most one row"),
        ("full", (), "the window full has too many states"),
        ("2x1-down2", (0.1,) * 10, "too many states"),
        ("3x1", (0.1, 0.2), "the window 3x1 has 4 pixels, but there are 2 couplings"),
        ("5x1", (0.1,) * 7, "window 5x1 is larger than the image of 4x3 pixels"),
    ],
)
def test_an_impossible_texture_is_an_error(
    window: str, couplings: tuple[float, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        PatternedTexture(torch.zeros(2, 3, 4), Window.parse(window), couplings)
