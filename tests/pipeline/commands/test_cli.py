"""What the command line says, and how it ends."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import cli, commands, help
from pipeline.cluster import connect
from pipeline.config import options
from pipeline.config.sections import ClusterOptions, StorageOptions
from pipeline.data.manifest import Manifest
from pipeline.storage import open_storage
from pipeline.storage.folder import FolderStorage
from tests.pipeline.conftest import NumberedImages
from tests.pipeline.images import write_shard


class SmallGrey(NumberedImages):
    """Grey images of 4 x 6 pixels."""

    image_shape = (1, 4, 6)

    def read(self, split: str, start: int, stop: int):  # type: ignore[no-untyped-def]
        images, labels = super().read(split, start, stop)
        return images.repeat(2, 1).repeat(2, 2)[..., :1].copy(), labels


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage root with the data set ``small``: 12 training images of 4 x 6 pixels."""
    monkeypatch.chdir(tmp_path)
    storage = open_storage(str(tmp_path / "root/datasets/small"))
    assert isinstance(storage, FolderStorage)
    shards = {
        split: (write_shard(storage, SmallGrey(), split, f"{split}/00000.tar", 0, 12, 4),)
        for split in ("train", "valid", "test")
    }
    Manifest("small", (1, 4, 6), 10, 4, shards, binarization="dynamic").publish(storage)
    return tmp_path / "root"


def outcome(
    capsys: pytest.CaptureFixture[str], command: str, *arguments: str
) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, *arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_the_overview_names_every_command() -> None:
    text = help.overview()
    for command in commands.NAMES:
        assert f"\n  {command}" in text


@pytest.mark.parametrize("command", commands.NAMES)
def test_help_lists_every_option_with_its_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = outcome(capsys, command, "--help")
    assert code == 0
    for key, item in options.describe(commands.find(command).config):
        assert f"\n  {key}=" in out
        assert item.metadata["help"].split()[0] in out


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("train", ["train.imagse=3"], ["train.images"]),
        ("train", ["dataset.name=absent"], ["absent", "vlae shard"]),
        (
            "train",
            ["dataset.name=small", "model=tiny", "model.window=7x2"],
            ["model.window", "7x2", "6x4"],
        ),
        (
            "train",
            ["dataset.name=small", "model=tiny", "train.global_batch=16"],
            ["train.global_batch=16", "12 training images"],
        ),
        ("evaluate", ["model=nowhere"], ["nowhere", "no finished model"]),
        ("evaluate", ["model=models:/absent@champion"], ["absent"]),
        ("registry", [], ["list, show, register, verify, compare, promote, rollback"]),
        ("registry", ["show"], ["name=NAME"]),
        ("registry", ["promote", "name=absent", "version=1"], ["absent"]),
        ("shard", ["dataset=folder", "dataset.name=x", "dataset.path=/absent"], ["/absent"]),
        ("shard", ["dataset=idx", "dataset.name=x"], ["dataset.path"]),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_sentence_before_any_compute(
    command: str,
    arguments: list[str],
    words: list[str],
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry = (
        [*arguments[:1], f"storage.root={root}", *arguments[1:]]
        if command == "registry" and arguments
        else None
    )
    check_mistake(
        capsys, command, (registry or (arguments and [f"storage.root={root}", *arguments])), words
    )


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_holds_are_such_a_mistake(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    connect(ClusterOptions(), StorageOptions())  # tells that it waits for the cluster
    capsys.readouterr()
    options = ["dataset.name=small", "model=tiny", "train.global_batch=8", "cluster.num_workers=5"]
    check_mistake(capsys, "train", [f"storage.root={root}", *options], ["cluster.num_workers=5"])


def check_mistake(
    capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], words: list[str]
) -> None:
    code, out, err = outcome(capsys, command, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_an_unknown_command_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["vlae", "trian"])
    with pytest.raises(SystemExit) as caught:
        cli.console()
    assert caught.value.code == 2
    assert "trian" in capsys.readouterr().err


ALLOCATIONS: dict[str, Callable[[], object]] = {
    "numpy": lambda: np.empty(1 << 50),
    "torch": lambda: torch.empty(1 << 50),
    "overflow": lambda: torch.empty(1 << 62, 4),
    "python": lambda: bytearray(1 << 60),
}


@pytest.mark.parametrize("kind", ALLOCATIONS)
def test_memory_that_cannot_be_had_ends_in_a_sentence(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.training.plan.plans", lambda *_: ALLOCATIONS[kind]())
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "output=unused"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is not enough memory (")


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.plan.plans", lambda *_: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        cli.main(["plan", "output=unused"])


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train", "interrupted; the same command continues from here\n"),
        ("encode", "interrupted; the same command continues from here\n"),
        ("sample", "interrupted\n"),
        ("neighbours", "interrupted\n"),
    ],
)
def test_only_commands_that_continue_say_so(
    command: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main([command])
    assert ended.value.code == 130
    assert capsys.readouterr().err == told
