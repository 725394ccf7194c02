"""What the explorer's answers take, from the browser's side: the real command, over HTTP.

    python -m benchmarks.explore
    python -m benchmarks.explore --preset colour --size 64

The model is a preset with fresh weights, whose answers take as long as a trained one's; the images
are noise. Each question is asked alone, once the first images are encoded, for another image each
time. The last line is JSON: the seconds from the start of the command to its first page and to the
last encoded image, and for each question the median and the 95th percentile in milliseconds.
"""

import argparse
import http.client
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import trange

from pipeline import commands
from pipeline.config import options
from pipeline.config.sections import Encoding
from pipeline.data import writer
from pipeline.data.manifest import Manifest
from pipeline.explorer.server import FILES
from pipeline.runs import Run
from pipeline.storage import open_storage

SHARD = 1000
"""Images in a shard."""


def write(root: Path, preset: str, size: int, num_images: int) -> str:
    """Write a data set and a run with a model of it; returns the run's folder."""
    grey = preset == "fast"
    storage = open_storage(f"{root}/datasets/noise")
    random, shards = np.random.default_rng(0), []
    for start in range(0, num_images, SHARD):
        count = min(SHARD, num_images - start)
        images = random.integers(0, 256, (count, size, size, 1 if grey else 3)).astype(np.uint8)
        shards.append(
            writer.write_images(
                storage, f"test/{start}.tar", start, images, np.zeros(count, int), 250, Encoding.npy
            )
        )
    shape = (1 if grey else 3, size, size)
    splits = dict.fromkeys(("train", "test"), shards)
    Manifest("noise", shape, 1, 250, splits, binarization="dynamic" if grey else "none").publish(
        storage
    )
    words = [f"storage.root={root}", "dataset.name=noise", f"model={preset}"]
    config = commands.load("train", words)
    run = Run.of(config)
    run.publish(config.build(shape), {"config": options.to_dict(config)})
    return run.url


def measure(times: int, ask: Callable[[int], object]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds, of ``ask(0)``, ``ask(1)``, ..."""
    ask(0)
    found = []
    for number in range(1, times + 1):
        began = time.perf_counter()
        ask(number)
        found.append(1000 * (time.perf_counter() - began))
    return {
        "median_ms": round(statistics.median(found), 1),
        "p95_ms": round(float(np.percentile(found, 95)), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="fast", help="a model preset")
    parser.add_argument("--size", type=int, default=28, help="width and height of the images")
    parser.add_argument("--images", type=int, default=10_000, help="images of the data set")
    parser.add_argument("--times", type=int, default=50, help="how often each question is asked")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write(Path(folder), arguments.preset, arguments.size, arguments.images)
        command = [sys.executable, "-m", "pipeline", "explore", f"model={run}", "port=0"]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                address = process.stdout.readline().split()[-1]
                figures = answers(address, began, arguments.images, arguments.times)
            finally:
                process.send_signal(signal.SIGINT)
    print(json.dumps(figures))


def answers(address: str, began: float, num_images: int, times: int) -> dict[str, Any]:
    """The figures of the server at ``address``, started at ``began``."""
    host, _, secret = address.removeprefix("http://").partition("/#")
    connection = http.client.HTTPConnection(host)

    def get(method: str, path: str, body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {secret}"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content) if body is not None else content

    def image(number: int) -> dict[str, int]:
        return {"sample": 37 * number % num_images}

    for path in FILES:
        get("GET", path)
    figures: dict[str, Any] = {"first_page_s": round(time.perf_counter() - began, 2)}
    with trange(num_images, desc="encoding", unit=" images") as bar:
        while (encoded := get("POST", "/api/progress", {})["encoded"]) < num_images:
            bar.update(encoded - bar.n)
            time.sleep(0.2)
    figures["encoded_s"] = round(time.perf_counter() - began, 2)
    moved = {str(latent): 0.5 for latent in range(4)}
    drawn = {"shown": 4, "seed": 0, "moved": moved}
    questions: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
        "thumbnails": ("images", lambda number: {"start": image(number)["sample"], "count": 40}),
        "code": ("code", lambda number: {"image": image(number)}),
        "moving": ("redraw", lambda number: {"image": image(number), "draws": 8, **drawn}),
        "redraw": ("redraw", lambda number: {"image": image(number), "draws": 32, **drawn}),
        "walk": (
            "walk",
            lambda number: {"image": image(number), "to": image(number + 1), "steps": 9, "seed": 0},
        ),
        "neighbours": ("neighbours", lambda number: {"image": image(number), "count": 12}),
    }

    def ask(what: str, question: Callable[[int], dict[str, Any]], number: int) -> object:
        return get("POST", f"/api/{what}", {"model": 0, **question(number)})

    for name, (what, question) in questions.items():
        figures[name] = measure(times, partial(ask, what, question))
        print(f"{name:<12}{figures[name]}", flush=True)
    return figures


if __name__ == "__main__":
    main()
