"""Add a trained run to the models that come with the package, in ``vlae/pretrained``.

    python infra/pretrained.py NAME RUN --licence TEXT --cost TEXT [OPTION=VALUE ...]

NAME is what users load it by, and RUN is the folder of a finished training run. The run's model is
measured on the test images as by ``vlae evaluate model=RUN split=test``, with further OPTIONs such
as ``bounds.samples=4096``: that can take hours, and the same command continues it. TEXT says what
the licence of the training images is, and what the training cost. Adding a model of the same name
replaces it.
"""

import argparse
import json
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save_file

from pipeline import commands
from pipeline.commands.models import evaluate
from pipeline.config.evaluation import EvaluateConfig
from pipeline.data.batch import binarize
from pipeline.data.loader import EvalLoader
from pipeline.errors import UserError
from pipeline.evaluation.estimates import estimate_split, in_batches
from pipeline.registry import card, public
from pipeline.registry.tracking import code_version
from pipeline.runs import TRAINING_FILE, Run, open_data, sha256_of_file
from pipeline.storage import open_storage
from pipeline.storage.base import to_json
from pipeline.values import is_name
from vlae import pretrained

EXAMPLES = 200
"""Test images that come with a model."""
MAX_BYTES, MAX_TOTAL = 8_000_000, 24_000_000
"""The most bytes of one model, and of all: they are part of every installation."""


def add(name: str, config: EvaluateConfig, licence: str, cost: str, command: str) -> Path:
    """Measure the model of ``config``, and write all of its files; returns their folder.

    Raises UserError if the name is none, the run has no model, or the files are too large.
    """
    if not is_name(name):
        raise UserError(f"{name} cannot be a name; use letters, digits, dots, hyphens, underscores")
    run = Run.at(config.model, config.storage.endpoint_url)
    evaluation = evaluate.run(config)
    pretrained.FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=pretrained.FOLDER, prefix=".new-") as place:
        folder = Path(place)
        run.download(folder)
        training = public.training(json.loads((folder / TRAINING_FILE).read_text()))
        (folder / TRAINING_FILE).write_bytes(to_json(training))
        write_examples(folder, run, config)
        measured = public.evaluation(evaluation)
        (folder / "evaluation.json").write_bytes(to_json(measured))
        output = open_storage(config.output, config.storage.endpoint_url)
        for picture in measured["pictures"]:
            output.download(picture, folder / picture)
        origin = {
            "code_version": code_version(),
            "date": f"{datetime.now(UTC):%d %B %Y}".lstrip("0"),
            "cost": cost,
            "command": command,
            "licence": licence,
        }
        (folder / "card.md").write_text(card.pretrained(name, training, measured, origin))
        check_sizes(name, folder)
        target = pretrained.FOLDER / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in folder.iterdir():
            shutil.copyfile(path, target / path.name)  # a temporary file is its owner's alone
    index_file = pretrained.FOLDER / pretrained.INDEX_FILE
    index = json.loads(index_file.read_text()) if index_file.exists() else {}
    index[name] = {path.name: sha256_of_file(path) for path in sorted(target.iterdir())}
    index_file.write_bytes(to_json(dict(sorted(index.items()))))
    return target


def write_examples(folder: Path, run: Run, config: EvaluateConfig) -> None:
    """Write the first test images as the model sees them, and the bounds measured of each."""
    model = run.open()
    data = open_data(model, config.dataset_url, config.storage)
    loader = EvalLoader(
        data, split=config.split, batch_size=EXAMPLES, num_images=config.bounds.num_images
    )
    x = binarize(next(iter(loader)), model.binarization, config.bounds.seed)
    output = open_storage(config.output, config.storage.endpoint_url)
    blocks = estimate_split(model, data, output, config.split, config.bounds, None)
    estimate = next(in_batches(blocks, EXAMPLES))
    save_file(
        {"images": (255 * x).round().byte(), "elbo": estimate.elbo, "iwae": estimate.iwae},
        folder / pretrained.EXAMPLES_FILE,
    )


def check_sizes(name: str, folder: Path) -> None:
    """Raise UserError if a model, or all of them with it, would make the package too large."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    others = [pretrained.FOLDER / other for other in pretrained.names() if other != name]
    total = size + sum(path.stat().st_size for each in others for path in each.iterdir())
    for what, found, most in ((name, size, MAX_BYTES), ("all models", total, MAX_TOTAL)):
        if found > most:
            raise UserError(f"{what} would take {found:,} bytes; at most {most:,} are allowed")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("run")
    parser.add_argument("--licence", required=True)
    parser.add_argument("--cost", required=True)
    parser.add_argument("options", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    run = given.run.rstrip("/")
    options = [f"model={run}", f"output={run}/pretrained", "split=test", *given.options]
    shown = " ".join(["vlae", "evaluate", f"model=pretrained/{given.name}", *given.options])
    try:
        config = commands.load("evaluate", options)
        folder = add(given.name, config, given.licence, given.cost, shown)
    except UserError as error:
        sys.exit(str(error))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size:,} bytes; users load it by vlae.load({given.name!r})")


if __name__ == "__main__":
    main(sys.argv[1:])
