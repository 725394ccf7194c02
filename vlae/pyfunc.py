"""A saved model behind MLflow's ``pyfunc.load_model``.

MLflow imports this module by its name; the module does not import MLflow.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vlae.factory import load


class Codes:
    """Images to codes."""

    def __init__(self, folder: str | Path) -> None:
        self.model = load(folder).float()

    def predict(
        self, model_input: npt.ArrayLike, params: Mapping[str, object] | None = None
    ) -> npt.NDArray[np.float32]:
        """The codes, (batch, latents), of images, (batch, channels, height, width).

        Pixels lie in [0, 1], as in training. ``params`` is part of MLflow's interface and unused.
        """
        images = torch.as_tensor(np.asarray(model_input), dtype=torch.float32)
        with torch.no_grad():
            return np.asarray(self.model.encoder(images).code)


def _load_pyfunc(path: str) -> Codes:
    return Codes(path)
