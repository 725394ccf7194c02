"""Models that come with the package: ``vlae.load("mnist")``.

Each has a folder beside this file with its weights, the record of its training, its figures on test
images, some of these images, pictures, and a card, ``card.md``. ``index.json`` holds the sha256 of
every file, by model.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent
INDEX_FILE = "index.json"
EXAMPLES_FILE = "examples.safetensors"
"""Of test images: ``images``, (count, channels, height, width), uint8 from 0 to 255, black or white
if the model sees them so; and the ``elbo`` and ``iwae`` that were measured of each, in nats."""


def names() -> list[str]:
    """The names of all pretrained models."""
    return sorted(_index())


def folder(name: str) -> Path:
    """The folder of a pretrained model, whose files are whole.

    Raises ValueError if there is no model of this name, or a file is missing or damaged.
    """
    index = _index()
    if name not in index:
        raise ValueError(f"there is no pretrained model {name!r}; {listed()}")
    for file, expected in index[name].items():
        path = FOLDER / name / file
        if not path.is_file():
            raise ValueError(f"{path} is missing; install vlae-pipeline again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ValueError(f"{path} is damaged; install vlae-pipeline again")
    return FOLDER / name


def examples(name: str) -> "Tensor":
    """Test images as the model sees them, for a first look: (count, channels, height, width).

    Pixels lie in [0, 1]. Raises ValueError as ``folder`` does.
    """
    from safetensors.torch import load_file

    return load_file(folder(name) / EXAMPLES_FILE)["images"].float() / 255


def listed() -> str:
    """A sentence, or the end of one, that lists the pretrained models."""
    known = ", ".join(names())
    return f"the pretrained models are: {known}" if known else "this version has no pretrained ones"


def _index() -> dict[str, dict[str, str]]:
    index: dict[str, dict[str, str]] = json.loads((FOLDER / INDEX_FILE).read_text())
    return index
