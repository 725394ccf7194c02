"""The Variational Lossy Autoencoder, in plain PyTorch."""

from vlae.build import build, describe, load, save
from vlae.model import VLAE, Bound
from vlae.objective import Estimate, SoftFreeBits, estimate, group_rates, training_loss
from vlae.sampling import reconstruct, sample
from vlae.weights import EMA, flatten
from vlae.window import Window

__all__ = [
    "EMA",
    "VLAE",
    "Bound",
    "Estimate",
    "SoftFreeBits",
    "Window",
    "build",
    "describe",
    "estimate",
    "flatten",
    "group_rates",
    "load",
    "reconstruct",
    "sample",
    "save",
    "training_loss",
]
