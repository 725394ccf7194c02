"""``vlae demo``: the main job from start to end, with an S3 server and a Ray cluster of its own."""

import dataclasses
import os
import time
from dataclasses import dataclass
from pathlib import Path

import vlae
from pipeline.commands import Command, load
from pipeline.config.evaluation import BoundOptions
from pipeline.config.options import option, section
from pipeline.config.search import TuneConfig
from pipeline.config.sections import Binarization
from pipeline.errors import UserError
from pipeline.values import JsonObject, Measured


@dataclass
class DemoConfig(TuneConfig):
    """The main job on real images: object storage, shards, search, registry, evaluation."""

    folder: str = option("the folder for everything", "demo", path=True)
    bounds: BoundOptions = section(BoundOptions, "the final evaluation, on test images")


def run(config: DemoConfig) -> JsonObject:
    """Shard MNIST, search, register the best models, evaluate the very best on the test images.

    Everything is in ``config.folder``; results of an earlier call are reused. Returns the summary.
    """
    from pipeline.commands.images import shard
    from pipeline.commands.models import evaluate, tune
    from pipeline.search import report
    from pipeline.storage import open_storage
    from pipeline.storage.server import ObjectStorageServer

    started = time.monotonic()
    folder = Path(config.folder)
    with ObjectStorageServer(folder / "objects", "vlae") as server:
        os.environ.update(server.environment())
        _print(f"object storage at {server.endpoint_url}, data in {folder / 'objects'}")
        shards = dataclasses.replace(
            load("shard", []),
            storage=config.storage,
            dataset=config.dataset,
            cluster=config.cluster,
        )
        data = shard.run(shards)
        _print(
            f"data set {config.dataset.name}: "
            + ", ".join(f"{split['images']:,} {name}" for name, split in data["splits"].items())
        )
        binarization = Binarization(data["binarization"])
        config = dataclasses.replace(
            config, dataset=dataclasses.replace(config.dataset, binarization=binarization)
        )
        found = tune.run(config)
        searched = open_storage(found["url"])
        for key in (*report.PICTURES, report.PAGE, report.TABLE):
            if searched.exists(key):
                searched.download(key, folder / "search" / key)
        if not found["registered"]:
            raise UserError(
                f"no model of search {found['name']} was registered; use other search.constraints,"
                " or more search.num_trials"
            )
        chosen = found["registered"][0]
        best = next(row for row in found["trials"] if row["run"] == chosen["run"])
        _print(
            f"best model: {chosen['name']} version {chosen['version']}; evaluating it on the test"
            " images"
        )
        reference = f"models:/{chosen['name']}/{chosen['version']}"
        evaluation = dataclasses.replace(
            load("evaluate", [f"model={reference}"]),
            output=str(folder / "evaluation"),
            bounds=config.bounds,
            storage=config.storage,
            registry=config.registry,
        )
        result_file = open_storage(evaluation.output)
        measured = result_file.read_json("result.json") if result_file.exists("result.json") else {}
        if measured.get("registry") != {"name": chosen["name"], "version": chosen["version"]}:
            measured = evaluate.run(evaluation)
    result = {
        "dataset": {
            "name": config.dataset.name,
            "splits": data["splits"],
            "manifest": data["manifest_digest"],
        },
        "search": {
            "name": found["name"],
            "trials": found["trials"],
            "report": str(folder / "search" / report.PAGE),
        },
        "best": best,
        "test": measured["test"],
        "pictures": measured["pictures"],
        "registry": {
            "name": chosen["name"],
            "version": chosen["version"],
            "uri": config.registry.uri,
        },
        "registered": found["registered"],
        "seconds": round(time.monotonic() - started, 1),
    }
    return result


def format_result(config: DemoConfig, result: JsonObject) -> str:
    """The summary as a table."""
    best, test, registry = result["best"], result["test"], result["registry"]
    splits = ", ".join(
        f"{split['images']:,} {name}" for name, split in result["dataset"]["splits"].items()
    )
    finished = sum(row["status"] == "finished" for row in result["search"]["trials"])
    elbo = Measured.from_json(test, "elbo_nats")
    bound = f"{elbo} (ELBO)"
    if "iwae_nats" in test:
        iwae = Measured.from_json(test, "iwae_nats")
        bound = f"{iwae} (IWAE bound, k = {test['iwae_samples']}); ELBO {elbo.value:.2f}"
    probes = {}
    if "probe" in test:
        linear, two_layer = (
            Measured.from_json(test["probe"][name], "accuracy").percent
            for name in ("linear", "two_layer")
        )
        probes["class"] = (
            f"predicted from the code with {linear} accuracy by a linear probe, {two_layer} by a"
            " two-layer one"
        )
    others = ", ".join(str(each["version"]) for each in result["registered"][1:])
    others = f"; also version {others}" if others else ""
    rows = {
        "data set": f"{result['dataset']['name']}: {splits}",
        "trials": f"{len(result['search']['trials'])}, of which {finished} finished",
        "best": vlae.describe({key.removeprefix("model."): best[key] for key in best}),
        "rate": f"{test['rate_bits']:.1f} bits per image",
        "NLL": f"<= {bound}; on {elbo.count:,} test images",
        **probes,
        "registry": (
            f"{registry['name']} version {registry['version']} in {registry['uri']}" + others
        ),
        "report": result["search"]["report"],
        "time": f"{result['seconds']:.0f} s",
    }
    lines = [f"  {label:<11}{text}" for label, text in rows.items()]
    return "\n".join(["", *lines, *(f"  {'picture':<11}{path}" for path in result["pictures"])])


def _print(text: str) -> None:
    print(text, flush=True)


COMMAND = Command(DemoConfig, run, format_result, lambda config: config.folder, resumes=True)
