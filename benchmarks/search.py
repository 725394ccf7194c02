"""What a search costs: the time that it spends outside training steps, and the images that halving saves.

    .venv/bin/python benchmarks/search.py --folder search-benchmark

Shards MNIST, then searches the same small grid twice with two trials at once: whole, and with ASHA. Of the core time that the cluster's two
cores have while the grid is searched, it tells what went to training steps, to validations, to measuring the finished trials and to
nothing of that (processes that start, reports, waiting). Of ASHA, it tells how many images it had spent when a trial that
ran to its end came within 0.5 nats of the grid's best. What is there already is not searched again. The last line is JSON.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pipeline import commands
from pipeline.commands import shard, tune
from pipeline.runs import read_rows
from pipeline.storage import open_storage

GRID = [
    "search.space.model.window=['0x0',3x1,5x2,7x4]", "search.space.model.latents=[8,32]", "search.space.model.flow_depth=[0,2]",
    "search.constraints=[]", "search.max_concurrent=2", "search.samples=4", "search.num_images=500", "search.probe_images=1000",
    "search.num_trials=16",
]  # fmt: skip
WITHIN = 0.5
"""How near to the grid's best is near enough, in nats of the bound on the same validation images."""


def search(folder: str, name: str, images: int, *overrides: str) -> list[dict[str, Any]]:
    """Search the grid; returns all that is known of its trials."""
    options = [
        f"storage.root={folder}",
        f"registry.uri=sqlite:///{folder}/registry.db",
        f"name={name}",
    ]
    budget = [
        f"train.images={images}",
        f"train.valid_every={images // 9}",
        "train.valid_images=500",
        "train.report_seconds=2",
    ]
    result = tune.run(commands.load("tune", [*options, *budget, *GRID, *overrides]))
    storage = open_storage(result["url"])
    return [storage.read_json(key) for key in sorted(storage.list("trials/"))]


def where_time_went(folder: str, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of the two cores' time, from the search's start to its last trial's end.

    A step is taken to last as long as the median of those that its run has reported: validations and checkpoints do not count.
    """
    seconds = max(row["search_seconds"] for row in rows)
    steps = loops = 0.0
    for row in rows:
        log = [
            entry
            for entry in read_rows(open_storage(f"{folder}/runs/{row['run']}"))
            if "train/step_ms" in entry
        ]
        steps += statistics.median(entry["train/step_ms"] for entry in log) * log[-1]["step"] / 1000
        ends = [0, *(entry["step"] for entry in log)]
        loops += sum(
            entry["train/step_ms"] * (end - start) / 1000
            for entry, start, end in zip(log, ends, ends[1:], strict=False)
        )
    trials = sum(row["seconds"] for row in rows)
    parts = {
        "steps": steps,
        "validations and checkpoints": loops - steps,
        "starts and measurements": trials - loops,
        "no trial": 2 * seconds - trials,
    }
    return {name: value / (2 * seconds) for name, value in parts.items()}


def images_until(rows: list[dict[str, Any]], nll: float) -> int | None:
    """How many images all trials together had seen when one had run to its end and was at least as good; none if none was."""
    ends = [
        row["curve"][-1]["seconds"]
        for row in rows
        if row["status"] == "finished" and row["values"]["nll"] <= nll
    ]
    if not ends:
        return None
    return sum(
        max([entry["images"] for entry in row["curve"] if entry["seconds"] <= min(ends)], default=0)
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="search-benchmark", help="where everything is kept")
    parser.add_argument(
        "--images", type=int, default=36_000, help="images of a trial that runs to its end"
    )
    arguments = parser.parse_args()
    folder = str(Path(arguments.folder).absolute())
    if not (Path(folder) / "datasets/mnist/manifest.json").exists():
        shard.run(commands.load("shard", [f"storage.root={folder}"]))
    grid = search(folder, "grid", arguments.images, "search.sampler=grid", "search.stopping=none")
    halved = search(
        folder,
        "asha",
        arguments.images,
        "search.sampler=tpe",
        "search.stopping=asha",
        "search.grace_fraction=0.111",
    )
    shares = where_time_went(folder, grid)
    best = min(row["values"]["nll"] for row in grid)
    whole, spent = sum(row["images"] for row in grid), images_until(halved, best + WITHIN)
    for name, share in shares.items():
        print(f"{name:<28}{100 * share:6.1f} %")
    print(f"the whole grid: {whole:,} images, best NLL <= {best:.2f} nats")
    print(
        f"the same with ASHA: {sum(row['images'] for row in halved):,} images; within {WITHIN} nats of the best after {spent}"
    )
    seconds = max(row["search_seconds"] for row in grid)
    lost = 1 - shares["steps"]
    print(json.dumps({"lost": lost, "shares": shares, "seconds": seconds, "best": best, "images_grid": whole, "images_asha": spent,
                      "fraction": spent and spent / whole}))  # fmt: skip


if __name__ == "__main__":
    main()
