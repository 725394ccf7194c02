"""The images that the page is given, what it is told of latents, and whose codes are near."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlae
from pipeline import commands
from pipeline.data.loader import EvalLoader
from pipeline.errors import UserError
from pipeline.evaluation.evaluation import Evaluation
from pipeline.evaluation.information import Information
from pipeline.explorer.asked import Question, pixels, to_text
from pipeline.explorer.gallery import Gallery
from pipeline.explorer.population import Population
from pipeline.explorer.session import Session
from tests.pipeline.explorer import served


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def tiles(root: Path) -> Session:
    """Two models of colour images, all of which are encoded."""
    data = served.write_tiles(root)
    session = Session(served.models(root, data), Gallery(data, "test", 10_000))
    while session.encode_next():
        pass
    return session


def ask(session: Session, what: str, **values: Any) -> Any:
    """The answer to a question, both as JSON."""
    answer = session.answers[what](Question.read(json.dumps(values).encode()))
    return json.loads(json.dumps(answer))


def test_the_page_learns_what_it_shows(tiles: Session) -> None:
    told = ask(tiles, "start")
    assert (told["dataset"], told["split"], told["images"]) == ("tiles", "test", served.COLOURS)
    assert told["shape"] == list(served.COLOUR)
    assert told["named"]
    assert not told["binary"]
    assert [model["name"] for model in told["models"]] == ["near", "far"]
    assert {model["raw_bits"] for model in told["models"]} == {8 * 3 * 12 * 10}
    assert told["encoded"] == told["to_encode"] == served.COLOURS


def test_images_come_by_number_whatever_shard_they_are_in(tiles: Session) -> None:
    everything = torch.cat(
        [batch.images for batch in EvalLoader(tiles.gallery.data, split="test", batch_size=16)]
    )
    numbers = [69, 0, 63, 64, 63]
    assert torch.equal(tiles.gallery.read(numbers).images, everything[numbers])
    shown = ask(tiles, "images", start=62, count=4)["images"]
    assert [image["sample"] for image in shown] == [62, 63, 64, 65]
    assert [image["label"] for image in shown] == ["even", "odd", "even", "odd"]
    assert [image["name"] for image in shown] == [
        f"{'ABC'[number % 3]}/tile-{number}.png" for number in range(62, 66)
    ]
    for image in shown:
        found = pixels(image["pixels"], served.COLOUR)
        assert torch.equal(torch.from_numpy(found), everything[image["sample"]])
    assert len(ask(tiles, "images", start=60, count=40)["images"]) == 10, "the split ends"


def test_images_are_found_by_a_part_of_their_name_one_after_the_other(tiles: Session) -> None:
    assert ask(tiles, "find", text="TILE-3", after=-1) == {"sample": 30}
    assert ask(tiles, "find", text="tile-3", after=30) == {"sample": 31}
    assert ask(tiles, "find", text="tile-3", after=39) == {"sample": 30}
    with pytest.raises(UserError, match="none of the first 70 images has a name with 'zebra'"):
        ask(tiles, "find", text="zebra", after=-1)


@pytest.mark.parametrize("number", [0, 1])
def test_an_image_of_the_data_set_and_its_pixels_drawn_by_hand_are_one(
    tiles: Session, number: int
) -> None:
    (shown,) = ask(tiles, "images", start=33, count=1)["images"]
    for what, values in {
        "code": {},
        "redraw": {"draws": 6, "shown": 2, "seed": 5, "moved": {"1": 0.5}},
        "walk": {"to": {"sample": 3}, "steps": 4, "seed": 5},
    }.items():
        by_number, by_pixels = (
            ask(tiles, what, model=number, image=image, **values)
            for image in ({"sample": 33}, {"pixels": shown["pixels"]})
        )
        assert by_number == by_pixels
    assert ask(tiles, "code", model=number, image={"sample": 33})["seen"] == shown["pixels"]


def test_the_mean_is_that_of_all_drawings_and_not_only_of_those_shown(tiles: Session) -> None:
    question = {"model": 0, "image": {"sample": 1}, "seed": 0, "draws": 16}
    every = ask(tiles, "redraw", **question, shown=16)
    few = ask(tiles, "redraw", **question, shown=3)
    assert few["drawn"] == every["drawn"][:3]
    drawn = np.stack([pixels(text, served.COLOUR) for text in every["drawn"]])
    for answer in (every, few):
        mean = pixels(answer["mean"], served.COLOUR)
        assert np.abs(drawn.mean(0) - mean).max() <= 0.51


def test_latents_come_by_capacity_which_is_that_of_an_evaluation(tiles: Session) -> None:
    model = tiles.models[0].network
    information = Information()
    parts = []
    with torch.no_grad():
        for batch in EvalLoader(tiles.gallery.data, split="test", batch_size=16):
            x = tiles.models[0].see(batch)
            noise = torch.randn(len(x), model.latents)
            information.add(model.encoder(x), noise, vlae.estimate(model, x, noise[None]))
            parts.append(model.encoder(x))
    reported = information.report(rate_splits=True)["latents"]["capacity_bits"]
    shown = ask(tiles, "code", model=0, image={"sample": 8})["latents"]
    assert [latent["capacity_bits"] for latent in shown] == pytest.approx(
        sorted(reported, reverse=True)
    )
    mean = torch.cat([part.code for part in parts]).double()
    scale = torch.cat([part.log_scale.exp() for part in parts]).double()  # type: ignore[attr-defined]
    spread = (mean.var(0, unbiased=False) + scale.square().mean(0)).sqrt()
    for latent in shown:
        place = latent["latent"]
        assert latent["capacity_bits"] == pytest.approx(reported[place])
        assert latent["spread"] == pytest.approx(spread[place].item(), rel=1e-4)
        expected = (mean[8, place] - mean[:, place].mean()) / spread[place]
        assert latent["place"] == pytest.approx(expected.item(), abs=1e-4)
        assert latent["width"] == pytest.approx((scale[8, place] / spread[place]).item(), rel=1e-4)


def test_a_posterior_that_is_not_gaussian_has_no_capacity_and_no_width(root: Path) -> None:
    data = served.write_tiles(root / "iaf")
    (opened,) = served.models(root / "iaf", data, {"iaf": ["model.posterior_depth=1"]})
    session = Session([opened], Gallery(data, "test", 64))
    shown = ask(session, "code", model=0, image={"sample": 0})["latents"]
    assert {latent["capacity_bits"] for latent in shown} == {None}
    assert {latent["width"] for latent in shown} == {None}
    spreads = [latent["spread"] for latent in shown]
    assert spreads == sorted(spreads, reverse=True)


def test_neighbours_are_the_nearest_codes_without_the_image_itself(tiles: Session) -> None:
    with torch.no_grad():
        codes = torch.cat(
            [
                tiles.models[1].network.encoder(tiles.models[1].see(batch)).code
                for batch in EvalLoader(tiles.gallery.data, split="test", batch_size=70)
            ]
        )
    answer = ask(tiles, "neighbours", model=1, image={"sample": 12}, count=5)
    assert answer["among"] == served.COLOURS
    distances = {
        sample: (codes[sample] - codes[12]).norm().item()
        for sample in range(served.COLOURS)
        if sample != 12
    }
    expected = sorted(distances, key=distances.__getitem__)[:5]
    assert [image["sample"] for image in answer["images"]] == expected
    assert [image["distance"] for image in answer["images"]] == pytest.approx(
        [distances[sample] for sample in expected], rel=1e-4
    )
    (shown,) = ask(tiles, "images", start=12, count=1)["images"]
    drawn = {"pixels": shown["pixels"]}
    first = ask(tiles, "neighbours", model=1, image=drawn, count=1)["images"][0]
    assert first["sample"] == 12, "a drawing may be like an image of the data set"


def test_neighbours_are_as_many_as_there_are() -> None:
    population = Population(10, 2)
    with pytest.raises(KeyError):
        population.latents()
    codes = vlae.build(image_shape=(1, 8, 8), latents=2).encoder(torch.rand(3, 1, 8, 8))
    with torch.no_grad():
        population.add(codes)
        assert len(population.nearest(codes.code[0], 5)) == 3
        assert len(population.nearest(codes.code[0], 5, skip=0)) == 2
        assert len(population.nearest(codes.code[0], 5, skip=7)) == 3


def test_damage_that_the_background_finds_is_told_and_ends_nothing(root: Path) -> None:
    # So large that the second shard is read after the first.
    data = served.write_tiles(root / "large", (3, 256, 256))
    (opened,) = served.models(root / "large", data, {"one": []})
    second = Path(data.storage.url) / f"test/{served.FIRST}.tar"
    second.write_bytes(bytes(second.stat().st_size))
    session = Session([opened], Gallery(data, "test", 10_000))
    told = ask(session, "progress")
    assert (told["encoded"], told["to_encode"], told["problem"]) == (64, 70, None)
    assert not session.encode_next()
    assert f"test/{served.FIRST}.tar" in ask(session, "progress")["problem"]
    answer = ask(session, "neighbours", model=0, image={"sample": 1}, count=3)
    assert (len(answer["images"]), answer["among"]) == (3, 64)
    with pytest.raises(UserError, match=rf"test/{served.FIRST}\.tar"):
        ask(session, "code", model=0, image={"sample": 65})


def test_resolutions_are_those_of_an_evaluation_and_are_not_waited_for(root: Path) -> None:
    data = served.write_tiles(root / "sharp")
    opened = served.models(root / "sharp", data)
    session = Session(opened, Gallery(data, "test", 64))
    session.measure_resolutions()
    told = ask(session, "progress")["resolutions"]
    for model, found in zip(opened, told, strict=True):
        config = commands.load("evaluate", [f"model={model.reference}", f"output={root}/evaluated"])
        assert found == json.loads(json.dumps(Evaluation(config, model).resolution()))
        assert found["resolution"]["num_images"] == served.COLOURS
    stopped = Session(opened, Gallery(data, "test", 64))
    stopped.stop()
    stopped.measure_resolutions()
    assert ask(stopped, "progress")["resolutions"] == [None, None]


def test_pixels_survive_the_way_to_the_page_and_back() -> None:
    image = torch.randint(0, 256, served.COLOUR, dtype=torch.uint8)
    assert torch.equal(torch.from_numpy(pixels(to_text(image), served.COLOUR)), image)
    assert to_text(image.float() / 255) == to_text(image)
    flat = base64.b64decode(to_text(image))
    assert list(flat[:3]) == image[:, 0, 0].tolist(), "the channels of a pixel come together"


def test_models_of_one_name_are_told_apart_by_their_folders(root: Path) -> None:
    data = served.write_tiles(root / "a")
    opened = [
        *served.models(root / "a", data, {"same": []}),
        *served.models(root / "b", data, {"same": []}),
    ]
    told = ask(Session(opened, Gallery(data, "test", 64)), "start")
    names = [model["name"] for model in told["models"]]
    assert len(set(names)) == 2
    assert all(name.endswith("/runs/same") for name in names)
