"""The training loop, without Ray.

A run that is interrupted anywhere, or spread over more ranks, ends with the same result. Faulty
gradients and missing data end it with one clear error.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import tempfile
import threading
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import vlae
from pipeline.config.run import TrainConfig
from pipeline.config.sections import Binarization
from pipeline.data import DataSet
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.errors import UserError
from pipeline.evaluation.measure import measure, report
from pipeline.runs import Run
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.training import checkpoint, learner, loop
from pipeline.training.optimizer import Guard
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
    """An uninterrupted run of 30 steps."""
    config = configure(root, "whole")
    loop.fit(config)
    return Run.of(config).storage


class Interrupted(Exception):
    """Stands in for the death of the process."""


def interrupt(config: TrainConfig, validation: int) -> None:
    """Train until the given validation has ended, then interrupt the run."""
    seen: list[dict[str, Any]] = []

    def count(metrics: dict[str, Any]) -> None:
        seen.append(metrics)
        if len(seen) == validation:
            raise Interrupted

    with pytest.raises(Interrupted):
        loop.fit(config, on_validation=count)


def rows_of(run: Storage, kind: str) -> list[dict[str, float]]:
    return [row for row in Run(run).rows() if f"{kind}/rate" in row or f"{kind}/rate_nats" in row]


def steps_of(run: Storage, kind: str) -> list[float]:
    return [row["step"] for row in rows_of(run, kind)]


def test_a_run_leaves_its_model_its_log_and_its_newest_checkpoints(
    whole: Storage, root: str
) -> None:
    kept = whole.list()
    checkpoints = [key for key in kept if key.startswith("checkpoints/")]
    assert len(checkpoints) == 2
    assert int(Path(checkpoints[-1]).name[:10]) == 30
    for folder in ("model/", "best/model/"):
        files = {f"{folder}{name}" for name in ("model.json", "training.json", "model.safetensors")}
        assert {key for key in kept if key.startswith(folder)} == files
    assert "metrics/00000.jsonl" in kept
    assert any(key.startswith("tensorboard/") for key in kept)
    training = whole.read_json("model/training.json")
    assert training["config"]["name"] == "whole"
    assert training["config"]["model"]["window"] == "3x1"
    assert training["manifest"] == DataSet.load(strokes.data_storage(root)).manifest.digest


def test_the_log_has_every_step_once_with_its_learning_rate(whole: Storage) -> None:
    rows = rows_of(whole, "train")
    assert [row["step"] for row in rows] == list(range(10, 31))
    assert all(row["images"] == 8 * row["step"] for row in Run(whole).rows() if "images" in row)
    assert all(
        row["train/code_length"] == row["train/distortion"] + row["train/rate"] for row in rows
    )
    rates = [row["train/learning_rate"] for row in rows]
    assert rates[:6] == [2e-3] * 6  # the last half of the run is the decay
    assert rates[6:] == pytest.approx(np.linspace(2e-3, 2e-3 / 15, 15).tolist())
    assert steps_of(whole, "valid") == [10, 20, 30]


def test_the_published_model_is_the_average_and_has_the_last_validation(
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
    assert any(
        not torch.equal(value, model.state_dict()[name])
        for name, value in fresh.state_dict().items()
    )
    data = DataSet.load(strokes.data_storage(root))
    loader = EvalLoader(data, split="valid", batch_size=64)
    moments = measure(
        model, loader, samples=1, binarization=Binarization.dynamic, seed=0, device=CPU
    )
    training = whole.read_json("model/training.json")
    assert {"images": 240, **report(moments, model, 1)} == training["valid"]
    assert Run(whole).rows()[-1]["valid/elbo_nats"] == training["valid"]["elbo_nats"]


def test_a_run_with_the_validation_images_trains_on_them_as_on_others(root: str) -> None:
    contents = DataSet.load(strokes.data_storage(root)).manifest
    splits = {**contents.splits, "train": [*contents.shards("train"), *contents.shards("valid")]}
    joined = open_storage(f"{root}/datasets/joined")
    strokes.write(joined)
    joined.delete(["manifest.json"])
    dataclasses.replace(contents, name="joined", splits=splits).publish(joined)
    given = configure(root, "given", "train.with_valid=true")
    stated = configure(root, "stated", "dataset.name=joined")
    assert loop.fit(given) == loop.fit(stated)
    assert Run.of(given).storage.read(WEIGHTS) == Run.of(stated).storage.read(WEIGHTS)
    training = Run.of(given).storage.read_json("model/training.json")
    assert training["manifest"] == contents.digest


@pytest.mark.parametrize("validation", [1, 2, 3])
def test_a_run_interrupted_at_a_validation_ends_with_the_same_weights(
    validation: int, whole: Storage, root: str
) -> None:
    config = configure(root, f"cut-{validation}")
    interrupt(config, validation)
    run = Run.of(config).storage
    assert not run.exists(WEIGHTS)
    valid = loop.fit(config)
    assert run.read(WEIGHTS) == whole.read(WEIGHTS)
    assert valid == whole.read_json("model/training.json")["valid"]
    assert steps_of(run, "train") == sorted(set(steps_of(run, "train")))
    assert rows_of(run, "valid")[-1] == rows_of(whole, "valid")[-1]
    assert len(rows_of(run, "train")) >= 12
    common = {row["step"]: row["train/rate"] for row in rows_of(whole, "train")}
    same = [
        row["train/rate"] == common[row["step"]]
        for row in rows_of(run, "train")
        if row["step"] % 10
    ]
    # The first row of a resumed run is an average over ten steps.
    assert same.count(True) >= len(same) - 1


def test_a_run_interrupted_at_a_validation_has_it_in_its_log(whole: Storage, root: str) -> None:
    config = configure(root, "cut-log")
    interrupt(config, 1)
    reported: list[int] = []
    loop.fit(config, on_validation=lambda metrics: reported.append(metrics["step"]))
    assert steps_of(Run.of(config).storage, "valid") == steps_of(whole, "valid")


def test_the_log_up_to_a_checkpoint_is_written_before_the_checkpoint(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(root, "log-first", "train.report_seconds=3600")
    run, save = Run.of(config).storage, checkpoint.save
    logged: dict[int, list[float]] = {}

    def look_and_save(storage: Storage, step: int, *arguments: Any) -> None:
        logged[step] = steps_of(run, "valid")
        save(storage, step, *arguments)

    monkeypatch.setattr(checkpoint, "save", look_and_save)
    loop.fit(config)
    assert min(logged) < 20
    for step, valid in logged.items():  # training may have gone on, and logged more
        assert {due for due in (10, 20) if due <= step} <= set(valid)


def test_training_continues_while_a_checkpoint_is_written(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, save = configure(root, "slow-upload"), checkpoint.save
    is_far, waited = threading.Event(), list[bool]()

    def wait_and_save(*arguments: Any) -> None:
        waited.append(is_far.wait(60))
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", wait_and_save)
    loop.fit(config, on_report=lambda row: is_far.set() if row["images"] >= 25 * 8 else None)
    assert waited[0], "15 steps after the first checkpoint waited for it"
    assert Run.of(config).storage.list("checkpoints/")


def test_a_run_without_checkpoints_starts_over_with_a_new_log(whole: Storage, root: str) -> None:
    config = configure(root, "fresh")
    interrupt(config, 3)
    run = Run.of(config).storage
    run.delete(run.list("checkpoints/"))
    assert Run(run).rows()
    loop.fit(config)
    assert run.read(WEIGHTS) == whole.read(WEIGHTS)
    assert steps_of(run, "train") == steps_of(whole, "train")
    assert steps_of(run, "valid") == steps_of(whole, "valid")


def test_a_finished_run_that_is_run_again_keeps_its_log(root: str) -> None:
    config = configure(root, "twice")
    loop.fit(config)
    run = Run.of(config).storage
    before = Run(run).rows()
    loop.fit(config)
    assert Run(run).rows() == before


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=1",
        "dataset.binarization=static",
        "train.free_nats=0",
        "optim.algorithm=adamax",
        "train.nested=true",
    ],
)
def test_another_option_gives_other_weights(override: str, whole: Storage, root: str) -> None:
    config = configure(root, override.replace("=", "-"), override)
    loop.fit(config)
    assert Run.of(config).storage.read(WEIGHTS) != whole.read(WEIGHTS)


def test_weights_do_not_depend_on_the_frequency_of_reports_and_validations(
    whole: Storage, root: str
) -> None:
    overrides = ["train.report_seconds=60", "train.checkpoint_seconds=60", "train.valid_every=1000"]
    config = configure(root, "quiet", *overrides)
    loop.fit(config)
    assert Run.of(config).storage.read(WEIGHTS) == whole.read(WEIGHTS)


def test_it_learns(root: str) -> None:
    config = configure(
        root, "learns", "train.images=4000", "train.valid_every=1000", "train.report_seconds=60"
    )
    measured: list[dict[str, Any]] = []
    loop.fit(config, on_validation=measured.append)
    assert measured[-1]["elbo_nats"] < measured[0]["elbo_nats"] < strokes.SIZE**2 * np.log(2)
    assert measured[-1]["elbo_nats"] == pytest.approx(
        measured[-1]["rate_nats"] + measured[-1]["distortion_nats"]
    )
    assert measured[-1]["num_images"] == 20


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.free_bits=soft", "train.free_nats=30"],
        ["train.free_groups=2"],
        ["optim=adamax", "optim.ema_decay=0.9"],
        ["optim=muon"],
        ["train.nested=true"],
    ],
    ids=["soft free bits", "groups", "adamax", "muon", "nested"],
)
def test_with_any_options_an_interrupted_run_ends_with_the_same_weights(
    overrides: list[str], root: str
) -> None:
    ended = []
    for name in ("whole", "cut"):
        config = configure(root, f"{overrides[0].replace('=', '-')}-{name}", *overrides)
        if name == "cut":
            interrupt(config, 2)
        loop.fit(config)
        ended.append(Run.of(config).storage)
    assert ended[0].read(WEIGHTS) == ended[1].read(WEIGHTS)
    assert (
        rows_of(ended[0], "train")[-1]["train/rate_weight"]
        == rows_of(ended[1], "train")[-1]["train/rate_weight"]
    )
    if "train.free_bits=soft" in overrides:
        assert rows_of(ended[0], "train")[-1]["train/rate_weight"] < 0.7


def test_it_needs_neither_ray_nor_pytorchs_compiler(root: str) -> None:
    script = """
import sys
sys.modules["ray"] = None  # importing it fails
from pipeline.commands import load
from pipeline.training import loop
loop.fit(load("train", sys.argv[1:]))
assert "torch._dynamo" not in sys.modules, "loading it takes seconds"
"""
    overrides = [*strokes.TINY, f"storage.root={root}", "name=without-ray", "train.images=16"]
    done = subprocess.run(
        [sys.executable, "-c", script, *overrides], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- values that are not finite -------------------------------------------------------------------

SINGLE_FAULTS = (12, 13, 21)


def plant_faults(patch: pytest.MonkeyPatch, steps: Container[int]) -> None:
    """Replace the images of some steps by NaN."""

    def faulty(batch: Batch, mode: Binarization, seed: int) -> Tensor:
        return binarize(batch, mode, seed) * (math.nan if batch.step in steps else 1)

    patch.setattr(learner, "binarize", faulty)


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
        run = Run.of(config).storage
        ends.append(run.read(WEIGHTS))
        assert rows_of(run, "train")[-1]["train/skipped_steps"] == 3
    assert ends[0] == ends[1], "an interrupted run skips the same steps"
    assert ends[0] != whole.read(WEIGHTS)
    run = Run.of(configure(root, "faulty")).storage
    skipped = {
        row["step"]: row["train/skipped_steps"]
        for row in Run(run).rows()
        if "train/skipped_steps" in row
    }
    assert [skipped[step] for step in (12, 13, 14, 21, 22, 30)] == [0, 1, 2, 2, 3, 3]
    measured = {row["step"] for row in rows_of(run, "train")}
    # Each row is of one step, and a skipped step has no measurement.
    assert measured == set(range(10, 31)) - {step + 1 for step in SINGLE_FAULTS}
    assert all(math.isfinite(row["train/rate"]) for row in rows_of(run, "train"))


def test_after_many_skipped_steps_the_run_stops_at_its_last_good_state(
    root: str, whole: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(root, "broken", "train.keep_checkpoints=100")
    with monkeypatch.context() as patch:
        plant_faults(patch, range(11, 1000))
        patch.setattr(Guard, "MAX_SKIPPED", 15)
        with pytest.raises(
            UserError,
            match=(
                r"^run broken: the gradients of the last 15 steps up to step 26 are not finite;"
                r" lower optim"
            ),
        ):
            loop.fit(config)
    run = Run.of(config).storage
    steps = [int(Path(key).name[:10]) for key in run.list("checkpoints/")]
    assert steps
    assert max(steps) <= 11
    assert Run(run).rows()[-1]["train/skipped_steps"] == 15, "the log shows what happened"
    loop.fit(config)
    assert run.read(WEIGHTS) == whole.read(WEIGHTS)


@pytest.mark.parametrize("optim", ["adam", "adamax", "muon"])
def test_diverged_weights_end_the_run_before_a_checkpoint(root: str, optim: str) -> None:
    config = configure(
        root,
        f"wild-{optim}",
        f"optim={optim}",
        "optim.learning_rate=1e30",
        "optim.warmup_steps=0",
        "train.valid_every=1000",
    )
    with pytest.raises(
        UserError,
        match=(
            rf"^run wild-{optim}: the gradients of .* are not finite; lower optim\.learning_rate or"
        ),
    ):
        loop.fit(config)
    assert Run.of(config).storage.list("checkpoints/") == []
    assert Run.of(config).storage.list("model/") == []


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=rf"there is no data set at {tmp_path}/datasets/strokes; make one with: vlae shard",
    ):
        loop.fit(strokes.train_config(str(tmp_path)))


# --- ranks ----------------------------------------------------------------------------------------


def train_on_one_rank(
    rank: int,
    world_size: int,
    root: str,
    folder: str,
    runs: dict[str, list[str]],
    stops: dict[str, int],
) -> None:
    """Train several runs, given as options by name, one after the other.

    Rank 1 is asked to stop a run at its step in ``stops``, and has bad batches in a run named
    faulty.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    valid = {}
    for name, overrides in runs.items():
        faulty = SINGLE_FAULTS if rank == 1 and "faulty" in name else ()
        last = stops.get(name, math.inf) if rank == 1 else math.inf
        beats = itertools.count(10)  # one at step 10, and then one at each step
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(loop.Stopped):
            plant_faults(patch, faulty)
            valid[name] = loop.fit(
                configure(root, name, *overrides),
                rank=rank,
                world_size=world_size,
                should_stop=lambda: next(beats) >= last,  # noqa: B023
            )
    Path(folder, f"{rank}.json").write_text(json.dumps(valid))
    dist.destroy_process_group()


def train_on(
    world_size: int, root: str, runs: dict[str, list[str]], stops: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    """Train runs on ``world_size`` processes.

    Returns the last validation of each run that was not stopped, for each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(train_on_one_rank, (world_size, root, folder, runs, stops or {}), nprocs=world_size)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


LONG = ["train.images=1600", "train.valid_every=1600", "train.checkpoint_seconds=60"]
"""200 steps, few checkpoints; the log has all but the first nine steps."""
PRECISIONS = {"float32": 1e-3, "float64": 1e-9}
MICRO = ["train.precision=float64", "train.micro_batch=2", *LONG]
"""Two of three ranks then have one micro-batch, and one has two."""
NESTED = ["train.precision=float64", "train.nested=true"]
MUON = ["train.precision=float64", "optim=muon", *LONG]
CHANGED = {f"changed-{name}": [f"train.precision={name}", *LONG] for name in PRECISIONS}
"""Runs that three ranks begin and two end."""


@pytest.fixture(scope="module")
def on_one_rank(root: str) -> dict[str, Storage]:
    """The long runs on one rank, by precision."""
    configs = {
        name: configure(root, f"one-{name}", f"train.precision={name}", *LONG)
        for name in PRECISIONS
    }
    for config in configs.values():
        loop.fit(config)
    return {name: Run.of(config).storage for name, config in configs.items()}


@pytest.fixture(scope="module")
def on_three_ranks(root: str) -> list[dict[str, Any]]:
    """The last validation of each run, by its name, on each of three ranks; the runs ``CHANGED``
    are stopped.

    One start of three processes serves all runs, since it takes longer than a run.
    """
    long = {f"three-{name}": [f"train.precision={name}", *LONG] for name in PRECISIONS}
    others = {"three-micro": MICRO, "three-nested": NESTED, "three-muon": MUON, "three-faulty": []}
    return train_on(3, root, long | others | CHANGED, dict.fromkeys(CHANGED, 100))


def assert_same_losses(run: Storage, whole: Storage, tolerance: float) -> None:
    """Check that the losses of two runs differ by no more than ``tolerance``.

    Each row of a log is the average over the steps since the row before.
    """
    alone = {int(row["step"]): row for row in rows_of(whole, "train")}
    steps = [int(step) for step in steps_of(run, "train")]
    assert len(steps) > 170
    assert (steps[0], steps[-1]) == (10, 200)
    for row, before in zip(rows_of(run, "train"), [9, *steps], strict=False):
        for name in ("train/code_length", "train/distortion"):
            expected = np.mean(
                [alone[step][name] for step in range(before + 1, int(row["step"]) + 1)]
            )
            assert row[name] == pytest.approx(expected, rel=tolerance), (row["step"], name)


def test_three_ranks_of_four_streams_have_the_losses_of_one_over_200_steps(
    on_one_rank: dict[str, Storage], on_three_ranks: list[dict[str, Any]], root: str
) -> None:
    first, second, third = on_three_ranks
    assert first == second == third, "all ranks have the same validation"
    for name, tolerance in PRECISIONS.items():
        assert_same_losses(open_storage(f"{root}/runs/three-{name}"), on_one_rank[name], tolerance)
    assert_same_losses(
        open_storage(f"{root}/runs/three-micro"), on_one_rank["float64"], PRECISIONS["float64"]
    )


def test_each_image_of_a_nested_run_sends_as_many_latents_on_three_ranks_as_on_one(
    on_three_ranks: list[dict[str, Any]], root: str
) -> None:
    alone = loop.fit(configure(root, "one-nested", *NESTED))
    assert on_three_ranks[0]["three-nested"] == pytest.approx(alone, rel=PRECISIONS["float64"])


@pytest.mark.usefixtures("on_three_ranks")
def test_a_stopped_run_resumes_on_another_number_of_ranks_with_the_same_losses(
    on_one_rank: dict[str, Storage], root: str
) -> None:
    for name in CHANGED:
        run = open_storage(f"{root}/runs/{name}")
        assert Path(max(run.list("checkpoints/"))).name[:10] == f"{100:010d}", (
            "the state is saved at the step of the stop"
        )
        assert steps_of(run, "train")[-1] == 100
    train_on(2, root, CHANGED)
    for name, tolerance in PRECISIONS.items():
        assert_same_losses(
            open_storage(f"{root}/runs/changed-{name}"), on_one_rank[name], tolerance
        )


def test_muon_trains_on_three_ranks_as_on_one(
    root: str, on_three_ranks: list[dict[str, Any]]
) -> None:
    alone = loop.fit(configure(root, "one-muon", *MUON))
    for each in on_three_ranks:
        assert each["three-muon"] == pytest.approx(alone, rel=PRECISIONS["float64"])


def test_a_fault_on_one_rank_is_skipped_by_all(
    on_three_ranks: list[dict[str, Any]], root: str
) -> None:
    assert "three-faulty" in on_three_ranks[0]
    assert on_three_ranks[0] == on_three_ranks[1] == on_three_ranks[2]
    faulty = rows_of(open_storage(f"{root}/runs/three-faulty"), "train")
    assert faulty[-1]["train/skipped_steps"] == len(SINGLE_FAULTS)
    assert all(math.isfinite(row["train/rate"]) for row in faulty)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.free_groups=2"],
        ["train.free_bits=soft", "train.free_nats=30"],
        ["train.free_nats=0"],
        ["train.nested=true"],
    ],
    ids=["floor", "groups", "soft free bits", "no floor", "nested"],
)
def test_the_size_of_micro_batches_does_not_change_the_weights(
    overrides: list[str], root: str
) -> None:
    weights = []
    for size in (None, 1, 3):  # 8 images: all at once, one by one, and 3 + 3 + 2
        name = f"micro-{size}-{'-'.join(overrides).replace('=', '-')}"
        config = configure(
            root, name, "train.precision=float64", f"train.micro_batch={size or 'null'}", *overrides
        )
        loop.fit(config)
        weights.append(safetensors.torch.load(Run.of(config).storage.read(WEIGHTS)))
    for name, value in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-9)


def test_bfloat16_matrix_products_train_as_float32_does(
    root: str, on_one_rank: dict[str, Storage]
) -> None:
    config = configure(root, "bfloat16", "train.precision=bfloat16", *LONG)
    valid = loop.fit(config)
    assert valid["elbo_nats"] == pytest.approx(
        rows_of(on_one_rank["float32"], "valid")[-1]["valid/elbo_nats"], rel=0.02
    )
    weights = safetensors.torch.load(Run.of(config).storage.read(WEIGHTS))
    assert all(value.dtype == torch.float32 for value in weights.values())
