"""The Variational Lossy Autoencoder, in plain PyTorch.

What is named here is imported when it is first used: ``vlae.window``, for one, can be had without
loading PyTorch.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlae.factory import build, describe, load, save
    from vlae.model import VLAE, Bound
    from vlae.objective import (
        Estimate,
        SoftFreeBits,
        draw_sent,
        estimate,
        group_rates,
        training_loss,
    )
    from vlae.sampling import decode, reconstruct, sample
    from vlae.weights import EMA, flatten
    from vlae.window import Window

    __version__: str

MODULES = {
    "factory": ("build", "describe", "load", "save"),
    "model": ("VLAE", "Bound"),
    "objective": (
        "Estimate",
        "SoftFreeBits",
        "draw_sent",
        "estimate",
        "group_rates",
        "training_loss",
    ),
    "sampling": ("decode", "reconstruct", "sample"),
    "weights": ("EMA", "flatten"),
    "window": ("Window",),
}
"""The public names, by the module that holds them."""

__all__ = [  # noqa: RUF022  (in the order of the modules)
    "build",
    "describe",
    "load",
    "save",
    "VLAE",
    "Bound",
    "Estimate",
    "SoftFreeBits",
    "draw_sent",
    "estimate",
    "group_rates",
    "training_loss",
    "decode",
    "reconstruct",
    "sample",
    "EMA",
    "flatten",
    "Window",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    for module, names in MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"vlae.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """The version of the installed package; of a checkout that is not installed, ``unknown``."""
    try:
        return importlib.metadata.version("vlae-pipeline")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
