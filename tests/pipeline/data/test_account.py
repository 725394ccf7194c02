"""Everything that a source finds is used or passed over, whatever lies in a folder or a tar."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config.sections import DatasetOptions, ShardOptions, Source
from pipeline.data.images import EXTENSIONS, BadImage
from pipeline.data.sources import open_source
from pipeline.data.sources.account import format_account
from pipeline.data.sources.base import ImageSource
from pipeline.data.sources.listing import Candidate, Listing
from pipeline.data.sources.names import split_of_file
from pipeline.errors import UserError
from tests.pipeline.images import write_images

NAMES = st.sampled_from(
    ["a.png", "B.PNG", "c.jfif", "notes.txt", ".hidden.png", "none", "d\udce9.png"]
)
FOLDERS = st.sampled_from(["", "cat", "dog", "train", "val", "test", ".git", "cat/deep"])
KINDS = st.sampled_from(
    ["image", "image", "image", "damaged", "link", "broken", "loop", "fifo", "folder link"]
)
TREES = st.lists(st.tuples(FOLDERS, NAMES, KINDS), max_size=25)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    colour = (number % 256, number // 256, 7)
    Image.new("RGB", (5, 4), colour).save(file, "PNG")
    return file.getvalue()


def opened(kind: Source, path: Path, **options: Any) -> ImageSource:
    options = {"image_size": 4} | options
    return open_source(
        DatasetOptions(name="x", source=kind, path=str(path)), ShardOptions(**options)
    )


def plant(root: Path, tree: list[tuple[str, str, str]]) -> None:
    """Make the files, links and pipes of a tree; the first of several with one name stays."""
    root.mkdir()
    (root / "target.bin").write_bytes(picture(999))
    for number, (folder, name, kind) in enumerate(tree):
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            continue
        if kind == "image":
            path.write_bytes(picture(number))
        elif kind == "damaged":
            path.write_bytes(b"no image")
        elif kind == "link":
            path.symlink_to(root / "target.bin")
        elif kind == "broken":
            path.symlink_to(root / "nowhere")
        elif kind == "loop":
            path.symlink_to(path.parent, target_is_directory=True)
        elif kind == "fifo":
            os.mkfifo(path)
        elif not (root / "elsewhere").exists():
            (root.parent / "elsewhere").mkdir(exist_ok=True)
            (root.parent / "elsewhere" / "e.png").write_bytes(picture(7))
            path.symlink_to(root.parent / "elsewhere", target_is_directory=True)


def names_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """All names but those of folders, as a person would count them."""
    above = (*above, os.path.realpath(folder))
    for name in os.listdir(folder):
        path = folder / name
        if os.path.isdir(path) and os.path.realpath(path) not in above:
            yield from names_below(path, above)
        else:
            yield str(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TREES)
def test_whatever_lies_in_a_folder_is_used_or_passed_over(tree: list[tuple[str, str, str]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "images")
        plant(root, tree)
        try:
            source = opened(Source.folder, root)
        except UserError:
            return
        everything = list(names_below(root))
        assert source.account.found == len(everything)
        used = {
            name
            for split, count in source.splits.items()
            for name in source.names(split, 0, count) or []
        }
        assert len(used) == source.account.used == sum(source.splits.values())
        for name in everything:
            shown = os.path.relpath(name, root)
            is_image = (
                name.lower().endswith(EXTENSIONS)
                and os.path.isfile(name)
                and not any(part.startswith(".") for part in shown.split("/"))
            )
            assert (shown in used) == is_image
        source.prepare()
        for split, count in source.splits.items():
            for name, (pixels, _) in zip(
                source.names(split, 0, count) or [], source.examine(split, 0, count), strict=True
            ):
                content = (root / name).read_bytes()
                if isinstance(pixels, BadImage):
                    assert content == b"no image"
                else:
                    expected = np.asarray(Image.open(io.BytesIO(content)))[0, 0]
                    assert (pixels == expected[: pixels.shape[2]]).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["a/1.png", "./a/2.PNG", "b/3.png", "b/.x.png", "b/notes.txt", "4.png"]
            ),
            st.sampled_from(["file", "file", "hard", "link", "folder", "fifo"]),
            st.sampled_from(["a/1.png", "1.png", "../b/3.png", "nowhere"]),
        ),
        max_size=12,
    ),
    st.integers(0, 3),
)
def test_whatever_is_in_a_tar_is_used_or_passed_over_or_named(
    members: list[tuple[str, str, str]], tail: int
) -> None:
    types = {"hard": tarfile.LNKTYPE, "link": tarfile.SYMTYPE, "folder": tarfile.DIRTYPE}
    types |= {"fifo": tarfile.FIFOTYPE}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "x.tar")
        with tarfile.open(path, "w") as archive:
            for number, (name, kind, target) in enumerate(members):
                member, content = tarfile.TarInfo(name), picture(number)
                if kind == "file":
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                else:
                    member.type, member.linkname = types[kind], target
                    archive.addfile(member)
        whole = path.read_bytes()
        path.write_bytes(whole + b"\0" * 512 * tail)
        try:
            source = opened(Source.tar, path)
        except UserError:
            return
        assert source.account.found == sum(kind != "folder" for _, kind, _ in members)
        path.write_bytes(whole + b"\0" * 512 * tail + b"more")
        with pytest.raises(UserError, match="there is data behind its end"):
            opened(Source.tar, path)


def test_links_in_a_tar_are_the_images_that_they_lead_to(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for number in range(60):
            member, content = tarfile.TarInfo(f"{'ab'[number % 2]}/{number}.png"), picture(number)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind, target in (
            ("a/hard.png", tarfile.LNKTYPE, "b/1.png"),
            ("b/soft.png", tarfile.SYMTYPE, "../a/2.png"),
            ("b/gone.png", tarfile.SYMTYPE, "../a/gone.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    source = opened(Source.tar, tmp_path / "x.tar")
    source.prepare()
    colours = {
        name: pixels[0, 0].tolist()
        for split, count in source.splits.items()
        for name, (pixels, _) in zip(
            source.names(split, 0, count) or [], source.examine(split, 0, count), strict=True
        )
        if not isinstance(pixels, BadImage)
    }
    assert colours["a/hard.png"] == colours["b/1.png"] == [1, 0, 7]
    assert colours["b/soft.png"] == colours["a/2.png"] == [2, 0, 7]
    assert source.account.passed_over == {"link that leads to no image in its tar": 1}


def test_folders_named_after_splits_are_these_and_the_classes_lie_below(tmp_path: Path) -> None:
    names = [
        f"{split}/{kind}/{number}.png"
        for split in ("Training", "val")
        for kind in ("cat", "dog")
        for number in range(30)
    ]
    write_images(tmp_path / "x", names)
    source = opened(Source.folder, tmp_path / "x")
    assert source.class_names == ["cat", "dog"]
    assert source.splits["valid"] == 60
    assert source.splits["train"] + source.splits["test"] == 60
    assert source.account.origins == {
        "train": "folder",
        "valid": "folder",
        "test": "hash of the key",
    }
    write_images(tmp_path / "x", ["extra/1.png"])
    with pytest.raises(UserError, match=r"folders of splits .* and, beside them, extra; move"):
        opened(Source.folder, tmp_path / "x")
    (tmp_path / "x/extra/1.png").unlink()
    (tmp_path / "around/images").mkdir(parents=True)
    (tmp_path / "x").rename(tmp_path / "around/images/x")
    wrapped = opened(Source.folder, tmp_path / "around")
    assert wrapped.class_names == source.class_names
    assert wrapped.account.origins == source.account.origins
    # A class may be called test, if nothing is called train.
    write_images(tmp_path / "y", [f"{kind}/{n}.png" for kind in ("test", "cat") for n in range(9)])
    assert opened(Source.folder, tmp_path / "y").class_names == ["cat", "test"]


@pytest.mark.parametrize(
    ("names", "classes", "splits"),
    [
        (["all/cat/{}.png", "all/dog/{}.png"], ["cat", "dog"], None),
        (["all/{}.png"], [], None),
        (["cat/{}.png", "cat/more/{}.png"], ["cat"], None),
        (["a/b/cat/{}.png", "a/b/cat/c/d/{}.png"], ["cat"], None),
        (["train/cat/{}.png", "train/dog/{}.png"], ["cat", "dog"], ["train"]),
        (["all/train/{}.png", "all/val/{}.png"], [], ["train", "valid"]),
        (["a/train/{}.png", "b/train/{}.png", "b/test/{}.png"], ["a", "b"], ["train", "test"]),
        (["cat/train/{}.png", "cat/test/{}.png"], [], ["train", "test"]),
        (["cat/train/{}.png", "dog/other/{}.png"], ["cat", "dog"], None),
    ],
)
def test_folders_say_splits_and_classes_wherever_these_begin(
    names: list[str], classes: list[str], splits: list[str] | None, tmp_path: Path
) -> None:
    write_images(tmp_path, [name.format(n) for name in names for n in range(30)])
    source = opened(Source.folder, tmp_path)
    assert (source.class_names or []) == classes
    stated = [split for split, origin in source.account.origins.items() if origin == "folder"]
    assert sorted(stated) == sorted(splits or [])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"),
        ("val-000.tar", "valid"),
        ("imagenet_validation_3.parquet", "valid"),
        ("train/0000.parquet", "train"),
        ("data/test-00000-of-00001.parquet", "test"),
        ("contest.tar", None),
        ("0000.tar", None),
        ("trainer/0.tar", None),
    ],
)
def test_names_state_splits(name: str, split: str | None) -> None:
    assert split_of_file(name) == split


def test_few_images_leave_no_split_empty(tmp_path: Path) -> None:
    write_images(tmp_path / "x", [f"{number}.png" for number in range(3)])
    source = opened(Source.folder, tmp_path / "x")
    assert source.splits == {"train": 1, "valid": 1, "test": 1}
    (tmp_path / "x" / "0.png").unlink()
    with pytest.raises(UserError, match=r"none of the 2 images in .* falls to"):
        opened(Source.folder, tmp_path / "x")


def test_a_folder_that_cannot_be_listed_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    """Root may list everything, so another process tries it as nobody."""
    write_images(tmp_path / "x", [f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(9)])
    (tmp_path / "x" / "dog").chmod(0o300)
    code = (
        "import os, sys; sys.path[:] = sys.argv[2:]\n"
        "from tests.pipeline.data.test_account import *\n"
        "from pipeline.storage import open_storage\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for attempt in (lambda: opened(Source.folder, Path(sys.argv[1])),"
        " open_storage(sys.argv[1]).list):\n"
        "    try: attempt(); print('passed over')\n"
        "    except UserError as error: print(error)\n"
    )
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_mode & 0o005 != 0o005 and folder.is_relative_to(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x"), *sys.path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listing, storage = done.stdout.splitlines()
    assert listing.startswith(f"cannot list {tmp_path}/x/dog: Permission denied")
    assert "Permission denied" in storage


def test_the_account_is_told_in_a_few_lines(tmp_path: Path) -> None:
    write_images(tmp_path / "x", [f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(9)])
    (tmp_path / "x" / "readme.txt").write_text("hello")
    (tmp_path / "x" / "cat" / "gone.png").symlink_to("nowhere")
    source = opened(Source.folder, tmp_path / "x")
    lines = format_account(source.account.to_json(source.class_names, source.num_classes))
    assert lines[0] == "20 files found: 18 used, 2 passed over"
    assert set(lines[1:3]) == {
        "  1 broken link: cat/gone.png",
        "  1 not read here (.txt): readme.txt",
    }
    assert lines[3] == "labels: 2 classes (cat, dog)"


def test_a_rewritten_file_of_equal_size_is_another_recipe(tmp_path: Path) -> None:
    write_images(tmp_path / "x", [f"{number}.png" for number in range(9)])
    before = opened(Source.folder, tmp_path / "x").description
    path = tmp_path / "x" / "3.png"
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(0, 1))
    assert opened(Source.folder, tmp_path / "x").description != before


def test_colours_are_kept_if_any_image_has_them(tmp_path: Path) -> None:
    write_images(tmp_path / "x", [f"{number}.png" for number in range(40)], mode="L")
    source = opened(Source.folder, tmp_path / "x")
    source.prepare()
    assert source.image_shape == (1, 4, 4)
    write_images(tmp_path / "x", ["colour.png"])
    source = opened(Source.folder, tmp_path / "x")
    source.prepare()
    assert source.image_shape == (3, 4, 4)


def test_the_memory_of_a_listing_does_not_grow_with_the_images() -> None:
    def candidates() -> Iterator[Candidate]:
        number = 0
        while True:
            yield Candidate(f"folder-{number % 100}/a-rather-long-name-{number:012d}.jpg", "", "1")
            number += 1

    peaks = []
    for count in (20_000, 100_000):
        tracemalloc.start()
        listing = Listing(mixed=True)
        listing.add_all(islice(candidates(), count))
        listing.divide(0.1, 0.1, "name")
        assert sum(listing.counts.values()) == count
        assert len(listing.items("train", 100, 200)) == 100
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
