"""The training loop. It needs no Ray: ``fit`` also runs in a notebook or a test."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from pipeline.config.options import to_dict
from pipeline.config.run import TrainConfig
from pipeline.data import DataSet
from pipeline.data.batch import Batch
from pipeline.data.cache import open_cache
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.reader import ReadOptions
from pipeline.errors import UserError
from pipeline.evaluation.measure import QUANTITIES, measure, report
from pipeline.machine import keep_freed_memory
from pipeline.runs import BEST, Metrics, Run
from pipeline.storage import resume
from pipeline.storage.uploads import UploadQueue, retry
from pipeline.training import checkpoint
from pipeline.training.learner import Learner
from pipeline.training.metrics import MetricLog, StepMeter

VALIDATION_BATCH = 64
"""Images of one validation batch."""
CPU = torch.device("cpu")


class Stopped(Exception):
    """The run was asked to stop, and has saved its state; the next ``fit`` resumes from it."""


def fit(
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
    on_validation: Callable[[Metrics], None] = lambda metrics: None,
    on_report: Callable[[Metrics], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[int | None], None] = lambda step: None,
) -> Metrics:
    """Train one model to the end, from its run's newest checkpoint if there is one.

    Returns the last validation. Each step is a function of the configuration and the step's number
    alone. So a run that was killed and resumed ends with the same weights, and the batches and the
    noise are the same for any number of ranks up to ``train.num_streams``.

    With ``world_size`` above 1, torch.distributed must be initialised. ``on_validation`` is called
    on every rank. ``on_report`` is called on rank 0 with each row that it logs. ``should_stop`` is
    called on every rank about once a second; if it is true on any rank, all ranks stop, rank 0
    saves the state, and all raise Stopped. ``on_step`` is called on every rank with the number of
    each step that it has the images for, again at each batch of a validation after that step, and
    with None when only uploads remain.

    Raises UserError if the data is damaged, if the gradients are no longer finite, or if the
    storage stays unavailable.
    """
    keep_freed_memory()
    train, run, failed_before = config.train, Run.of(config).storage, resume.failed
    data = retry(partial(DataSet.open, config.dataset.url, config.storage.endpoint_url))
    reading = ReadOptions(open_cache(config.dataset), config.dataset.max_skipped)
    learner = Learner(config, data.manifest.image_shape, world_size, device)
    step = agreed(retry(partial(checkpoint.resume, run, learner.state)), device)
    meter, heartbeat = StepMeter(device), Heartbeat(config, step, device)
    described = {**to_dict(config), "name": config.run_name}
    training = {"config": described, "manifest": data.manifest.digest}

    def validate() -> Metrics:
        loader = EvalLoader(
            data,
            split="valid",
            batch_size=VALIDATION_BATCH,
            num_images=train.valid_images,
            rank=rank,
            world_size=world_size,
            options=reading,
        )
        moments = measure(
            learner.ema.module,
            announced(loader),
            samples=1,
            binarization=config.dataset.binarization,
            seed=train.seed,
            device=device,
        )
        moments.reduce(QUANTITIES, device)
        valid = {"images": step * train.global_batch, **report(moments, learner.model, samples=1)}
        if rank == 0 and -moments.mean("elbo") <= log.lowest("valid/elbo_nats"):
            best = copy.deepcopy(learner.ema.module)
            uploads.submit(
                BEST, partial(Run(run.child(BEST)).publish, best, training | {"valid": valid})
            )
        log.add(step, {f"valid/{name}": value for name, value in valid.items()})
        on_validation({"step": step, **valid})
        return valid

    def announced(batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            on_step(step)
            yield batch

    batches = TrainLoader(
        data.with_valid() if train.with_valid else data,
        seed=train.seed,
        global_batch=train.global_batch,
        num_streams=train.num_streams,
        num_steps=train.num_steps,
        start_step=step,
        rank=rank,
        world_size=world_size,
        options=reading,
    )
    with retry(lambda: MetricLog(run, step, writes=rank == 0)) as log, UploadQueue() as uploads:
        for batch in meter.waits(announced(batches)):
            meter.add(*learner.learn(batch))
            step += 1
            last = step == train.num_steps
            if step * train.global_batch % train.valid_every < train.global_batch and not last:
                validate()
            if step < heartbeat.next_step and not last:
                continue
            due = heartbeat.sync(step, should_stop(), not uploads.is_pending("checkpoint"))
            stop = due.stop and not last
            skipped, in_a_row = learner.guard.read()
            if due.report or due.stop or last:
                row = {
                    "images": step * train.global_batch,
                    **learner.settings(batch.step),
                    **meter.report(train.global_batch),
                }
                row |= {
                    "train/skipped_steps": skipped,
                    "train/failed_requests": resume.failed - failed_before,
                }
                log.add(step, row)
                if rank == 0:
                    on_report(row)
            save = due.save or due.stop or last
            if due.report or save:
                # Before the checkpoint: a run that resumes from it needs the log up to its step.
                uploads.submit("metrics", log.flush)
            # Not while steps are being skipped: the weights may be bad (see Guard).
            if rank == 0 and save and not in_a_row:
                tensors = checkpoint.snapshot(learner.state)
                uploads.submit(
                    "checkpoint",
                    partial(checkpoint.save, run, step, tensors, train.keep_checkpoints),
                )
            if stop:
                on_step(None)
                uploads.join()
                if world_size > 1:
                    dist.barrier()  # Ray ends all ranks when the first one returns
                raise Stopped
            learner.guard.check(config.run_name, step)
        valid = validate()
        uploads.submit("metrics", log.flush)
        on_step(None)
    if not math.isfinite(valid["elbo_nats"]):
        raise UserError(
            f"run {config.run_name}: the code length on validation images is not finite;"
            f" {learner.guard.ADVICE}"
        )
    if rank == 0:
        retry(partial(Run(run).publish, learner.ema.module, training | {"valid": valid}))
    return valid


def agreed(step: int, device: torch.device) -> int:
    """The step that every rank resumed from.

    Raises RuntimeError if the ranks differ, as when one of them alone misread a checkpoint.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        ends = torch.tensor([step, -step], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        highest, lowest = ends[0], -ends[1]
        if highest != lowest:
            raise RuntimeError(f"the ranks resumed from different steps, {lowest} to {highest}")
    return step


class Due(NamedTuple):
    """What all ranks do after the current step."""

    stop: bool
    save: bool
    report: bool


class Heartbeat:
    """Synchronises the ranks about once a second: do they stop, save or report?

    Rank 0's clock decides when to save and report. Between two heartbeats no step waits for a
    clock, the device or another rank.
    """

    SECONDS = 1.0
    """Seconds between two heartbeats, at most."""

    def __init__(self, config: TrainConfig, step: int, device: torch.device) -> None:
        self.device, self.next_step = device, step + 10
        self.seconds = min(self.SECONDS, config.train.report_seconds)
        self.intervals = {
            "save": config.train.checkpoint_seconds,
            "report": config.train.report_seconds,
        }
        self.last_step, self.last_time = step, time.monotonic()
        self.done = dict.fromkeys(self.intervals, self.last_time)

    def sync(self, step: int, stop: bool, can_save: bool) -> Due:
        """Agree on what is due after ``step`` steps; all ranks must call it together.

        The ranks stop if any of them wants to ``stop``. They save and report if rank 0's clock says
        so; a save also needs ``can_save`` on rank 0. Sets ``next_step``, the step of the next
        heartbeat, from the speed since the last one. This waits for the device.
        """
        now = time.monotonic()
        elapsed = max(1e-9, now - self.last_time)
        ahead = max(1, round(self.seconds * (step - self.last_step) / elapsed))
        save, report = (now - self.done[name] >= limit for name, limit in self.intervals.items())
        flags = torch.tensor([ahead, stop, save and can_save, report], device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            if dist.get_rank() > 0:
                flags *= torch.tensor([0, 1, 0, 0], device=self.device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        ahead, *rest = flags.tolist()
        due = Due(*map(bool, rest))
        self.next_step, self.last_step, self.last_time = step + ahead, step, now
        self.done |= {name: now for name in self.intervals if getattr(due, name)}
        return due
