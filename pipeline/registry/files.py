"""The files of a version: its run's model and evaluation, and what is made from them."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from pipeline.config.sections import RegistryOptions
from pipeline.errors import UserError
from pipeline.registry import bom, card, signing
from pipeline.runs import EVALUATION, TRAINING_FILE, Run, load, sha256_of_file
from pipeline.storage.base import to_json
from pipeline.values import JsonObject
from vlae.files import WEIGHTS_FILE

CARD_FILE = "README.md"
PYFUNC_FILE = "MLmodel"
PYFUNC = {
    "flavors": {"python_function": {"loader_module": "vlae.pyfunc", "python_version": "3.11"}}
}
"""What MLflow's ``pyfunc.load_model`` reads: the name of the module that loads the model.

That runs whatever module a file in the bucket names, and checks nothing, so it is written only for
those who ask for it.

A version contains no code.
"""


def collect(run: Run, folder: Path) -> tuple[JsonObject, JsonObject]:
    """Download a finished run's model and evaluation into ``folder``.

    Returns the records of its training and evaluation. Raises UserError if there is no model, or
    no evaluation of it.
    """
    run.download(folder)
    load(folder)
    evaluation = run.evaluation(sha256_of_file(folder / WEIGHTS_FILE))
    if evaluation is None:
        raise UserError(
            f"the model of {run.url} has not been evaluated; `vlae registry register name=NAME"
            f" runs=[{run.url}]` does both"
        )
    run.download_pictures(evaluation, folder)
    (folder / f"{EVALUATION}.json").write_bytes(to_json(evaluation))
    return json.loads((folder / TRAINING_FILE).read_text()), evaluation


def complete(
    folder: Path,
    name: str,
    training: JsonObject,
    evaluation: JsonObject,
    tags: Mapping[str, str],
    finished: datetime,
    options: RegistryOptions,
) -> dict[str, str]:
    """Add the model card, the bill of materials, ``MLmodel`` and the signature, the last two if
    they are wanted.

    Returns the sha256 of every file in ``folder``.
    """
    (folder / CARD_FILE).write_text(card.text(name, training, evaluation, tags))
    if options.pyfunc:
        (folder / PYFUNC_FILE).write_text(json.dumps(PYFUNC, indent=2) + "\n")
    materials = bom.make(
        name, training, evaluation, tags, _checksums(folder), finished, options.license
    )
    (folder / bom.BOM_FILE).write_bytes(to_json(materials))
    signing.sign(folder)
    return _checksums(folder)


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
