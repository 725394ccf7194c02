"""The Variational Lossy Autoencoder, in plain PyTorch."""

from vlae.build import build, load, save
from vlae.flat import flatten
from vlae.free_bits import SoftFreeBits
from vlae.model import VLAE, Bound
from vlae.objective import Estimate, estimate, group_rates, training_loss
from vlae.sampling import reconstruct, sample
from vlae.weights import EMA
from vlae.window import Window

__all__ = [
    "EMA",
    "VLAE",
    "Bound",
    "Estimate",
    "SoftFreeBits",
    "Window",
    "build",
    "estimate",
    "flatten",
    "group_rates",
    "load",
    "reconstruct",
    "sample",
    "save",
    "training_loss",
]
