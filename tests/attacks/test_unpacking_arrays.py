"""Small files of arrays that unpack to gigabytes are read only as far as their headers allow."""

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.pipeline.images import idx_bytes, write_idx

READ = """
import json, resource, sys
from pathlib import Path
import pyarrow.parquet
from pipeline.config.sections import DatasetOptions, ShardOptions, Source
from pipeline.data.sources import open_source
from pipeline.errors import UserError

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
for path in map(Path, sys.argv[1:]):
    kind = path.name.partition("-")[0]
    try:
        source = open_source(
            DatasetOptions(name="x", source=Source[kind], path=str(path)), ShardOptions()
        )
        source.prepare()
        images = [source.read(split, 0, 16)[0].shape for split in source.splits]
        outcome = f"read {sum(source.splits.values())} images, {source.num_classes} classes"
    except UserError as error:
        outcome = f"error: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    print(json.dumps([path.name, outcome]), flush=True)
"""
"""Reads each data set with 1 GB of memory more than the imports took, and prints the outcome."""


GIGABYTES = gzip.compress(bytes(1 << 26), 1) * 24
"""Zeros that take a hundredth of their size: the members of a gzip file follow one another."""


def idx(folder: Path, name: str, content: bytes) -> None:
    """The four files of IDX, with this ``name`` in place of one of them."""
    write_idx(folder)
    (folder / name.removesuffix(".gz")).unlink()
    (folder / name).write_bytes(content)


def idx_with_more_than_its_header_says(path: Path) -> None:
    idx(
        path,
        "train-images-idx3-ubyte.gz",
        gzip.compress(idx_bytes(np.zeros((60, 5, 4)))) + GIGABYTES,
    )


def idx_labels_with_more_than_their_header_says(path: Path) -> None:
    idx(
        path,
        "t10k-labels-idx1-ubyte.gz",
        gzip.compress(idx_bytes(np.zeros(10))) + GIGABYTES,
    )


def idx_as_large_as_its_header_says(path: Path) -> None:
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (1536, 1 << 10, 1 << 10))
    idx(
        path,
        "train-images-idx3-ubyte.gz",
        gzip.compress(header) + GIGABYTES,
    )


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def npz_whose_header_says_a_terabyte(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", npy_header((1 << 20, 1 << 10, 1 << 10)) + bytes(1000))


def npz_whose_labels_are_a_terabyte(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", npy_header((9, 4, 4)) + bytes(9 * 4 * 4))
        archive.writestr("labels.npy", npy_header((1 << 37,), "<i8") + bytes(1000))


def npz_that_unpacks_to_gigabytes(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("images.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy_header((1536, 1 << 10, 1 << 10)))
        for _ in range(96):
            member.write(bytes(1 << 24))


def png(size: int = 0) -> bytes:
    """A PNG of 4 x 4 pixels, and as many bytes behind it, which decoders skip."""
    file = io.BytesIO()
    Image.new("L", (4, 4), 9).save(file, "png")
    # Some are random: a file of fewer bytes than rows would be refused for that.
    return file.getvalue() + np.random.default_rng(0).bytes(1 << 12) + bytes(size)


def write_parquet(path: Path, **columns: object) -> None:
    """Columns whose repeated values are stored once."""
    pq.write_table(
        pa.table(columns),
        path,
        compression="zstd",
        dictionary_pagesize_limit=1 << 30,
        store_schema=False,
    )


def repeated(value: bytes | str) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays([0] * 400, pa.array([value]))


def parquet_with_one_large_image_in_all_rows(path: Path) -> None:
    write_parquet(path, image=repeated(png(4 << 20)))


def parquet_with_one_large_label_in_all_rows(path: Path) -> None:
    write_parquet(path, image=repeated(png()), label=repeated("x" * (4 << 20)))


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "idx-more": (
        idx_with_more_than_its_header_says,
        "its header says (60, 5, 4), but more than 1200 bytes of data follow",
    ),
    "idx-labels": (
        idx_labels_with_more_than_their_header_says,
        "its header says (10,), but more than 10 bytes of data follow",
    ),
    "idx-large": (idx_as_large_as_its_header_says, "train-images-idx3-ubyte.gz: it does not fit"),
    "npz-terabyte.npz": (npz_whose_header_says_a_terabyte, "images.npy says that it holds"),
    "npz-labels.npz": (npz_whose_labels_are_a_terabyte, "labels.npy says that it holds"),
    "npz-large.npz": (npz_that_unpacks_to_gigabytes, "its arrays do not fit in memory"),
    "parquet-images.parquet": (
        parquet_with_one_large_image_in_all_rows,
        "read 400 images, None classes",
    ),
    "parquet-labels.parquet": (
        parquet_with_one_large_label_in_all_rows,
        "read 400 images, None classes",
    ),
}
"""How each file is made, and what is said of it."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What reading each of them gave, in one process."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, (make, _) in CASES.items():
        make(folder / name)
    done = subprocess.run(
        [sys.executable, "-c", READ, *(str(folder / name) for name in CASES)],
        # Other allocators reserve more addresses than they use.
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(sys.path), "ARROW_DEFAULT_MEMORY_POOL": "system"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", CASES)
def test_a_small_file_is_unpacked_no_further_than_its_header_allows(
    name: str, outcomes: dict[str, str]
) -> None:
    expected = CASES[name][1]
    assert expected in outcomes[name]
    assert outcomes[name].startswith("read" if expected.startswith("read") else "error")
