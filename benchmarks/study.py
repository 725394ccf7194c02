"""The paper's questions at an equal budget: how wide a window, and which prior?

    .venv/bin/python benchmarks/study.py --folder study --jobs 2

Trains every model of the study on dynamically binarized MNIST with `experiment=study`, with three
seeds each and without Ray, and measures it on test images. Prints a table of IWAE bound, rate, and
the accuracy of a linear probe of the codes. Existing results are reused. The last line is JSON.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

WINDOWS = ["0x0", "3x1", "5x2", "7x4", "full"]
PRIORS = {
    "N(0, I)": ["model.flow_depth=0"],
    "IAF posterior": ["model.flow_depth=0", "model.posterior_depth=2"],
}
SEEDS = range(3)


def models() -> dict[str, list[str]]:
    """The overrides that make each model of the study, by its name.

    The standard model has an AF prior of depth 2 and window 5x2.
    """
    return {f"window {window}": [f"model.window={window}"] for window in WINDOWS} | {
        f"window 5x2, {prior}": ["model.window=5x2", *overrides]
        for prior, overrides in PRIORS.items()
    }


def run(folder: str, name: str, seed: int, samples: int, num_images: int) -> dict[str, Any]:
    """Train and measure one model; returns its figures."""
    import torch

    torch.set_num_threads(1)
    from pipeline import commands
    from pipeline.commands.models import evaluate
    from pipeline.runs import Run
    from pipeline.training import loop

    slug = name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")
    options = [
        f"storage.root={folder}",
        f"name={slug}-{seed}",
        f"train.seed={seed}",
        "experiment=study",
        *models()[name],
    ]
    typed = commands.load("train", options)
    storage = Run.of(typed).storage
    if not storage.exists("model/model.safetensors"):
        loop.fit(typed)
    output = f"{folder}/evaluations/{typed.run_name}"
    bounds = [f"bounds.samples={samples}", f"bounds.num_images={num_images}"]
    if not (Path(output) / "result.json").exists():
        evaluate.run(
            commands.load("evaluate", [f"model={storage.url}", f"output={output}", *bounds])
        )
    return dict(json.loads((Path(output) / "result.json").read_text())["test"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="study", help="folder for all data")
    parser.add_argument(
        "--jobs", type=int, default=2, help="models trained at a time, each on one core"
    )
    parser.add_argument("--samples", type=int, default=128, help="k of the IWAE bound")
    parser.add_argument(
        "--images", type=int, default=1000, help="test images on which the bound is measured"
    )
    arguments = parser.parse_args()
    from pipeline import commands
    from pipeline.commands.images import shard

    folder = str(Path(arguments.folder).absolute())
    if not (Path(folder) / "datasets/mnist/manifest.json").exists():
        shard.run(commands.load("shard", [f"storage.root={folder}"]))
    rows: dict[str, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            (name, seed): pool.submit(run, folder, name, seed, arguments.samples, arguments.images)
            for seed in SEEDS
            for name in models()
        }
        for (name, _), job in jobs.items():
            rows.setdefault(name, []).append(job.result())
    print(
        f"{'':<28}{f'IWAE-{arguments.samples}, nats':>22}{'rate, bits':>18}{'linear probe, %':>20}"
    )
    table = {}
    for name, results in rows.items():
        columns = {key: [result[key] for result in results] for key in ("iwae_nats", "rate_bits")}
        columns["probe"] = [100 * result["probe"]["linear"]["accuracy"] for result in results]
        table[name] = {
            key: [round(value, 3) for value in values] for key, values in columns.items()
        }
        shown = [
            f"{statistics.mean(values):>10.2f} +- {statistics.stdev(values):.2f}"
            for values in columns.values()
        ]
        print(f"{name:<28}" + "".join(f"{text:>20}" for text in shown))
    print(json.dumps({"images": arguments.images, "samples": arguments.samples, "models": table}))


if __name__ == "__main__":
    main()
