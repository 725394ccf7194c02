"""The files of a version: its run's model and evaluation, a model card, and ``MLmodel``."""

import json
from pathlib import Path

from pipeline.errors import UserError
from pipeline.runs import EVALUATION, TRAINING_FILE, Run, load, sha256_of_file
from pipeline.values import JsonObject
from vlae.factory import WEIGHTS_FILE

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
    for picture in evaluation["pictures"]:
        file = picture.rpartition("/")[2]
        run.storage.download(f"{EVALUATION}/{file}", folder / file)
    (folder / f"{EVALUATION}.json").write_text(json.dumps(evaluation, indent=1) + "\n")
    return json.loads((folder / TRAINING_FILE).read_text()), evaluation


def complete(folder: Path, card: str, pyfunc: bool) -> dict[str, str]:
    """Write the model card, and with ``pyfunc`` also ``MLmodel``.

    Returns the sha256 of every file in ``folder``.
    """
    (folder / CARD_FILE).write_text(card)
    if pyfunc:
        (folder / PYFUNC_FILE).write_text(json.dumps(PYFUNC, indent=2) + "\n")
    return {path.name: sha256_of_file(path) for path in sorted(folder.iterdir())}
