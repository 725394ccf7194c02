"""The training loop. It needs torch and the data, not Ray: call ``fit`` in a notebook or a test as well."""

import ctypes
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import vlae
from pipeline import checkpoint, manifest, schedule
from pipeline.cache import open_cache
from pipeline.config import FreeBits, TrainConfig, to_dict
from pipeline.errors import UserError
from pipeline.loader import EvalLoader, TrainLoader, binarize
from pipeline.measure import QUANTITIES, measure, report
from pipeline.metrics import MetricLog, StepMeter, mean_over_ranks
from pipeline.noise import Purpose, normal
from pipeline.optimizer import Guard
from pipeline.optimizer import make as make_optimizer
from pipeline.storage import Storage, open_storage

VALIDATION_BATCH = 64
TRAINING_FILE = "training.json"
CPU = torch.device("cpu")


def fit(
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device = CPU,
    on_validation: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Train one model to the end, from the newest checkpoint of its run if there is one. Returns the last validation.

    What happens at a step is a function of the configuration and the step alone: a run that was killed ends with the weights of one
    that was not, and any number of ranks that divides the streams sees the same batches and the same noise. With ``world_size``
    above 1, torch.distributed must be initialised. ``on_validation`` is called on every rank.

    Raises UserError if the data is damaged, or if the gradients are no longer finite.
    """
    keep_freed_memory()
    optim, train = config.optim, config.train
    data, run = open_storage(config.dataset.url, config.storage.endpoint_url), run_storage(config)
    contents = manifest.load(data)
    cache, max_skipped = open_cache(config.dataset), config.dataset.max_skipped

    torch.manual_seed(train.seed)
    model = config.build(contents.image_shape).to(device)
    ema = vlae.EMA(model, optim.ema_decay)
    optimizer, guard = make_optimizer(optim, model), Guard(device)
    state: dict[str, checkpoint.Stateful] = {"model": model, "ema": ema, "optimizer": optimizer, "guard": guard}
    soft = None
    if train.free_bits is FreeBits.soft:
        soft = state["free_bits"] = vlae.SoftFreeBits(train.free_nats, device)
    step = checkpoint.resume(run, state)
    network = DistributedDataParallel(model, forward_sync_buffers=False) if world_size > 1 else model

    def validate() -> dict[str, Any]:
        loader = EvalLoader(
            data,
            contents,
            split="valid",
            batch_size=VALIDATION_BATCH,
            rank=rank,
            world_size=world_size,
            num_images=train.valid_images,
            cache=cache,
            max_skipped=max_skipped,
        )
        moments = measure(
            ema.module, loader, samples=1, binarization=config.dataset.binarization, seed=train.seed, device=device
        )
        moments.reduce(QUANTITIES, device)
        values = {"images": step * train.global_batch, **report(moments, model, samples=1)}
        log.add(step, {f"valid/{name}": value for name, value in values.items()})
        on_validation({"step": step, **values})
        return values

    meter = StepMeter(device)
    pace = Pace(train.report_seconds, step, device)
    saved_at = time.monotonic()
    batches = TrainLoader(
        data,
        contents,
        seed=train.seed,
        global_batch=train.global_batch,
        num_streams=train.num_streams,
        num_steps=train.num_steps,
        start_step=step,
        rank=rank,
        world_size=world_size,
        cache=cache,
        max_skipped=max_skipped,
    )
    with MetricLog(run, step, writes=rank == 0) as log:
        for batch in meter.waits(batches):
            x = binarize(batch, config.dataset.binarization, train.seed).to(device, non_blocking=True)
            noise = torch.from_numpy(normal((Purpose.POSTERIOR, train.seed), batch.positions, model.latents))
            bound = network(x, noise.to(device, non_blocking=True))
            terms = [bound.distortion.mean(0, keepdim=True), vlae.group_rates(bound, train.free_groups)]
            means = mean_over_ranks(torch.cat(terms))
            distortion, rates = means[0], means[1:]
            weight = soft.gamma if soft else schedule.rate_weight(train, step)
            loss = vlae.training_loss(bound, rates, schedule.free_nats(train, step), weight)

            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate(optim, train, step)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
            taken = guard.step(optimizer, norm, means)
            step += 1
            ema.update(model, step)
            meter.add(distortion, rates.sum(), taken)
            if soft:
                soft.update(rates.sum())

            if step * train.global_batch % train.valid_every < train.global_batch and step < train.num_steps:
                validate()
            if step >= pace.next_step or step == train.num_steps:
                skipped, in_a_row = guard.read()
                settings = {"train/learning_rate": group["lr"], "train/rate_weight": float(weight)}
                progress = meter.report(train.global_batch) | {"train/skipped_steps": skipped}
                log.add(step, {"images": step * train.global_batch, **settings, **progress})
                pace.set(step)
                due = time.monotonic() - saved_at > train.checkpoint_seconds or step == train.num_steps
                if rank == 0 and due and not in_a_row:  # what follows a skipped step may be another
                    checkpoint.save(run, step, state, train.keep_checkpoints)
                    saved_at = time.monotonic()
                log.flush()
                guard.check(config.run_name, step)
        validation = validate()
    if not math.isfinite(validation["elbo_nats"]):
        raise UserError(f"run {config.run_name}: the code length on validation images is not finite; {guard.ADVICE}")
    if rank == 0:
        training = {"config": {**to_dict(config), "name": config.run_name}, "manifest": contents.digest, "valid": validation}
        publish(run, ema.module, training)
    return validation


class Pace:
    """When to report next: every so many seconds, but at a step that all ranks agree on.

    Rank 0 measures and tells the others, at each report only, so that no step in between waits for a clock.
    """

    def __init__(self, seconds: float, step: int, device: torch.device) -> None:
        self.seconds, self.device = seconds, device
        self.next_step, self.step, self.at = step + 10, step, time.monotonic()

    def set(self, step: int) -> None:
        """Choose ``next_step`` from the speed since the last report."""
        now = time.monotonic()
        steps = max(1, round(self.seconds * (step - self.step) / max(1e-9, now - self.at)))
        ahead = torch.tensor(steps, device=self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(ahead, 0)
        self.next_step, self.step, self.at = step + int(ahead), step, now


def run_storage(config: TrainConfig) -> Storage:
    """Where a run keeps its checkpoints, metrics, model and result."""
    return open_storage(f"{config.storage.root}/runs/{config.run_name}", config.storage.endpoint_url)


def publish(run: Storage, model: vlae.VLAE, training: dict[str, Any]) -> None:
    """Put the final model, ready for ``vlae.load``, under ``model/`` of the run, with a record of its training beside it."""
    with tempfile.TemporaryDirectory() as folder:
        vlae.save(model, folder)
        (Path(folder) / TRAINING_FILE).write_text(json.dumps(training, indent=2) + "\n")
        for path in sorted(Path(folder).iterdir()):
            run.upload(f"model/{path.name}", path)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of giving it back to the kernel and zeroing it anew.

    Activations are allocated and freed at every step; without this about a quarter of a step on a CPU goes to page faults.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold = -1, -3
            libc.mallopt(trim_threshold, 1 << 30)
            libc.mallopt(mmap_threshold, 32 << 20)  # glibc takes no more
