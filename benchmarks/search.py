"""What a search costs: time outside training steps, and the images that ASHA saves.

    .venv/bin/python benchmarks/search.py --folder search-benchmark

Writes MNIST to shards, then searches the same small grid twice with two trials at a time: in full,
and with ASHA. For the full search it reports how the time of the cluster's two cores divides
between training steps, validations, measuring finished trials, and the rest (starting processes,
reports, waiting). For ASHA it reports how many images had been used when a finished trial first
came within 0.5 nats of the grid's best. Existing searches are not repeated. The last line is JSON.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from pipeline import commands
from pipeline.commands.images import shard
from pipeline.commands.models import tune
from pipeline.runs import Run
from pipeline.storage import open_storage

GRID = [
    "search.space.model.window=['0x0',3x1,5x2,7x4]",
    "search.space.model.latents=[8,32]",
    "search.space.model.flow_depth=[0,2]",
    "search.constraints=[]",
    "search.max_concurrent=2",
    "search.samples=4",
    "search.num_images=500",
    "search.probe_images=1000",
    "search.num_trials=16",
]
WITHIN = 0.5
"""How close to the grid's best counts as good enough, in nats, on the same validation images."""


def search(folder: str, name: str, images: int, *overrides: str) -> list[dict[str, Any]]:
    """Search the grid; returns the records of its trials."""
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
    """Shares of the two cores' time, from the start of the search to the end of its last trial.

    Each step counts as the median step of its run, so validations and checkpoints are excluded.
    """
    seconds = max(row["search_seconds"] for row in rows)
    steps = loops = 0.0
    for row in rows:
        log = [
            entry
            for entry in Run(open_storage(f"{folder}/runs/{row['run']}")).rows()
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
    """Images that all trials had seen when one first finished at least this well.

    None if no trial did.
    """
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
    parser.add_argument("--folder", default="search-benchmark", help="folder for all data")
    parser.add_argument(
        "--images", type=int, default=36_000, help="images of a trial that is not stopped"
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
        f"the same with ASHA: {sum(row['images'] for row in halved):,} images; "
        f"within {WITHIN} nats of the best after {spent}"
    )
    seconds = max(row["search_seconds"] for row in grid)
    lost = 1 - shares["steps"]
    result = {
        "lost": lost,
        "shares": shares,
        "seconds": seconds,
        "best": best,
        "images_grid": whole,
        "images_asha": spent,
        "fraction": spent and spent / whole,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
