"""The training loop. It needs torch and the data, not Ray: call ``fit`` in a notebook or a test as
well.
"""

import copy
import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from pipeline.config.options import to_dict
from pipeline.config.run import TrainConfig
from pipeline.data import DataSet
from pipeline.data.cache import open_cache
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.reader import ReadOptions
from pipeline.errors import UserError
from pipeline.evaluation.measure import QUANTITIES, measure, report
from pipeline.machine import keep_freed_memory
from pipeline.runs import Metrics, publish, run_storage
from pipeline.storage import open_storage
from pipeline.storage.uploads import Uploads, patiently
from pipeline.training import checkpoint
from pipeline.training.learner import Learner
from pipeline.training.metrics import MetricLog, StepMeter

VALIDATION_BATCH = 64
CPU = torch.device("cpu")


class Stopped(Exception):
    """The run was asked to stop, and has saved its state: started again, it goes on from there."""


def fit(
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
    on_validation: Callable[[Metrics], None] = lambda metrics: None,
    on_report: Callable[[Metrics], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Metrics:
    """Train one model to the end, from the newest checkpoint of its run if there is one. Returns
    the last validation.

    What happens at a step is a function of the configuration and the step alone: a run that was
    killed ends with the weights of one that was not, and any number of ranks up to that of the
    streams sees the same batches and the same noise. With ``world_size`` above 1, torch.distributed
    must be initialised. ``on_validation`` is called on every rank, ``on_report`` on rank 0 with
    what it logs, and ``should_stop`` on every rank about once a second: where it is true on any,
    all save the state and raise Stopped.

    Raises UserError if the data is damaged, the gradients are no longer finite, or the storage
    stays away.
    """
    keep_freed_memory()
    train, run = config.train, run_storage(config)
    place = open_storage(config.dataset.url, config.storage.endpoint_url)
    data = patiently(partial(DataSet.load, place))
    reading = ReadOptions(open_cache(config.dataset), config.dataset.max_skipped)
    learner = Learner(config, data.manifest.image_shape, world_size, device)
    step = agreed(patiently(partial(checkpoint.resume, run, learner.state)), device)
    meter, beats = StepMeter(device), Beats(config, step, device)
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
            loader,
            samples=1,
            binarization=config.dataset.binarization,
            seed=train.seed,
            device=device,
        )
        moments.reduce(QUANTITIES, device)
        valid = {"images": step * train.global_batch, **report(moments, learner.model, samples=1)}
        if rank == 0 and -moments.mean("elbo") <= log.lowest("valid/elbo_nats"):
            best = copy.deepcopy(learner.ema.module)
            uploads.put(
                "best", partial(publish, run.child("best"), best, training | {"valid": valid})
            )
        log.add(step, {f"valid/{name}": value for name, value in valid.items()})
        on_validation({"step": step, **valid})
        return valid

    batches = TrainLoader(
        data,
        seed=train.seed,
        global_batch=train.global_batch,
        num_streams=train.num_streams,
        num_steps=train.num_steps,
        start_step=step,
        rank=rank,
        world_size=world_size,
        options=reading,
    )
    with patiently(lambda: MetricLog(run, step, writes=rank == 0)) as log, Uploads() as uploads:
        for batch in meter.waits(batches):
            meter.add(*learner.learn(batch))
            step += 1
            last = step == train.num_steps
            if step * train.global_batch % train.valid_every < train.global_batch and not last:
                validate()
            if step < beats.next_step and not last:
                continue
            stop, save, tell = beats.meet(step, should_stop(), not uploads.is_busy("checkpoint"))
            skipped, in_a_row = learner.guard.read()
            if tell or stop or last:
                row = {
                    "images": step * train.global_batch,
                    **learner.settings(batch.step),
                    **meter.report(train.global_batch),
                }
                row |= {"train/skipped_steps": skipped, "train/failed_uploads": uploads.failures}
                log.add(step, row)
                if rank == 0:
                    on_report(row)
            if tell or save or stop or last:
                uploads.put(
                    "metrics", log.flush
                )  # before the checkpoint: who goes on from that has the log up to it
            if (
                rank == 0 and (save or stop or last) and not in_a_row
            ):  # what follows a skipped step may be another
                snapshot = checkpoint.snapshot(learner.state)
                uploads.put(
                    "checkpoint",
                    partial(checkpoint.save, run, step, snapshot, train.keep_checkpoints),
                )
            if stop and not last:
                uploads.wait()
                if world_size > 1:
                    dist.barrier()  # Ray ends all ranks when the first of them does
                raise Stopped
            learner.guard.check(config.run_name, step)
        valid = validate()
        uploads.put("metrics", log.flush)
    if not math.isfinite(valid["elbo_nats"]):
        raise UserError(
            f"run {config.run_name}: the code length on validation images is not finite;"
            f" {learner.guard.ADVICE}"
        )
    if rank == 0:
        patiently(partial(publish, run, learner.ema.module, training | {"valid": valid}))
    return valid


def agreed(step: int, device: torch.device) -> int:
    """The step that every rank resumed from. Raises RuntimeError if they differ, as when one alone
    read a checkpoint wrongly.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        ends = torch.tensor([step, -step], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        highest, lowest = ends[0], -ends[1]
        if highest != lowest:
            raise RuntimeError(f"the ranks resumed from different steps, {lowest} to {highest}")
    return step


class Beats:
    """Steps at which all ranks agree on what is due, about once a second: to stop, to save, to
    tell.

    Rank 0 has the clock. Between two beats no step waits for a clock, a device or another rank's
    wishes.
    """

    SECONDS = 1.0

    def __init__(self, config: TrainConfig, step: int, device: torch.device) -> None:
        self.device, self.next_step = device, step + 10
        self.seconds = min(self.SECONDS, config.train.report_seconds)
        self.due = {"save": config.train.checkpoint_seconds, "tell": config.train.report_seconds}
        self.step, self.at = step, time.monotonic()
        self.done = dict.fromkeys(self.due, self.at)

    def meet(self, step: int, stop: bool, can_save: bool) -> list[bool]:
        """Whether any rank wants to ``stop``, and whether rank 0's clock says that it is time to
        save, if it can, and to tell.

        Chooses ``next_step`` from the speed since the last beat. This waits for the device.
        """
        now = time.monotonic()
        ahead = max(1, round(self.seconds * (step - self.step) / max(1e-9, now - self.at)))
        save, tell = (now - self.done[name] >= seconds for name, seconds in self.due.items())
        wishes = torch.tensor([ahead, stop, save and can_save, tell], device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            if dist.get_rank() > 0:
                wishes *= torch.tensor([0, 1, 0, 0], device=self.device)
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
        ahead, *due = wishes.tolist()
        self.next_step, self.step, self.at = step + ahead, step, now
        self.done |= {name: now for name, is_due in zip(self.due, due[1:], strict=True) if is_due}
        return [bool(wish) for wish in due]
