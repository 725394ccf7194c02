"""Arrays as ``.npy`` files: all that numpy writes is read, and all else is named."""

import gc
import io
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.background import in_parallel
from pipeline.data.images.base import BadImage
from pipeline.data.images.npy import array

PLAIN = arrays.scalar_dtypes() | arrays.unicode_string_dtypes() | arrays.byte_string_dtypes()


def written(values: npt.NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version=(1, 0), allow_pickle=True)
    return file.getvalue()


@given(arrays.arrays(PLAIN, arrays.array_shapes(min_dims=0, min_side=0, max_side=4)), st.booleans())
def test_what_numpy_writes_is_read(values: npt.NDArray[np.generic], by_columns: bool) -> None:
    values = np.asarray(values, order="F" if by_columns else "C")
    found = array(written(values))
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert found.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([{}]), "its array holds Python objects, which would have to be unpickled"),
        (np.zeros(2, [("a", "u1"), ("b", "u1")]), "its array holds records of several fields"),
    ],
)
def test_what_is_no_array_of_numbers_or_texts_is_named(
    values: npt.NDArray[np.generic], reason: str
) -> None:
    with pytest.raises(BadImage, match=reason):
        array(written(values))


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2), }"


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (HEADER[:-1], "damaged"),
        (HEADER + " 1", "damaged"),
        ("[" * 60000, "damaged"),
        ("[1, 2, 3]", "damaged"),
        (HEADER.replace("'shape'", "'form'"), "damaged"),
        (HEADER.replace("False", "0"), "damaged"),
        (HEADER.replace("(1, 2)", "2"), "damaged"),
        (HEADER.replace("(1, 2)", "(1.0, 2)"), "damaged"),
        (HEADER.replace("(1, 2)", "(True, 2)"), "damaged"),
        (HEADER.replace("(1, 2)", "(-1, -2)"), "its shape is negative"),
        (HEADER.replace("(1, 2)", "(1, 3)"), "does not take 2 bytes"),
        (HEADER.replace("|u1", "|u1,|u1"), "'|u1,|u1' is no type"),
        (HEADER.replace("|u1", "v9999999999999"), "damaged"),
    ],
)
def test_a_damaged_header_is_named(header: str, reason: str) -> None:
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with pytest.raises(BadImage) as raised:
        array(head + bytes(2))
    assert reason in str(raised.value)


def test_python_2_wrote_shapes_of_long_integers() -> None:
    header = HEADER.replace("(1, 2)", "(1L, 2L)").encode()
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    assert array(head + b"\1\2").tolist() == [[1, 2]]


@pytest.fixture
def switching() -> Iterator[None]:
    """The collector of garbage runs all the time, and lets another thread go on when it does."""

    def switch(phase: str, about: object) -> None:
        time.sleep(1e-6)

    threshold = gc.get_threshold()
    gc.set_threshold(5)
    gc.callbacks.append(switch)
    yield
    gc.callbacks.remove(switch)
    gc.set_threshold(*threshold)


@pytest.mark.usefixtures("switching")
def test_threads_read_headers_at_the_same_time() -> None:
    """Python 3.11's own parser of Python, which numpy's reader of headers uses, fails here."""
    contents = [written(np.zeros((0, number), np.uint8)) for number in range(20_000)]
    in_parallel(array, contents, 4, "reader")
