"""The training loop, without Ray: a run that is cut off anywhere, or dealt to more ranks, is the same run; and what ends one."""

import json
import math
import subprocess
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import vlae
from pipeline import checkpoint, loop, manifest
from pipeline.config import Binarization, TrainConfig
from pipeline.errors import UserError
from pipeline.loader import Batch, EvalLoader, binarize
from pipeline.measure import measure, report
from pipeline.metrics import read_rows
from pipeline.optimizer import Guard
from pipeline.storage import Storage, open_storage
from tests.pipeline import strokes

CPU = torch.device("cpu")
WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the data set."""
    folder = str(tmp_path_factory.mktemp("root"))
    strokes.write(strokes.data_storage(folder))
    return folder


def configure(root: str, name: str, *overrides: str) -> TrainConfig:
    return strokes.train_config(root, f"name={name}", *overrides)


@pytest.fixture(scope="module")
def whole(root: str) -> Storage:
    """The run of 30 steps that nothing interrupted."""
    config = configure(root, "whole")
    loop.fit(config)
    return loop.run_storage(config)


class Interrupted(Exception):
    """Stands for the end of a process."""


def interrupt(config: TrainConfig, validation: int) -> None:
    """Train up to a validation's end, and no further."""
    seen: list[dict[str, Any]] = []

    def count(metrics: dict[str, Any]) -> None:
        seen.append(metrics)
        if len(seen) == validation:
            raise Interrupted

    with pytest.raises(Interrupted):
        loop.fit(config, on_validation=count)


def rows_of(run: Storage, kind: str) -> list[dict[str, float]]:
    return [row for row in read_rows(run) if f"{kind}/rate" in row or f"{kind}/rate_nats" in row]


def steps_of(run: Storage, kind: str) -> list[float]:
    return [row["step"] for row in rows_of(run, kind)]


def test_a_run_leaves_its_model_its_log_and_its_newest_checkpoints(whole: Storage, root: str) -> None:
    kept = whole.list()
    checkpoints = [key for key in kept if key.startswith("checkpoints/")]
    assert [int(Path(key).name[:10]) for key in checkpoints] == [29, 30]
    assert {key for key in kept if key.startswith("model/")} == {"model/model.json", "model/training.json", WEIGHTS}
    assert "metrics.jsonl" in kept
    assert any(key.startswith("tensorboard/") for key in kept)
    training = whole.read_json("model/training.json")
    assert training["config"]["name"] == "whole"
    assert training["config"]["model"]["window"] == "3x1"
    assert training["manifest"] == manifest.load(strokes.data_storage(root)).digest


def test_the_log_has_every_step_once_with_its_learning_rate(whole: Storage) -> None:
    rows = rows_of(whole, "train")
    assert [row["step"] for row in rows] == list(range(10, 31))
    assert all(row["images"] == 8 * row["step"] for row in read_rows(whole) if "images" in row)
    assert all(row["train/code_length"] == row["train/distortion"] + row["train/rate"] for row in rows)
    rates = [row["train/learning_rate"] for row in rows]
    assert rates[:6] == [2e-3] * 6  # the last half of the run is the decay
    assert rates[6:] == pytest.approx(np.linspace(2e-3, 2e-3 / 15, 15).tolist())
    assert steps_of(whole, "valid") == [10, 20, 30]


def test_what_is_published_is_the_average_and_its_measure_is_the_last_validation(
    whole: Storage, root: str, tmp_path: Path
) -> None:
    for key in whole.list("model/"):
        whole.download(key, tmp_path / Path(key).name)
    model = vlae.load(tmp_path)
    fresh = vlae.build(**json.loads((tmp_path / "model.json").read_text()))
    ema = vlae.EMA(fresh, 0.9)
    assert checkpoint.resume(whole, {"model": fresh, "ema": ema}) == 30
    for name, value in model.state_dict().items():
        assert torch.equal(value, ema.state_dict()[name])
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())
    data = strokes.data_storage(root)
    loader = EvalLoader(data, manifest.load(data), split="valid", batch_size=64)
    moments = measure(model, loader, samples=1, binarization=Binarization.dynamic, seed=0, device=CPU)
    training = whole.read_json("model/training.json")
    assert {"images": 240, **report(moments, model, 1)} == training["valid"]
    assert read_rows(whole)[-1]["valid/elbo_nats"] == training["valid"]["elbo_nats"]


@pytest.mark.parametrize("validation", [1, 2, 3])
def test_a_run_cut_off_at_a_validation_ends_as_if_it_had_not_been(validation: int, whole: Storage, root: str) -> None:
    config = configure(root, f"cut-{validation}")
    interrupt(config, validation)
    run = loop.run_storage(config)
    assert not run.exists(WEIGHTS)
    valid = loop.fit(config)
    assert run.read(WEIGHTS) == whole.read(WEIGHTS)
    assert valid == whole.read_json("model/training.json")["valid"]
    assert steps_of(run, "train") == sorted(set(steps_of(run, "train")))
    assert rows_of(run, "valid")[-1] == rows_of(whole, "valid")[-1]
    assert len(rows_of(run, "train")) >= 12
    common = {row["step"]: row["train/rate"] for row in rows_of(whole, "train")}
    same = [row["train/rate"] == common[row["step"]] for row in rows_of(run, "train") if row["step"] % 10]
    assert same.count(True) >= len(same) - 1  # the first of a resumed run is an average over ten steps


def test_a_run_cut_off_at_a_validation_has_that_validation_in_its_log(whole: Storage, root: str) -> None:
    config = configure(root, "cut-log")
    interrupt(config, 1)
    reported: list[int] = []
    loop.fit(config, on_validation=lambda metrics: reported.append(metrics["step"]))
    assert steps_of(loop.run_storage(config), "valid") == steps_of(whole, "valid")


def test_a_run_without_its_checkpoints_starts_afresh_and_its_log_too(whole: Storage, root: str) -> None:
    config = configure(root, "fresh")
    interrupt(config, 3)
    run = loop.run_storage(config)
    run.delete(run.list("checkpoints/"))
    assert read_rows(run)
    loop.fit(config)
    assert run.read(WEIGHTS) == whole.read(WEIGHTS)
    assert steps_of(run, "train") == steps_of(whole, "train")
    assert steps_of(run, "valid") == steps_of(whole, "valid")


def test_a_finished_run_that_is_run_again_keeps_its_log(root: str) -> None:
    config = configure(root, "twice")
    loop.fit(config)
    run = loop.run_storage(config)
    before = read_rows(run)
    loop.fit(config)
    assert read_rows(run) == before


@pytest.mark.parametrize(
    "override",
    ["train.seed=1", "dataset.binarization=static", "train.free_nats=0", "optim.algorithm=adamax"],
)
def test_another_option_is_another_run(override: str, whole: Storage, root: str) -> None:
    config = configure(root, override.replace("=", "-"), override)
    loop.fit(config)
    assert loop.run_storage(config).read(WEIGHTS) != whole.read(WEIGHTS)


def test_a_run_does_not_depend_on_how_often_it_is_reported_or_measured(whole: Storage, root: str) -> None:
    overrides = ["train.report_seconds=60", "train.checkpoint_seconds=60", "train.valid_every=1000"]
    config = configure(root, "quiet", *overrides)
    loop.fit(config)
    assert loop.run_storage(config).read(WEIGHTS) == whole.read(WEIGHTS)


def test_it_learns(root: str) -> None:
    config = configure(root, "learns", "train.images=4000", "train.valid_every=1000", "train.report_seconds=60")
    measured: list[dict[str, Any]] = []
    loop.fit(config, on_validation=measured.append)
    assert measured[-1]["elbo_nats"] < measured[0]["elbo_nats"] < strokes.SIZE**2 * np.log(2)
    assert measured[-1]["elbo_nats"] == pytest.approx(measured[-1]["rate_nats"] + measured[-1]["distortion_nats"])
    assert measured[-1]["num_images"] == 20


@pytest.mark.parametrize(
    "overrides",
    [["train.free_bits=soft", "train.free_nats=30"], ["train.free_groups=2"], ["optim=adamax", "optim.ema_decay=0.9"]],
    ids=["soft free bits", "groups", "adamax"],
)
def test_whatever_the_run_it_ends_as_if_it_had_not_been_cut_off(overrides: list[str], root: str) -> None:
    runs = []
    for name in ("whole", "cut"):
        config = configure(root, f"{overrides[0].replace('=', '-')}-{name}", *overrides)
        if name == "cut":
            interrupt(config, 2)
        loop.fit(config)
        runs.append(loop.run_storage(config))
    assert runs[0].read(WEIGHTS) == runs[1].read(WEIGHTS)
    assert rows_of(runs[0], "train")[-1]["train/rate_weight"] == rows_of(runs[1], "train")[-1]["train/rate_weight"]
    if "train.free_bits=soft" in overrides:
        assert rows_of(runs[0], "train")[-1]["train/rate_weight"] < 0.7


def test_it_needs_no_ray(root: str) -> None:
    script = """
import sys
sys.modules["ray"] = None  # importing it fails
from pipeline import config, loop
loop.fit(config.load("train", sys.argv[1:]))
"""
    overrides = [*strokes.TINY, f"storage.root={root}", "name=without-ray", "train.images=16"]
    done = subprocess.run([sys.executable, "-c", script, *overrides], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what is not finite ------------------------------------------------------------------------------------------------

SINGLE_FAULTS = (12, 13, 21)


def plant_faults(patch: pytest.MonkeyPatch, steps: Container[int]) -> None:
    """Have the images of some steps be no numbers."""

    def faulty(batch: Batch, mode: Binarization, seed: int) -> Tensor:
        return binarize(batch, mode, seed) * (math.nan if batch.step in steps else 1)

    patch.setattr(loop, "binarize", faulty)


def test_a_bad_batch_is_skipped_and_counted_and_left_out_of_the_averages(
    root: str, whole: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_faults(monkeypatch, SINGLE_FAULTS)
    ends = []
    for name in ("faulty", "faulty-cut"):
        config = configure(root, name)
        if name == "faulty-cut":
            interrupt(config, 2)
        loop.fit(config)
        run = loop.run_storage(config)
        ends.append(run.read(WEIGHTS))
        assert rows_of(run, "train")[-1]["train/skipped_steps"] == 3
    assert ends[0] == ends[1], "a run that was cut off skips as one that was not"
    assert ends[0] != whole.read(WEIGHTS)
    run = loop.run_storage(configure(root, "faulty"))
    skipped = {row["step"]: row["train/skipped_steps"] for row in read_rows(run) if "train/skipped_steps" in row}
    assert [skipped[step] for step in (12, 13, 14, 21, 22, 30)] == [0, 1, 2, 2, 3, 3]
    measured = {row["step"] for row in rows_of(run, "train")}
    assert measured == set(range(10, 31)) - {step + 1 for step in SINGLE_FAULTS}  # each of these rows is of one step
    assert all(math.isfinite(row["train/rate"]) for row in rows_of(run, "train"))


def test_when_bad_steps_persist_the_run_stops_at_its_last_good_state(
    root: str, whole: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(root, "broken", "train.keep_checkpoints=100")
    with monkeypatch.context() as patch:
        plant_faults(patch, range(11, 1000))
        patch.setattr(Guard, "PATIENCE", 15)
        with pytest.raises(
            UserError, match=r"^run broken: the gradients of the last 15 steps up to step 26 are not finite; lower optim"
        ):
            loop.fit(config)
    run = loop.run_storage(config)
    assert [int(Path(key).name[:10]) for key in run.list("checkpoints/")] == [10, 11]
    assert read_rows(run)[-1]["train/skipped_steps"] == 15, "the log shows what happened"
    loop.fit(config)
    assert run.read(WEIGHTS) == whole.read(WEIGHTS)


@pytest.mark.parametrize("optim", ["adam", "adamax"])
def test_weights_that_are_blown_up_end_the_run_before_a_checkpoint_of_them_is_kept(root: str, optim: str) -> None:
    config = configure(
        root, f"wild-{optim}", f"optim={optim}", "optim.learning_rate=1e30", "optim.warmup_steps=0", "train.valid_every=1000"
    )
    with pytest.raises(
        UserError, match=rf"^run wild-{optim}: the gradients of .* are not finite; lower optim\.learning_rate or"
    ):
        loop.fit(config)
    assert loop.run_storage(config).list("checkpoints/") == []
    assert loop.run_storage(config).list("model/") == []


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"there is no data set at {tmp_path}/datasets/strokes; make one with: vlae shard"):
        loop.fit(strokes.train_config(str(tmp_path)))


# --- ranks -------------------------------------------------------------------------------------------------------------

RANKS = 2


def train_on_one_rank(rank: int, root: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    valid = loop.fit(configure(root, "ranks"), rank=rank, world_size=RANKS)
    with pytest.MonkeyPatch.context() as patch:
        plant_faults(patch, SINGLE_FAULTS if rank == 1 else ())
        loop.fit(configure(root, "ranks-faulty"), rank=rank, world_size=RANKS)
    Path(folder, f"{rank}.json").write_text(json.dumps(valid))
    dist.destroy_process_group()


def test_two_ranks_have_the_loss_of_one_at_every_step(whole: Storage, root: str, tmp_path: Path) -> None:
    spawn(train_on_one_rank, (root, str(tmp_path)), nprocs=RANKS)
    run = open_storage(f"{root}/runs/ranks")
    for kind, names in (("train", ("distortion", "rate")), ("valid", ("distortion_nats", "rate_nats", "elbo_nats_se"))):
        assert steps_of(run, kind) == steps_of(whole, kind)
        for one, two in zip(rows_of(whole, kind), rows_of(run, kind), strict=True):
            for name in names:
                assert two[f"{kind}/{name}"] == pytest.approx(one[f"{kind}/{name}"], rel=1e-4), (one["step"], name)
    assert all(row["valid/num_images"] == 20 for row in rows_of(run, "valid"))
    first, second = (json.loads(Path(tmp_path, f"{rank}.json").read_text()) for rank in range(RANKS))
    assert first == second
    weights = [np.frombuffer(storage.read(WEIGHTS)[-4000:], np.float32) for storage in (run, whole)]
    np.testing.assert_allclose(*weights, rtol=1e-3, atol=1e-4)
    # A fault on one rank is one on all of them: they skip the same steps, and stay the same.
    faulty = rows_of(open_storage(f"{root}/runs/ranks-faulty"), "train")
    assert faulty[-1]["train/skipped_steps"] == len(SINGLE_FAULTS)
    assert all(math.isfinite(row["train/rate"]) for row in faulty)
