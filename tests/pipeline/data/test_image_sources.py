"""Sources: tars, WebDataset shards, Parquet files and .npz arrays, intact and damaged."""

import io
import tarfile
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import sections
from pipeline.config.sections import DatasetOptions, ShardOptions
from pipeline.data.images import BadImage, decode, encode
from pipeline.data.sources import open_source
from pipeline.data.sources.base import ImageSource
from pipeline.errors import UserError
from tests.pipeline.images import write_images

SIZE = 6


def pixels(number: int) -> np.ndarray:
    """The image of a number: all its bytes are that number."""
    return np.full((SIZE, SIZE, 3), number, dtype=np.uint8)


def opened(kind: str, path: Path, **options: Any) -> ImageSource:
    return open_source(
        DatasetOptions(name="x", source=sections.Source[kind], path=str(path)),
        ShardOptions(channels=3, **options),
    )


def content(source: ImageSource) -> dict[str, dict[int, int]]:
    """By split, the label of every image, which is named by its pixels."""
    found = {}
    for split, count in source.splits.items():
        images, labels = source.read(split, 0, count)
        assert (images == images[:, :1, :1, :1]).all()
        found[split] = dict(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))
    return found


def check(source: ImageSource, num_classes: int) -> dict[str, dict[int, int]]:
    """All of 90 images are there, each with its label, in three splits."""
    found = content(source)
    together = {number: label for labels in found.values() for number, label in labels.items()}
    assert together == {number: number % num_classes for number in range(90)}
    assert source.num_classes == num_classes
    assert source.image_shape == (3, SIZE, SIZE)
    assert min(source.splits.values()) > 0
    return found


def write_tar(path: Path, names: list[str], start: int = 0) -> None:
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names, start):
            data = encode(pixels(number), "png")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_webdataset(path: Path, numbers: range, **changes: Any) -> None:
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for number in numbers:
            label = str(number % 3).encode()
            sample = {
                "__key__": f"a/{number:04d}",
                "png": encode(pixels(number), "png"),
                "cls": label,
                "txt": b"a note",
            }
            writer.write(sample | changes)


def write_parquet(path: Path, numbers: range, row_group: int = 7, **columns: Any) -> None:
    images = [
        {"bytes": encode(pixels(number), "png"), "path": f"{number}.png"} for number in numbers
    ]
    table = pa.table({"image": images, "label": [number % 5 for number in numbers], **columns})
    pq.write_table(table, path, row_group_size=row_group)


@pytest.mark.parametrize("prefix", ["", "images/train/", "./"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_of_class_folders(
    tmp_path: Path, prefix: str, form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tarfile.TarFile, "format", form)
    long = "b" * 120 if form != tarfile.USTAR_FORMAT else "b"  # longer than a header's field
    write_tar(
        tmp_path / "x.tar",
        [f"{prefix}{('a', long, 'c')[number % 3]}/{number:02d}.png" for number in range(90)],
    )
    found = check(opened("tar", tmp_path / "x.tar"), 3)
    assert list(found["train"]) != sorted(found["train"])  # mixed


def test_a_folder_and_a_tar_of_it_are_split_alike(tmp_path: Path) -> None:
    write_images(
        tmp_path / "folder",
        [f"{number % 3}/{number}.png" for number in range(90)],
        size=(SIZE, SIZE),
    )
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "folder", arcname="top")
    read = [
        {split: source.read(split, 0, count) for split, count in source.splits.items()}
        for source in (opened("folder", tmp_path / "folder"), opened("tar", tmp_path / "x.tar"))
    ]
    for split, (images, labels) in read[0].items():
        np.testing.assert_array_equal(images, read[1][split][0])
        np.testing.assert_array_equal(labels, read[1][split][1])


def test_webdataset_shards_keep_their_order(tmp_path: Path) -> None:
    for number in range(3):
        write_webdataset(tmp_path / f"{number}.tar", range(number * 30, number * 30 + 30))
    found = check(opened("webdataset", tmp_path), 3)
    assert list(found["train"]) == sorted(found["train"])


def test_parquet_files_are_split_by_hash_or_as_they_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data.parquet", range(90))
    one = check(opened("parquet", tmp_path / "data.parquet"), 5)
    assert list(one["train"]) == sorted(one["train"])
    named = tmp_path / "named"
    named.mkdir()
    for name, numbers in (
        ("train-00000-of-00002", range(40)),
        ("train-00001-of-00002", range(40, 70)),
        ("test", range(70, 90)),
    ):
        write_parquet(named / f"{name}.parquet", numbers)
    found = check(opened("parquet", named), 5)
    assert set(found["test"]) == set(range(70, 90))
    assert set(found["train"]) | set(found["valid"]) == set(range(70))


def test_parquet_columns_may_have_other_names_and_plain_bytes(tmp_path: Path) -> None:
    images = [encode(pixels(number), "png") for number in range(90)]
    pq.write_table(
        pa.table({"picture": images, "fine": [n % 5 for n in range(90)]}), tmp_path / "x.parquet"
    )
    check(opened("parquet", tmp_path / "x.parquet", image_column="picture", label_column="fine"), 5)
    assert opened("parquet", tmp_path / "x.parquet").num_classes is None  # nobody calls it a label
    with pytest.raises(
        UserError,
        match=r"x\.parquet has no column 'image', only fine, picture; set shard\.image_column",
    ):
        opened("parquet", tmp_path / "x.parquet", image_column="image")
    with pytest.raises(UserError, match=r"no file in .* has the column shard\.label_column=coarse"):
        opened("parquet", tmp_path / "x.parquet", label_column="coarse")
    write_parquet(tmp_path / "x.parquet", range(90), extra=["b", "a", None] * 30, weight=[0.5] * 90)
    named = opened("parquet", tmp_path / "x.parquet", label_column="extra")
    assert (named.class_names, named.num_classes, named.account.unlabelled) == (["a", "b"], 2, 30)
    with pytest.raises(UserError, match=r"the label of row 0 is 0\.5, which is neither"):
        opened("parquet", tmp_path / "x.parquet", label_column="weight")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(UserError, match=r"x\.parquet cannot be read as Parquet"):
        opened("parquet", tmp_path / "x.parquet")


@pytest.mark.parametrize("layout", ["images", "keras", "medmnist", "channels first"])
def test_arrays_under_their_usual_names(tmp_path: Path, layout: str) -> None:
    images, labels = np.stack([pixels(number) for number in range(90)]), np.arange(90) % 4
    if layout == "images":
        arrays = {"images": images, "labels": labels}
    elif layout == "channels first":
        arrays = {"images": images.transpose(0, 3, 1, 2), "labels": labels}
    elif layout == "keras":
        arrays = {
            "x_train": images[:70],
            "y_train": labels[:70],
            "x_test": images[70:],
            "y_test": labels[70:, None],
        }
    else:
        parts = {"train": slice(50), "val": slice(50, 70), "test": slice(70, 90)}
        arrays = {f"{n}_images": images[p] for n, p in parts.items()} | {
            f"{n}_labels": labels[p, None] for n, p in parts.items()
        }
    np.savez(tmp_path / "x.npz", **arrays)
    source = opened("npz", tmp_path / "x.npz")
    found = check(source, 4)
    if layout in ("keras", "medmnist"):
        assert set(found["test"]) == set(range(70, 90))
    np.savez(tmp_path / "x.npz", images=images)
    assert opened("npz", tmp_path / "x.npz").num_classes is None


def test_wrong_arrays_are_named(tmp_path: Path) -> None:
    images = np.zeros((9, 4, 4), np.uint8)
    for arrays, message in (
        ({"pictures": images}, "has no training images: it holds pictures"),
        ({}, "it holds no array"),
        ({"images": images[:0]}, "holds no images for train"),
        ({"images": images[:1]}, "has 1 images for train and test"),
        ({"images": images.astype("U1")}, "its images are <U1, not numbers"),
        ({"images": images + 0.5j}, "its images are complex128, not numbers"),
        ({"images": images - 0.5}, "float64 with values from -0.5 to -0.5"),
        ({"images": images + 300.5}, "float64 with values from 300.5"),
        ({"images": images + np.nan}, "float64 with values from nan"),
        ({"images": images.astype(np.int16) - 1}, "int16 with values from -1"),
        ({"images": images.astype(np.uint16) + 4095}, "uint16 with values from 4095"),
        ({"images": np.zeros((9, 4, 4, 7), np.uint8)}, r"have the shape \(9, 4, 4, 7\)"),
        ({"images": np.zeros((9, 16), np.uint8)}, r"have the shape \(9, 16\)"),
        ({"images": images, "x_test": np.zeros((9, 4, 5), np.uint8)}, "test \\(4, 5\\)"),
        ({"images": images, "labels": np.zeros(8, int)}, "9 images for train need as many labels"),
        ({"images": images, "labels": np.zeros((9, 2))}, r"these have the shape \(9, 2\)"),
        ({"images": images, "labels": np.full(9, 0.5)}, "neither a whole number nor a name"),
        ({"images": images, "labels": np.array([{}] * 9)}, "labels.npy holds Python objects"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            opened("npz", tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="cannot read"):
        opened("npz", tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("u1", 1), ("i2", 1), ("i8", 1), ("u4", 1), ("f4", 1), ("f8", 1),
        ("f2", 1 / 255), ("f4", 1 / 255), ("f8", 1 / 255), ("u2", 257), (">u2", 257), ("i4", 257),
    ],
)  # fmt: skip
def test_values_of_any_type_become_the_same_bytes(tmp_path: Path, kind: str, factor: float) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 5, 3))
    images[0, 0, 0], images[0, 0, 1] = 0, 255
    np.savez(tmp_path / "plain.npz", images=images.astype(np.uint8))
    np.savez_compressed(tmp_path / "other.npz", images=np.multiply(images, factor).astype(kind))
    plain, other = (opened("npz", tmp_path / f"{name}.npz") for name in ("plain", "other"))
    assert plain.description == other.description


@pytest.mark.parametrize("kind", ["?", "u1", "i8", "f4"])
def test_zeros_and_ones_are_black_and_white(tmp_path: Path, kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 2, (60, 4, 4))
    np.savez(tmp_path / "x.npz", images=images.astype(kind))
    found = opened("npz", tmp_path / "x.npz").read("train", 0, 60)[0]
    assert set(np.unique(found)) == {0, 255}


@pytest.mark.parametrize(
    ("labels", "numbers", "names"),
    [
        (["b", "a", "c"], [1, 0, 2], ["a", "b", "c"]),
        ([b"b", b"a", b""], [1, 0, -1], ["a", "b"]),
        ([2, 0, -1], [2, 0, -1], None),
        ([1.0, 0.0, np.nan], [1, 0, -1], None),
        ([True, False, True], [1, 0, 1], None),
        ([0, 0, 0], [0, 0, 0], None),
        ([1 << 40, 5, -3], [2, 1, 0], ["-3", "5", str(1 << 40)]),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, labels: list[Any], numbers: list[int], names: list[str] | None
) -> None:
    images = np.stack([pixels(number) for number in range(90)])
    for shape in ((90,), (90, 1)):
        repeated = np.array(labels * 30).reshape(shape)
        np.savez(tmp_path / "x.npz", images=images, labels=repeated, meta=[1])
        source = opened("npz", tmp_path / "x.npz")
        found = {
            number: label for part in content(source).values() for number, label in part.items()
        }
        assert found == {number: numbers[number % 3] for number in range(90)}
        assert source.class_names == names
        assert source.num_classes == (len(names) if names else max(numbers) + 1)
        assert source.account.unlabelled == 30 * numbers.count(-1)
        assert source.account.notes == ["arrays that are not used: meta"]


def test_a_few_arrays_fill_every_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", X=np.stack([pixels(number) for number in range(3)]))
    source = opened("npz", tmp_path / "x.npz", valid_fraction=0.01, test_fraction=0.01)
    assert source.splits == {"train": 1, "valid": 1, "test": 1}
    assert "one image" in source.account.origins["test"]


def test_images_that_are_added_move_none_to_another_split(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "0.tar", range(60))
    before = content(opened("webdataset", tmp_path))
    write_webdataset(tmp_path / "1.tar", range(60, 90))
    after = content(opened("webdataset", tmp_path))
    for split in before:
        assert before[split].items() <= after[split].items()


def test_a_tar_that_is_cut_anywhere_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [f"a/{number}.png" for number in range(4)])
    whole = (tmp_path / "x.tar").read_bytes()
    for size in (*range(0, 512 * 8, 512), 700, 1800):  # between two members too
        (tmp_path / "x.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x\.tar is not a whole tar archive: it ends at byte"):
            opened("tar", tmp_path / "x.tar")


def test_an_image_is_fitted_to_a_size() -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200
    content = encode(wide, "webp")
    crop, pad, stretch = (decode(content, 3, (10, 10), fit) for fit in ("crop", "pad", "stretch"))  # type: ignore[arg-type]
    assert (crop[:, 2:-2] > 190).all()
    assert (pad[0] == 255).all()
    assert (pad[5, 4:6] > 190).all()
    assert (pad[5, 0] < 10).all()  # the filter rings a little
    assert (stretch[:, 0] < 10).all()
    assert (stretch[:, 4:6] > 190).all()
    assert decode(encode(wide[..., :1], "png"), 3).shape == (20, 40, 3)
    np.testing.assert_array_equal(decode(content, 3), wide)


def test_a_picture_that_lies_on_its_side_is_stood_up() -> None:
    from pipeline.data.images import measure

    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), 3).shape == (8, 4, 3)
    assert measure(file.getvalue())[:2] == (8, 4)
    with pytest.raises(BadImage, match="it is not an image in a format known here"):
        measure(
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
        )  # would be given to another program


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.floats(0, 1), st.binary(min_size=1, max_size=8), st.booleans())
def test_a_parquet_file_with_any_bytes_in_it_is_read_or_refused(
    at: float, change: bytes, cut: bool
) -> None:
    whole = small_parquet()
    place = int(at * len(whole))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "x.parquet").write_bytes(
            whole[:place] if cut else whole[:place] + change + whole[place + len(change) :]
        )
        try:
            source = opened("parquet", Path(folder))
            for split, count in source.splits.items():
                list(source.examine(split, 0, count))
        except UserError:
            pass


def test_a_parquet_file_that_boasts_of_rows_is_refused_before_they_are_listed(
    tmp_path: Path,
) -> None:
    def number_of_rows(count: int) -> bytes:
        """Thrift: the next field, a 64-bit integer, zigzag, in groups of seven bits."""
        digits = [2 * count >> shift & 127 for shift in range(0, (2 * count).bit_length(), 7)]
        return bytes([0x16, *(digit | 128 for digit in digits[:-1]), digits[-1]])

    whole = small_parquet()
    size = int.from_bytes(whole[-8:-4], "little")
    body, footer = whole[: -8 - size], whole[-8 - size : -8]
    forged = footer.replace(number_of_rows(24), number_of_rows(10**12), 1)
    (tmp_path / "x.parquet").write_bytes(
        body + forged + len(forged).to_bytes(4, "little") + whole[-4:]
    )
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == 10**12
    with pytest.raises(
        UserError,
        match=(
            r"x\.parquet cannot be read as Parquet \(it is said to have 1000000000000 rows, but has"
        ),
    ):
        opened("parquet", tmp_path)


@lru_cache
def small_parquet() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_parquet(Path(folder, "x"), range(24))
        return Path(folder, "x").read_bytes()
