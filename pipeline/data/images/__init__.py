"""Image files and arrays: their headers, their pixels, and how they are resized."""

from pipeline.data.images.base import MAX_PIXELS, BadImage, Fit, Pixels
from pipeline.data.images.files import (
    EXTENSIONS,
    FORMATS,
    convert,
    decode,
    decode_all,
    encode,
    measure,
    resize,
)
from pipeline.data.images.npy import array, pixels_of_array
from pipeline.data.images.scaling import FILTER, METHOD, library

__all__ = [
    "EXTENSIONS",
    "FILTER",
    "FORMATS",
    "MAX_PIXELS",
    "METHOD",
    "BadImage",
    "Fit",
    "Pixels",
    "array",
    "convert",
    "decode",
    "decode_all",
    "encode",
    "library",
    "measure",
    "pixels_of_array",
    "resize",
]
