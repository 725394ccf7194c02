"""A saved model as MLflow's ``pyfunc.load_model`` wants it. MLflow imports this module by its name; it does not import MLflow."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vlae.build import load


class Codes:
    """Images to codes."""

    def __init__(self, folder: str | Path) -> None:
        self.model = load(folder)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> npt.NDArray[np.float32]:
        """The code of each image, (batch, latents), of images (batch, channels, height, width): pixels in [0, 1], as in training."""
        images = torch.as_tensor(np.asarray(model_input), dtype=torch.float32)
        with torch.no_grad():
            return np.asarray(self.model.encoder(images).code)


def _load_pyfunc(path: str) -> Codes:
    return Codes(path)
