"""Images as arrays: ``.npy`` files, of which nothing is unpickled."""

import json
import re
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.images.base import BadImage, Pixels, reason


def array(content: bytes | memoryview) -> npt.NDArray[Any]:
    """The array of an ``.npy`` file, a read-only view of its bytes. Raises ``BadImage``.

    Nothing is unpickled.
    """
    length = 10 + int.from_bytes(content[8:10], "little")  # of the header, in version 1.0
    if bytes(content[:8]) != b"\x93NUMPY\x01\x00" or len(content) < length:
        raise BadImage("it is not an .npy file of version 1.0")
    shape, fortran, dtype = _npy_header(bytes(content[10:length]))
    count = int(np.prod(shape, dtype=object))  # object: Python's integers do not overflow
    if len(content) - length != count * dtype.itemsize:
        raise BadImage(
            f"its array of shape {shape} and type {dtype} does not take {len(content) - length}"
            " bytes"
        )
    flat = np.frombuffer(content, dtype, count, offset=length)
    return flat.reshape(shape, order="F" if fortran else "C")


_JSON = (
    (r"[(]", "["),
    (r"[)]", "]"),
    (r"'", '"'),
    (r"\bTrue\b", "true"),
    (r"\bFalse\b", "false"),
    (r"(\d)L\b", r"\1"),  # Python 2's integers
    (r",\s*([]}])", r"\1"),
)
"""What makes JSON of a header, a Python dictionary of plain values, in the order of replacing."""


@lru_cache(maxsize=256)  # all records of a data set have the same few
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    # Not numpy's reader: Python 3.11 parses no Python in two threads at once (SystemError, "AST
    # constructor recursion depth mismatch"), and others' threads may parse some at any time.
    try:
        text = header.decode("latin-1")
        for pattern, replacement in _JSON:
            text = re.sub(pattern, replacement, text)
        values = json.loads(text)
        kind, fortran, shape = values["descr"], values["fortran_order"], values["shape"]
        if len(values) != 3 or type(fortran) is not bool or {*map(type, shape)} - {int}:
            raise ValueError("its values are not a type, an order and a shape")
        if not isinstance(kind, str):
            raise BadImage("its array holds records of several fields")
        if not re.fullmatch(r"[<>|=]?[?A-Za-z]\d*(\[\w+\])?", kind):
            raise ValueError(f"{kind!r} is no type")
        dtype = np.dtype(kind)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadImage(f"its .npy header is damaged ({reason(error)})") from None
    if dtype.hasobject:
        raise BadImage("its array holds Python objects, which would have to be unpickled")
    if min(shape, default=0) < 0:
        raise BadImage("its shape is negative")
    return tuple(shape), fortran, dtype


def pixels_of_array(content: bytes | memoryview) -> Pixels:
    """The pixels ``(height, width, 1 or 3)`` of an ``.npy`` file. Raises ``BadImage``.

    Its array is uint8, of shape height x width, height x width x channels, or channels x height x
    width.
    """
    found = array(content)
    if found.dtype != np.uint8 or found.ndim not in (2, 3):
        raise BadImage(
            f"its array is {found.dtype} of shape {found.shape}, but an image is uint8 in 2 or 3"
            " dimensions"
        )
    if found.ndim == 2:
        found = found[:, :, None]
    elif found.shape[2] not in (1, 3):
        found = found.transpose(1, 2, 0)
    if found.shape[2] not in (1, 3) or not found.size:
        raise BadImage(
            f"its array has shape {found.shape}, where none of the dimensions is 1 or 3 channels,"
            " or it is empty"
        )
    return np.ascontiguousarray(found)
