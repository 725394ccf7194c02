"""A user's own YAML: choices of config groups in a folder, and files of options by their path."""

from pathlib import Path

import pytest

from pipeline import commands
from pipeline.config.addresses import name_of
from pipeline.errors import UserError

EXPERIMENT = """# @package _global_
# Mine.
defaults:
  - override /model: wide
model:
  latents: 7
train:
  images: 1234
"""
OPTIONS = """defaults:
  - train
  - override model: tiny
  - optim: adamax
  - _self_
dataset:
  name: birds
model.latents: 9
train: short
cluster: {num_workers: [1, 2]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``own`` below the working folder, with an experiment, a model and a file."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    for name, text in {
        "experiment/mine.yaml": EXPERIMENT,
        "model/wide.yaml": "defaults:\n  - fast\nencoder_channels: 33\n",
        "my.yaml": OPTIONS,
    }.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_text(text)
    return own


@pytest.mark.parametrize("words", [["--config-dir", "own"], ["--config-dir=own"]])
def test_an_experiment_and_a_model_of_the_users_own_folder_are_composed(
    folder: Path, words: list[str]
) -> None:
    config = commands.load("train", ["experiment=mine", *words])
    assert (config.model.latents, config.model.encoder_channels) == (7, 33)
    assert config.train.images == 1234
    assert commands.load("train", [*words, "model=wide"]).model.latents == 32  # of model=fast
    assert commands.load("train", [*words, "experiment=mine", "model.latents=5"]).model.latents == 5


def test_a_file_sets_options_and_choices_and_the_command_line_comes_last(folder: Path) -> None:
    config = commands.load("train", ["own/my.yaml"])
    assert (config.dataset.name, config.model.latents) == ("birds", 9)
    assert config.model.window == "3x1"  # of model=tiny
    assert config.optim.algorithm.value == "adamax"
    assert config.train.images == 40_000  # of train=short
    assert config.cluster.num_workers == [1, 2]
    changed = commands.load("train", ["model.latents=3", str(folder / "my.yaml"), "train=brief"])
    assert (changed.model.latents, changed.train.images) == (3, 24_000)


def test_a_file_may_choose_from_the_users_folder(folder: Path) -> None:
    (folder / "other.yml").write_text("model: wide\n")
    words = ["own/other.yml", "--config-dir=own"]
    assert commands.load("train", words).model.encoder_channels == 33


def test_a_search_takes_a_file_with_its_space(folder: Path) -> None:
    (folder / "search.yaml").write_text("search:\n  space: {model: {window: [1x1, 3x1]}}\n")
    space = commands.load("tune", ["own/search.yaml"]).search.space
    assert space["model"]["window"] == ["1x1", "3x1"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trian: {images: 5}", "own/bad.yaml: trian.images is not an option; did you mean train"),
        ("a: [", "own/bad.yaml is not understood: while parsing"),
        ("- 5", "own/bad.yaml holds no options"),
        ("model: none-such", "own/bad.yaml: .*there is no such model; choose one of auto"),
        ("defaults: [fast]", "own/bad.yaml: defaults has 'fast'; write GROUP: CHOICE"),
        ("train: {images: many}", "train.images: .*many"),
        ("storage: {root: 's3://me:secret@bucket'}", "storage.root contains a password"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(folder: Path, text: str, sentence: str) -> None:
    (folder / "bad.yaml").write_text(text + "\n")
    with pytest.raises(UserError, match=sentence):
        commands.load("train", ["own/bad.yaml"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["none.yaml"], "none.yaml does not exist"),
        (["--config-dir"], "--config-dir  is no folder"),
        (["--config-dir="], "--config-dir  is no folder"),
        (["--config-dir", "none"], "--config-dir none is no folder"),
        (["--config-dir", "own", "model=wid"], "choose one of .*tiny, wide"),
    ],
)
def test_folders_and_files_that_do_not_exist_are_named(
    folder: Path, words: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        commands.load("train", words)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"window: [", "while parsing"),
        (b"\xff\xfe\x00window", "codec|unacceptable|special characters"),
        (b"windw: 3x1", "windw"),
        (b"defaults:\n  - none_such", "none_such"),
    ],
)
def test_a_mistake_in_a_choice_of_the_users_folder_is_one_sentence(
    folder: Path, text: bytes, sentence: str
) -> None:
    (folder / "model/broken.yaml").write_bytes(text)
    with pytest.raises(UserError, match=sentence):
        commands.load("train", ["--config-dir=own", "model=broken"])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models:/birds@champion", "birds-champion"),
        ("models:/birds/3", "birds-3"),
        ("pretrained/mnist", "mnist"),
        ("vlae-store/runs/birds/", "birds"),
        ("s3://bucket/prefix/runs/birds/best", "birds-best"),
        ("/", "model"),
        ("..hidden run", "hidden-run"),
    ],
)
def test_results_have_the_name_of_their_model(model: str, name: str) -> None:
    assert name_of(model) == name


@pytest.mark.parametrize(
    "command", ["evaluate", "encode", "compress", "sample", "reconstruct", "neighbours", "export"]
)
def test_results_of_two_models_lie_in_two_folders(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("birds", "fish"):
        config = commands.load(command, [f"model=vlae-store/runs/{name}"])
        assert config.output == str(tmp_path / "outputs" / command / name)
    assert commands.load(command, ["model=a", "output=b"]).output == str(tmp_path / "b")
