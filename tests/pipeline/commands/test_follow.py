"""``auto`` follows the data set's manifest, and what the user says comes on top of it."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.commands import load
from pipeline.config.options import to_dict
from pipeline.data.manifest import Manifest
from pipeline.data.records import Shard
from pipeline.errors import UserError
from pipeline.runs import CONFIG, IDENTITY, Run
from pipeline.storage import open_storage
from pipeline.training.launch import check, check_data
from vlae.likelihood import BernoulliLikelihood, LogisticMixtureLikelihood

SHARD = Shard("train/00000.tar", 9000, "0" * 64, 1000, "train/00000.index.json", "0" * 64)
BINARY, GREY, COLOUR = (1, 28, 28), (1, 28, 28), (3, 32, 32)


def publish(root: Path, shape: tuple[int, int, int], binarization: str, **others: Any) -> str:
    """A data set's manifest, which is all that is looked at; returns the options that name it."""
    splits = dict.fromkeys(("train", "valid", "test"), (SHARD,))
    contents = Manifest("mine", shape, None, 250, splits, binarization=binarization, **others)
    contents.publish(open_storage(f"{root}/datasets/mine"))
    return f"storage.root={root}"


@pytest.mark.parametrize(
    ("shape", "binarization", "preset"),
    [
        (BINARY, "dynamic", "fast"),
        (BINARY, "static", "fast"),
        (GREY, "none", "grey"),
        (COLOUR, "none", "colour"),
        ((3, 63, 200), "none", "colour"),
        ((3, 64, 64), "none", "large"),
        ((1, 64, 100), "dynamic", "large"),
        ((3, 256, 256), "none", "large"),
        ((3, 100, 75), "none", "large"),
        ((3, 7, 5), "none", "colour"),
    ],
    ids=str,
)
def test_the_preset_and_the_likelihood_suit_the_images(
    tmp_path: Path, shape: tuple[int, int, int], binarization: str, preset: str
) -> None:
    place = publish(tmp_path, shape, binarization)
    for command in ("train", "tune"):
        config = load(command, [place, "dataset.name=mine"])
        explicit = load(
            command,
            [place, "dataset.name=mine", f"model={preset}", f"dataset.binarization={binarization}"],
        )
        assert config == explicit
        assert (config.preset, config.dataset.binarization.value) == (preset, binarization)
    config = load("train", [place, "dataset.name=mine"])
    check_data(config)
    likelihood = config.build(shape).decoder.likelihood
    assert isinstance(
        likelihood, LogisticMixtureLikelihood if binarization == "none" else BernoulliLikelihood
    )


def test_values_come_on_top_of_the_preset_that_was_chosen(tmp_path: Path) -> None:
    place = publish(tmp_path, COLOUR, "none")
    chosen = to_dict(load("train", [place, "dataset.name=mine"]))["model"]
    changed = load("train", [place, "dataset.name=mine", "model.window=7x4", "model=auto"])
    assert to_dict(changed)["model"] == {**chosen, "window": "7x4"}
    long = load("train", [place, "dataset.name=mine", "experiment=long"])
    assert (long.model.window, long.model.mixtures, long.preset) == ("9x5", 5, "colour")
    tuned = load(
        "tune", [place, "dataset.name=mine", "search.space.model={latents:[8,16],window:[3x1]}"]
    )
    assert to_dict(tuned)["model"] == chosen
    assert tuned.search.axes["model.latents"] == [8, 16]
    assert tuned.search.axes["model.window"] == ["3x1"]


def test_options_are_judged_by_the_preset_that_is_used_alone(tmp_path: Path) -> None:
    place = publish(tmp_path, COLOUR, "none")
    words = [place, "dataset.name=mine", "model.flow_depth=1"]
    assert load("train", [*words, "train.free_groups=64"]).model.latents == 64  # fast has 32
    with pytest.raises(UserError, match="does not divide a code of 32 latents"):
        load("train", [*words, "train.free_groups=64", "model=fast"])


def test_a_run_is_the_same_however_its_preset_was_chosen(tmp_path: Path) -> None:
    place = publish(tmp_path, BINARY, "dynamic")
    auto = load("train", [place, "dataset.name=mine"])
    stated = load(
        "train", [place, "dataset.name=mine", "model=fast", "dataset.binarization=dynamic"]
    )
    assert auto.identity() == stated.identity()
    assert auto.run_name == stated.run_name
    check(auto)
    check(stated)
    Run.of(auto).keep_options(auto)
    storage = Run.of(auto).storage
    assert storage.read_json(CONFIG)["preset"] == "fast"
    assert storage.read_json(CONFIG)["dataset"]["binarization"] == "dynamic"
    assert "preset" not in storage.read_json(IDENTITY)
    tiny = load("train", [place, "dataset.name=mine", "model=tiny"])
    assert (tiny.preset, tiny.dataset.binarization.value) == ("tiny", "dynamic")


def test_a_preset_is_chosen_by_model_alone(tmp_path: Path) -> None:
    place = publish(tmp_path, BINARY, "dynamic")
    with pytest.raises(UserError, match="preset is a record; choose a preset by model=large"):
        load("train", [place, "dataset.name=mine", "preset=large"])


@pytest.mark.parametrize("asked", ["dynamic", "static"])
def test_images_in_colour_are_not_binarized(tmp_path: Path, asked: str) -> None:
    place = publish(tmp_path, COLOUR, "none")
    config = load("train", [place, "dataset.name=mine", f"dataset.binarization={asked}"])
    with pytest.raises(UserError, match=f"binarization={asked} makes .* mine are in colour; leave"):
        check(config)
    assert not Run.of(config).storage.list()


def test_images_in_black_and_white_have_no_256_values(tmp_path: Path) -> None:
    place = publish(tmp_path, BINARY, "static", pixels="binary")
    config = load("train", [place, "dataset.name=mine", "dataset.binarization=none"])
    with pytest.raises(UserError, match=r"none is for images of 256 values, .* mine are black and"):
        check(config)


def test_grey_images_are_binarized_if_that_is_asked_for(tmp_path: Path) -> None:
    place = publish(tmp_path, GREY, "none")
    config = load("train", [place, "dataset.name=mine", "dataset.binarization=static"])
    assert (config.preset, config.dataset.binarization.value) == ("fast", "static")
    check(config)


def test_without_a_data_set_the_command_says_so(tmp_path: Path) -> None:
    config = load("train", [f"storage.root={tmp_path}", "dataset.name=mine"])
    with pytest.raises(
        UserError, match=r"there is no data set at .*mine; make one with: vlae shard"
    ):
        check(config)


@pytest.mark.parametrize(
    ("words", "preset", "binarization"),
    [
        ([], "fast", "dynamic"),
        (["channels=3"], "colour", "none"),
        (["channels=3", "image_size=64"], "large", "none"),
        (["binarization=none"], "grey", "none"),
        (["image_size=64"], "large", "dynamic"),
    ],
    ids=str,
)
def test_a_plan_is_for_the_preset_that_suits_the_images(
    words: list[str], preset: str, binarization: str
) -> None:
    explicit = load("plan", [*words, f"model={preset}", f"binarization={binarization}"])
    assert load("plan", words) == explicit
