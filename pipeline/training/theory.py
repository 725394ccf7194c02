"""Test the theory on a distribution whose entropy is known, without Ray or a data set.

Three decoders are trained on fresh images of ``vlae.synthetic.clouds``: one sees no pixels, one has
a window that covers the texture, and one sees all earlier pixels. No code length can be below the
entropy. So the excess of a decoder's code length over the entropy shows how well it uses z, at any
rate.
"""

import math
import multiprocessing
import os
import queue
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlae
from pipeline.config.model import ModelOptions
from pipeline.config.options import to_dict
from pipeline.config.run import Algorithm, OptimOptions, TrainConfig, TrainOptions
from pipeline.config.sections import DatasetOptions, Source
from pipeline.errors import UserError
from pipeline.evaluation import pictures
from pipeline.evaluation.moments import Moments
from pipeline.machine import keep_freed_memory
from pipeline.progress import progress_bar
from pipeline.runs import TRAINING_FILE, Run
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.training.learner import Learner
from pipeline.values import JsonObject
from vlae.synthetic import PatternedTexture, clouds

WINDOWS = {"factorized": "0x0", "covering": "3x1", "full": "full"}
LATENTS = {"factorized": 32, "covering": 8, "full": 8}
"""The factorized decoder must encode much more in z."""
FLOW_DEPTH = 2
BATCH = 32
"""Images of one step."""
OPTIM = OptimOptions(
    algorithm=Algorithm.adam,
    learning_rate=2e-3,
    warmup_steps=100,
    decay_fraction=0.5,
    clip_norm=200.0,
    ema_decay=0.999,
)
FREE_NATS, FREE_FRACTION = 3.5, 0.4
"""The floor under the rate early in a run, about the global information.

The full decoder has no floor, so that it is free to ignore z.
"""

KNOWN = "known"
"""The job that computes the distribution's known quantities."""
JOBS = ("full", KNOWN, "covering", "factorized")
"""All jobs in the order in which they start, the longest first."""

POOL = 4096
"""Images drawn at once: drawing one takes as long as drawing hundreds."""
CHUNK = 500
"""Images measured at once."""
KNOWN_IMAGES = 40_000
"""Images on which H(c|x) is measured."""
SHOWN, AVERAGED = 8, 200
"""Images in the figure, and decodings averaged for each to show what its code holds."""


@dataclass(frozen=True)
class Experiment:
    """How the three decoders are trained and measured."""

    images: int
    """New images that each decoder is trained on."""
    num_images: int
    """Held-out images that it is measured on."""
    seed: int
    """Determines the images, the initial weights and all noise."""
    output: str
    """Folder of the figures, the picture and the models."""


def experiment(config: Experiment) -> JsonObject:
    """Train and measure the three decoders, and draw the figure; all goes to ``config.output``.

    Results that exist there already are reused if they were made with the same options. Raises
    UserError if the output cannot be written, or if the gradients do not stay finite.
    """
    output = open_storage(config.output)
    found = {job: _finished(output, config, job) for job in JOBS}
    parts = {job: part for job, part in found.items() if part is not None}
    reused = len(parts) == len(JOBS)
    if not reused:
        parts |= _work_all(config, [job for job in JOBS if job not in parts])
    known = parts[KNOWN]
    result = {
        "options": _options(config),
        **known,
        **{name: _against(known, parts[name]) for name in WINDOWS},
        "figure": f"{output.url}/theory.png",
        "reused": reused,
    }
    if not (reused and output.exists("theory.png")):
        output.write("theory.png", _figure(config, output, result))
    return result


def _options(config: Experiment) -> JsonObject:
    """All options and constants that the figures depend on."""
    options = {key: value for key, value in asdict(config).items() if key != "output"}
    recipe = {
        "latents": LATENTS,
        "flow_depth": FLOW_DEPTH,
        "batch": BATCH,
        "free_nats": FREE_NATS,
        "free_fraction": FREE_FRACTION,
    }
    return {**options, **recipe, "optim": to_dict(OPTIM)}


def _finished(output: Storage, config: Experiment, job: str) -> JsonObject | None:
    """The figures of a job that was finished with these options; None if there are none."""
    key = f"{job}/{TRAINING_FILE}" if job == KNOWN else f"{job}/model/{TRAINING_FILE}"
    if not output.exists(key):
        return None
    record = output.read_json(key)
    return record["figures"] if record["options"] == _options(config) else None


def _work_all(config: Experiment, jobs: list[str]) -> dict[str, JsonObject]:
    """Run the jobs in processes, one for each core at a time, and show their progress."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    waiting, running = list(jobs), dict[str, BaseProcess]()
    done: dict[str, JsonObject] = {}
    lengths: dict[str, float] = {}
    images = sum(config.images for job in jobs if job != KNOWN)
    with progress_bar(images, "training") as bar:
        while waiting or running:
            while waiting and len(running) < cores:
                job = waiting.pop(0)
                # Daemons end with this process.
                running[job] = context.Process(
                    target=_work, args=(config, job, messages), daemon=True
                )
                running[job].start()
            try:
                job, kind, value = messages.get(timeout=1.0)
            except queue.Empty:
                for job, process in running.items():
                    if process.exitcode:
                        raise UserError(
                            f"the process of {job} ended with exit code {process.exitcode}; run it"
                            " again"
                        ) from None
                continue
            if kind == "progress":
                images, lengths[job] = value
                bar.update(images)
                bar.set_postfix({name: f"{length:.2f}" for name, length in lengths.items()})
            elif kind == "error":
                raise UserError(value)
            else:
                done[job] = value
                running.pop(job).join()
    return done


def _work(config: Experiment, job: str, messages: Any) -> None:
    """Run one job; the target of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reports an interruption
    keep_freed_memory()
    torch.set_num_threads(1)
    output, options = open_storage(config.output), _options(config)
    try:
        if job == KNOWN:
            figures = known_quantities(clouds(), config.seed)
            output.write_json(f"{job}/{TRAINING_FILE}", {"options": options, "figures": figures})
        else:
            model = train(
                config,
                job,
                lambda images, length: messages.put((job, "progress", (images, length))),
            )
            figures = {"window": WINDOWS[job], **measure(config, model)}
            Run(output.child(job)).publish(model, {"options": options, "figures": figures})
    except UserError as error:
        messages.put((job, "error", str(error)))
    else:
        messages.put((job, "done", figures))


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random generator for one purpose, seeded unlike those of the other purposes."""
    purposes = ("training", "held out", "known", "codes", "figure")
    return torch.Generator().manual_seed(len(purposes) * seed + purposes.index(purpose))


def known_quantities(images: PatternedTexture, seed: int) -> JsonObject:
    """Entropy, global information and code lengths without z, in nats per image.

    H(x|c) and the code lengths without z are exact. H(c|x), a small part of the entropy, is a mean
    over images. It is the source of the standard errors of entropy and global information.
    """
    draw, moments = generator(seed, "known"), Moments()
    for _ in range(KNOWN_IMAGES // POOL + 1):
        moments.add({"class_entropy": images.class_entropy(images.sample(POOL, draw)[0])})
    information = math.log(images.classes) - moments.mean("class_entropy")
    return {
        "classes": images.classes,
        "entropy": images.entropy_given_class + information,
        "entropy_se": moments.standard_error("class_entropy"),
        "entropy_given_class": images.entropy_given_class,
        "global_information": information,
        "global_information_se": moments.standard_error("class_entropy"),
        "without_z": {
            name: images.code_length_without_class(vlae.Window.parse(WINDOWS[name]))
            for name in ("factorized", "covering")
        },
    }


def train_config(config: Experiment, name: str) -> TrainConfig:
    """The training run of one decoder."""
    return TrainConfig(
        dataset=DatasetOptions(name="clouds", source=Source.synthetic),
        model=ModelOptions(
            window=WINDOWS[name],
            latents=LATENTS[name],
            flow_depth=FLOW_DEPTH,
            flow_hidden=256,
            encoder_channels=16,
            decoder_channels=16,
            decoder_maps=16,
            decoder_features=64,
            decoder_blocks=2,
        ),
        optim=OPTIM,
        train=TrainOptions(
            images=config.images,
            global_batch=BATCH,
            num_streams=1,
            seed=config.seed,
            free_nats=0.0 if name == "full" else FREE_NATS,
            free_fraction=FREE_FRACTION,
            rate_warmup_fraction=0.0,
        ),
    )


def train(config: Experiment, name: str, progress: Callable[[int, float], object]) -> vlae.VLAE:
    """Train one decoder on fresh images; returns the model with its averaged weights.

    ``progress`` is called about once a second with the number of images since the last call, and
    their mean code length in nats. Raises UserError if the gradients do not stay finite.
    """
    images, draw = clouds(), generator(config.seed, "training")
    learner = Learner(train_config(config, name), images.image_shape, 1, torch.device("cpu"))
    num_steps, latents = learner.config.train.num_steps, learner.model.latents
    at, lengths = time.monotonic(), list[Tensor]()
    pool: Iterator[Tensor] = iter(())
    for step in range(num_steps):
        x = next(pool, None)
        if x is None:
            pool = iter(images.sample(POOL, draw)[0].split(BATCH))
            x = next(pool)
        distortion, rate, _ = learner.step(x, torch.randn(len(x), latents, generator=draw), step)
        lengths.append(distortion + rate)
        if time.monotonic() - at > 1 or step + 1 == num_steps:
            learner.guard.check(name, step + 1)
            progress(len(lengths) * BATCH, float(torch.stack(lengths).mean()))
            at, lengths = time.monotonic(), []
    return learner.ema.module


def measure(config: Experiment, model: vlae.VLAE) -> JsonObject:
    """A model's bound on held-out images, in nats per image, with standard errors.

    All decoders are measured on the same images. Distortion and code length are measured as their
    excess over -log p(x), image by image: the mean of -log p(x) is known to be H(x), and since some
    images are hard for every model, the excess has a fraction of the variance.
    """
    images, draw, codes = (
        clouds(),
        generator(config.seed, "held out"),
        generator(config.seed, "codes"),
    )
    moments = Moments()
    for start in range(0, config.num_images, CHUNK):
        x, _ = images.sample(min(CHUNK, config.num_images - start), draw)
        estimate = vlae.estimate(model, x, torch.randn(1, len(x), model.latents, generator=codes))
        distortion_excess = estimate.distortion + images.log_prob(x)
        excess = estimate.rate + distortion_excess
        moments.add(
            {"rate": estimate.rate, "distortion_excess": distortion_excess, "excess": excess}
        )
    figures = {name: moments.mean(name) for name in moments.sums}
    return figures | {f"{name}_se": moments.standard_error(name) for name in moments.sums}


def _against(known: JsonObject, measured: JsonObject) -> JsonObject:
    """A decoder's figures, with code length = rate + distortion = entropy + excess."""
    entropy, names = known["entropy"], ("window", "rate", "rate_se", "excess", "excess_se")
    return {
        **{name: measured[name] for name in names},
        "distortion": entropy + measured["distortion_excess"],
        "distortion_se": measured["distortion_excess_se"],
        "code_length": entropy + measured["excess"],
        "code_length_se": measured["excess_se"],
    }


def _figure(config: Experiment, output: Storage, result: JsonObject) -> bytes:
    distribution, draw = clouds(), generator(config.seed, "figure")
    x, labels = distribution.sample(SHOWN, draw)
    images = {"images": x, "their patterns": torch.sigmoid(distribution.patterns[labels])[:, None]}
    drawn = {}
    with tempfile.TemporaryDirectory() as name:
        for decoder in WINDOWS:
            folder = Path(name) / decoder
            folder.mkdir()
            for key in output.list(f"{decoder}/model/"):
                output.download(key, folder / Path(key).name)
            decodings = vlae.reconstruct(
                vlae.load(folder), x.repeat(AVERAGED, 1, 1, 1), draw
            ).unflatten(0, (AVERAGED, SHOWN))
            drawn[decoder] = {
                "one decoding": decodings[0],
                f"mean of {AVERAGED}": decodings.mean(0),
            }
    return pictures.theory(result, images, drawn)
