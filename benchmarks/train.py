"""The overhead of ``vlae train``, and how fast it starts and restarts.

    .venv/bin/python benchmarks/train.py [--rounds N] [--images N]

Everything uses ``model=fast`` on dynamically binarized MNIST, in a temporary folder.

* ratio_to_bare_loop: steps per second of ``vlae train`` with one worker of one core, relative to a
  bare PyTorch loop in a separate process. The loop has the same model, batches of 16 and all images
  in memory, and does forward, backward, clipping and Adam; it has no average of the weights, no
  check for non-finite gradients, no log and no checkpoints. It runs before and after. The figure is
  the median over rounds of the ratio to the mean of both.
* two_workers_speedup: images per second of two workers of one core each with 64 images per step
  each, relative to one worker with 64. They alternate likewise. Both cores must be otherwise idle.
* two_workers_speedup_same_batch: the same, but two workers share the batch of 64: the work of one
  worker, with twice the communication per image.
* two_loops_speedup: two bare loops side by side, relative to one: the limit that the machine sets.
* data_wait_share: the share of time that the runs with one worker spent waiting for images.
* seconds_to_first_step: from the command, which starts its own Ray, to the report of its tenth
  step; the median.
* seconds_to_resume: from SIGKILL of the only worker to the report of the tenth step after restart.

Speeds are medians of what the runs log (``train/images_per_s``, one row per second), without the
first rows. The last line is JSON.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pipeline import runs
from pipeline.storage import open_storage

VLAE = str(Path(sys.executable).with_name("vlae"))
BARE = """
import json, sys, time
import torch
from pipeline.config import load
from pipeline.loop import keep_freed_memory
from pipeline.sources import MnistSource

torch.set_num_threads(1)
keep_freed_memory()
config = load("train", ["model=fast"])
torch.manual_seed(0)
model = config.build((1, 28, 28))
optimizer = torch.optim.Adam(model.parameters(), config.optim.learning_rate, fused=True)
images = torch.from_numpy(MnistSource().read("train", 0, 5000)[0]).permute(0, 3, 1, 2).float() / 255
seconds = []
for step in range(int(sys.argv[1]) // 16):
    started = time.perf_counter()
    x = torch.bernoulli(images[torch.randint(len(images), (16,))])
    optimizer.zero_grad()
    bound = model(x, torch.randn(16, model.latents))
    (bound.distortion.mean() + bound.rate.mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
    optimizer.step()
    seconds.append(time.perf_counter() - started)
print(json.dumps(16 * len(seconds[20:]) / sum(seconds[20:])))
"""


class Run:
    """A ``vlae train`` in a separate process, with its own Ray."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.storage = open_storage(f"{folder}/runs/{name}")
        self.log = folder / "runs" / name / runs.METRICS  # a folder
        fixed = [
            f"storage.root={folder}",
            f"registry.uri=sqlite:///{folder}/registry.db",
            f"name={name}",
        ]
        fixed += ["model=fast", "train.valid_every=1000000000", "train.report_seconds=1"]
        self.started = time.time()
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [VLAE, "train", *fixed, *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_report(self, since: float) -> float:
        """Seconds from ``since`` until the run's log is next written."""
        while not self.log.exists() or self.log.stat().st_mtime < since:
            if self.process.poll() is not None:
                raise SystemExit(f"vlae train ended:\n{self.finish()}")
            time.sleep(0.02)
        return self.log.stat().st_mtime - since

    def kill_worker(self) -> float:
        """Kill the worker by SIGKILL; returns the time."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                process.wait()
        return time.time()

    def finish(self) -> str:
        _, errors = self.process.communicate()
        return errors

    def figures(self) -> tuple[float, float]:
        """The median of images per second and the mean share of time waited.

        Both are taken over the rows of the log, without the first three.
        """
        error = self.finish()
        if self.process.returncode:
            raise SystemExit(f"vlae train failed:\n{error}")
        rows = [row for row in runs.Run(self.storage).rows() if "train/images_per_s" in row][3:]
        if len(rows) < 3:
            raise SystemExit("the runs are too short to measure; raise --images")
        speed, waited = (
            [row[f"train/{name}"] for row in rows] for name in ("images_per_s", "data_wait")
        )
        return statistics.median(speed), statistics.fmean(waited)


def bare_loops(count: int, images: int) -> list[float]:
    """Images per second of each of ``count`` bare loops that run at the same time."""
    loops = [
        subprocess.Popen(
            [sys.executable, "-c", BARE, str(images)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    return [float(each.communicate()[0]) for each in loops]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=20_000, help="images of each run")
    arguments = parser.parse_args()
    ratios, speedups, shares, limits, waits, starts = [], [], [], [], [], []
    with tempfile.TemporaryDirectory(prefix="benchmark-train-") as name:
        folder, size = Path(name), f"train.images={arguments.images}"
        subprocess.run([VLAE, "shard", f"storage.root={folder}"], check=True)
        for number in range(arguments.rounds):
            before = bare_loops(1, arguments.images)
            run = Run(folder, f"one-{number}", size)
            starts.append(run.wait_for_report(run.started))
            ours, waited = run.figures()
            after, pair = bare_loops(1, arguments.images), bare_loops(2, arguments.images)
            bare = statistics.fmean(before + after)
            one, shared, two = (
                Run(
                    folder,
                    f"{workers}-{batch}-{number}",
                    size,
                    f"cluster.num_workers={workers}",
                    f"train.global_batch={batch}",
                ).figures()[0]
                for workers, batch in ((1, 64), (2, 64), (2, 128))
            )
            ratios.append(ours / bare)
            limits.append(sum(pair) / bare)
            speedups.append(two / one)
            shares.append(shared / one)
            waits.append(waited)
            print(
                f"round {number + 1}: {ours:.0f} images/s, {ratios[-1]:.3f} of the bare loop's, "
                f"{waited:.1%} waiting, {starts[-1]:.1f} s to the tenth step; batches of 64: "
                f"{one:.0f} images/s, {two:.0f} on two workers ({speedups[-1]:.2f} x), "
                f"{shared:.0f} if they share one ({shares[-1]:.2f} x); "
                f"two bare loops {limits[-1]:.2f} x",
                flush=True,
            )
        run = Run(folder, "killed", "train.images=1000000", "train.checkpoint_seconds=2")
        run.wait_for_report(run.started)
        time.sleep(5)
        resumed = run.wait_for_report(run.kill_worker())
        run.process.send_signal(signal.SIGTERM)
        run.finish()
    result = {
        "ratio_to_bare_loop": statistics.median(ratios),
        "two_workers_speedup": statistics.median(speedups),
        "two_workers_speedup_same_batch": statistics.median(shares),
        "two_loops_speedup": statistics.median(limits),
        "data_wait_share": statistics.median(waits),
        "seconds_to_first_step": statistics.median(starts),
        "seconds_to_resume": resumed,
    }
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


if __name__ == "__main__":
    main()
