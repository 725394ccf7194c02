"""``vlae index`` and ``vlae data``: existing shards are indexed, unsafe or damaged ones refused."""

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.commands.images import data, index
from pipeline.commands.images.data import Action, DataConfig
from pipeline.commands.images.index import IndexConfig
from pipeline.config.sections import (
    ClusterOptions,
    DatasetOptions,
    IndexOptions,
    ShardOptions,
    Source,
    StorageOptions,
)
from pipeline.data import DataSet, indexing, manifest, tar
from pipeline.data.cache import ShardCache
from pipeline.data.images import BadImage, array, decode, encode, library, measure
from pipeline.data.journal import Journal
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.manifest import Decoding
from pipeline.data.reader import ReadOptions
from pipeline.data.records import Index, Shard
from pipeline.data.sources import open_source
from pipeline.data.sources.account import Account
from pipeline.data.sources.members import SampleReader
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from pipeline.storage.folder import FolderStorage
from pipeline.storage.pieces import Pieces
from tests.faults.storage import WebServer
from tests.servers import serving

SIZE = 8


def pixels(number: int, size: int = SIZE) -> np.ndarray:
    return np.full((size, size, 3), number, dtype=np.uint8)


def npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def shard(*samples: dict[str, Any]) -> bytes:
    """A WebDataset tar."""
    file = io.BytesIO()
    with webdataset.TarWriter(file, encoder=False) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:04d}", **sample})
    return file.getvalue()


def mixed(numbers: range) -> bytes:
    """Images in every encoding, with both kinds of labels, and members that are ignored."""
    made = []
    for number in numbers:
        png, webp = encode(pixels(number), "png"), encode(pixels(number), "webp")
        first, later = npy(pixels(number)), npy(pixels(number).transpose(2, 0, 1))
        image = ({"png": png}, {"webp": webp}, {"npy": first}, {"npy": later})[number % 4]
        label = (
            {"cls": str(number % 7).encode()}
            if number % 2
            else {"json": json.dumps({"label": number % 7}).encode()}
        )
        made.append({**image, **label, "txt": b"a caption" * 300})
    return shard(*made)


def put(storage: Storage) -> None:
    for number in range(4):
        storage.write(f"shards/{number:06d}.tar", mixed(range(number * 20, number * 20 + 20)))


def config_for(root: Storage, address: str, **options: Any) -> IndexConfig:
    patterns = {
        "train": f"{address}/{{000000..000001}}.tar",
        "valid": f"{address}/000002.tar",
        "test": f"{address}/000003.tar",
    }
    return IndexConfig(
        storage=StorageOptions(root=root.url),
        dataset=DatasetOptions(name="foreign", url=f"{root.url}/manifest"),
        index=IndexOptions(**(patterns | options)),
        cluster=ClusterOptions(),
    )


@pytest.mark.usefixtures("ray_cluster")
def test_other_peoples_shards_become_a_data_set_where_they_lie(
    storage: Storage, tmp_path: Path
) -> None:
    put(storage)
    before = {key: storage.read(key) for key in storage.list()}
    config = config_for(storage, f"{storage.url}/shards")
    result = index.run(config)
    assert result["splits"] == {
        name: {"images": n, "shards": s}
        for name, n, s in (("train", 40, 2), ("valid", 20, 1), ("test", 20, 1))
    }
    assert (result["num_classes"], result["image_shape"]) == (7, [3, SIZE, SIZE])
    assert {key: storage.read(key) for key in storage.list("shards")} == before
    assert not storage.list("manifest/work")
    place = storage.child("manifest")
    data_set = DataSet.load(place)
    assert data_set.manifest.decoding == Decoding("scaled", "lanczos", library())
    for split, first in (("train", 0), ("valid", 40), ("test", 60)):
        for batch in EvalLoader(data_set, split=split, batch_size=7):
            np.testing.assert_array_equal(batch.images[:, 0, 0, 0], batch.samples + first)
            np.testing.assert_array_equal(batch.labels, (batch.samples + first) % 7)
            assert (batch.images == batch.images[:, :1, :1, :1]).all()
    order = {"seed": 1, "global_batch": 8, "num_streams": 4, "num_steps": 10, "group_bytes": 4000}
    alone = [b.samples.tolist() for b in TrainLoader(data_set, **order)]  # type: ignore[arg-type]
    cache = ShardCache(tmp_path / "cache", 10**6)
    ranks = [
        [
            b.samples.tolist()
            for b in TrainLoader(
                data_set, **order, rank=rank, world_size=2, start_step=3, options=ReadOptions(cache)
            )
        ]  # type: ignore[arg-type]
        for rank in (0, 1)
    ]
    assert [one + other for one, other in zip(*ranks, strict=True)] == alone[3:]
    assert index.run(config) == result | {"reused": True}
    with pytest.raises(UserError, match=r"was made from other images or options \(channels\)"):
        index.run(config_for(storage, f"{storage.url}/shards", channels=1))

    checking = DataConfig(
        Action.inspect,
        output=str(tmp_path / "out"),
        pictures=5,
        storage=config.storage,
        dataset=config.dataset,
        cluster=ClusterOptions(),
    )
    seen = data.run(checking)
    assert seen["classes"]["train"] == {
        str(n): len([i for i in range(40) if i % 7 == n]) for n in range(7)
    }
    assert (tmp_path / "out" / "train.png").read_bytes().startswith(b"\x89PNG")
    assert "7 classes" in data.format_result(checking, seen)
    checking.action = Action.verify
    assert data.run(checking)["damaged"] == []
    content = bytearray(storage.read("shards/000001.tar"))
    content[-2000] ^= 1  # in the zeros behind the last member, which no reader ever looks at
    storage.write("shards/000001.tar", bytes(content))
    content = bytearray(storage.read("shards/000002.tar"))
    content[int(Index.load(place, data_set.manifest.shards("valid")[0]).offset[3]) + 10] ^= (
        1  # in its fourth image
    )
    storage.write("shards/000002.tar", bytes(content))
    storage.delete(["shards/000003.tar"])
    damaged = data.run(checking)["damaged"]
    assert [item["shard"].rpartition("/")[2] for item in damaged] == [
        "000001.tar",
        "000002.tar",
        "000003.tar",
    ]
    assert "there is data behind its end at byte" in damaged[0]["reason"]
    assert re.search(
        r"and \w{64}; .*000002.tar is damaged: record 3 \(byte \d+, ", damaged[1]["reason"]
    )
    assert "there is no" in damaged[2]["reason"]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A plain web server with shards; gives their address."""
    put(FolderStorage(tmp_path / "web"))
    handler = type("Web", (WebServer,), {"folder": tmp_path / "web", "ranges": True})
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}/shards"


def test_shards_on_the_web_are_resized_as_they_are_read(web: str, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "manifest")
    options = IndexOptions(train=f"{web}/{{000000..000003}}.tar", image_size=4, channels=1)
    journal = Journal(storage, {})
    for number, url in enumerate(urls(indexing.expand(options.train, None, Account()))):
        indexing.index_shard(storage, journal, f"train-{number:06d}", url, options)
    shards = tuple(Shard(**journal.read(name)["shard"]) for name in sorted(journal.finished()))
    contents = manifest.Manifest(
        "web", (1, 4, 4), 7, 1, {"train": shards}, encoding="image", fit="crop"
    )
    found = list(EvalLoader(DataSet(storage, contents), split="train", batch_size=100))
    assert np.concatenate([b.images[:, 0, 2, 2] for b in found]).tolist() == list(range(80))
    assert found[0].images.shape[1:] == (1, 4, 4)
    with pytest.raises(
        UserError, match="a web address can only be read; use s3://BUCKET/PREFIX or a local folder"
    ):
        open_storage(web).write("x", b"")


def test_a_shard_on_the_web_is_written_anew(web: str) -> None:
    dataset = DatasetOptions(name="x", source=Source.webdataset, path=f"{web}/000001.tar")
    source = open_source(dataset, ShardOptions(channels=3, valid_fraction=0.3, test_fraction=0.3))
    found = [source.read(split, 0, count)[0][:, 0, 0, 0] for split, count in source.splits.items()]
    assert sorted(np.concatenate(found).tolist()) == list(range(20, 40))
    assert len(source.description["files"]) == 64
    part = source.part("train", 2, 4)
    np.testing.assert_array_equal(part.read("train", 2, 4)[0], source.read("train", 2, 4)[0])
    assert part.key("train", 3) == source.key("train", 3)


def urls(tars: list[indexing.Tar]) -> list[str]:
    return [tar.url for tar in tars]


def shards_of(**options: Any) -> dict[str, list[str]]:
    found = indexing.find_shards(IndexOptions(**options), None, Account())
    return {split: urls(tars) for split, tars in found.items()}


def test_patterns_are_spelt_out_and_splits_are_whole_shards(tmp_path: Path) -> None:
    assert urls(indexing.expand("s3://b/{x,y}-{08..11}.tar", None, Account())) == [
        f"s3://b/{c}-{n}.tar" for c in "xy" for n in ("08", "09", "10", "11")
    ]
    for number in range(60):
        (tmp_path / f"{number}.tar").write_bytes(b"")
    options = {"train": str(tmp_path), "valid_fraction": 0.2, "test_fraction": 0.2}
    splits = shards_of(**options)
    assert sorted(url for found in splits.values() for url in found) == sorted(
        str(path) for path in tmp_path.iterdir()
    )
    (tmp_path / "60.tar").write_bytes(b"")
    for split, found in shards_of(**options).items():
        assert set(splits[split]) <= set(found)
    with pytest.raises(UserError, match=r"no shards for test; name some with index\.test="):
        shards_of(train=f"{tmp_path}/1.tar")
    with pytest.raises(UserError, match=r"no \.tar files at .*/none"):
        indexing.expand(str(tmp_path / "none"), None, Account())


def test_the_names_of_shards_state_splits_and_few_shards_leave_none_empty(tmp_path: Path) -> None:
    for name in ("train-0.tar", "train-1.tar", "val-0.tar", "a.tar.gz", "readme.txt", ".x.tar"):
        (tmp_path / name).write_bytes(b"")
    account = Account()
    found = indexing.find_shards(IndexOptions(train=str(tmp_path)), None, account)
    assert {split: [tar.name for tar in tars] for split, tars in found.items()} in (
        {"train": [f"train-{one}.tar"], "valid": ["val-0.tar"], "test": [f"train-{1 - one}.tar"]}
        for one in (0, 1)
    )
    assert account.origins["valid"] == "file name"
    assert "one shard, so that it has any" in account.origins["test"]
    assert account.passed_over == {
        "compressed tar, which has to be unpacked first": 1,
        "not read here (.txt)": 1,
        "hidden": 1,
    }
    with pytest.raises(UserError, match=r"a\.tar\.gz is compressed, .* give the plain \.tar"):
        indexing.find_shards(IndexOptions(train=str(tmp_path / "a.tar.gz")), None, Account())
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        (tmp_path / name).unlink()
    for number in range(8):
        (tmp_path / f"{number}.tar").write_bytes(b"")
    found = indexing.find_shards(IndexOptions(train=str(tmp_path)), None, Account())
    assert min(map(len, found.values())) >= 1
    assert sum(map(len, found.values())) == 8


@pytest.mark.parametrize("span", ["{0..99999999}", "{5..3}", "{-1..99999999}", "{0..99999999..2}"])
def test_an_impossible_range_is_refused_before_it_is_expanded(span: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"/{span}.tar: {span} is no range of numbers")):
        indexing.expand(f"s3://b/{span}.tar", None, Account())


def test_braces_that_do_not_match_are_refused() -> None:
    with pytest.raises(UserError, match=r"s3://b/\{0\.\.3\.tar: its braces do not match"):
        indexing.expand("s3://b/{0..3.tar", None, Account())


# --- what is refused ------------------------------------------------------------------------------


def indexed(content: bytes, tmp_path: Path, **options: Any) -> dict[str, Any]:
    (tmp_path / "x.tar").write_bytes(content)
    storage = FolderStorage(tmp_path / "manifest")
    url = str(tmp_path / "x.tar")
    journal = Journal(storage, {})
    indexing.index_shard(storage, journal, "train-000000", url, IndexOptions(train=url, **options))
    return journal.read("train-000000")


def named(name: str, content: bytes = b"") -> bytes:
    """A tar with one member of any name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


PNG = encode(pixels(1), "png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            shard({"png": PNG, "pkl": b"x"}),
            r"'0000\.pkl' could only be read by unpickling it, which may run any program",
        ),
        (
            shard({"png": PNG, "meta.PYD": b"x"}),
            r"0000\.meta\.PYD' could only be read by unpickling",
        ),
        (shard({"pth": b"x"}), "unpickling"),
        (named("../../etc/x.png", PNG), r"the name of member '\.\./\.\./etc/x\.png' is not safe"),
        (named("/etc/x.png", PNG), "is not safe"),
        (named("a\\..\\x.png", PNG), "is not safe"),
        (named("a\nb.png", PNG), "is not safe"),
        (
            shard({"png": b"no image"}),
            r"the image of sample '0000' cannot be used: it is not an image",
        ),
        (shard({"npy": npy(np.array([{}], dtype=object))}), "would have to be unpickled"),
        (shard({"npy": npy(np.zeros((4, 4)))}), "its array is float64"),
        (
            shard({"npy": npy(np.zeros((4, 4, 4), np.uint8))}),
            "none of the dimensions is 1 or 3 channels",
        ),
        (
            shard({"png": encode(pixels(1, 600), "png")}),
            "its 600 x 600 pixels are more than the 100,000 allowed",
        ),
        (
            shard({"npy": npy(pixels(1, 600))}),
            "its 600 x 600 pixels are more than the 100,000 allowed",
        ),
        (shard({"png": PNG, "cls": b"\xff"}), "the label of sample '0000' cannot be read"),
        (
            shard({"input.png": PNG, "mask.png": PNG}),
            r"'0000' has several images \(input.png, mask.png\); say which to take by image_key",
        ),
        (shard({"png": PNG}) + shard({"png": PNG}), "there is data behind its end at byte"),
        (shard({"png": PNG})[:-512] + b"x" * 512, "there is data behind its end at byte"),
        (gzip.compress(shard({"png": PNG})), "it is compressed with gzip; unpack it first"),
        (shard({"png": PNG, "json": b"[" * 100_000}), "the label of sample '0000' cannot be read"),
        (
            shard(*({"__key__": key, "png": PNG} for key in "aba")),
            "sample 'a' do not follow each other, or it is there twice",
        ),
        (b"no tar at all" * 100, "is not a whole tar archive: there is no tar header at byte 0"),
        (b"", "is not a whole tar archive: it ends at byte 0"),
        (
            shard({"png": PNG}, {"png": PNG})[:1024],
            r"it ends at byte 1024, in the middle of the archive",
        ),
    ],
)
def test_what_is_not_safe_or_not_whole_is_refused_by_name(
    content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        indexed(content, tmp_path, max_megapixels=0.1)
    assert f"{tmp_path}/x.tar" in str(raised.value)


def test_which_image_of_a_sample_is_taken_is_an_option(tmp_path: Path) -> None:
    content = shard({"input.png": PNG, "mask.png": encode(pixels(2), "png"), "txt": b"a note"})
    for key, size in (("input", len(PNG)), ("mask.png", len(encode(pixels(2), "png")))):
        indexed(content, tmp_path, image_key=key)
        assert index_of(tmp_path)["size"] == [size]
    with pytest.raises(UserError, match=r"has no image 'depth', only input\.png, mask\.png"):
        indexed(content, tmp_path, image_key="depth")


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    entry = indexed(
        shard({"txt": b"x"}, {"png": PNG}, {"jpg": PNG, "npy": b"an embedding"}), tmp_path
    )
    account = entry["account"]
    assert account["used"] == 2
    assert account["passed_over"] == {"sample without an image (.txt)": 1}


@pytest.mark.parametrize(
    ("members", "labels", "named"),
    [
        ({"cls": b"7"}, [7], False),
        ({"json": b'{"labels": 3}'}, [3], False),
        ({"json": b'{"fine_label": [2]}'}, [2], False),
        ({"json": b'{"label": "cat"}'}, ["cat"], True),
        ({"cls": b"dog"}, ["dog"], True),
        ({"json": b'{"label": 1e11}'}, [10**11], True),
        ({"json": b'{"label": -7}'}, [-7], True),
        ({"json": b'{"label": -1}'}, [], False),
        ({"json": b'{"label": {"x": 1}}'}, [], False),
        ({"json": b'{"label": 0.25}'}, [], False),
        ({}, [], False),
    ],
)
def test_labels_are_found_under_their_usual_names(
    tmp_path: Path, members: dict[str, bytes], labels: list[Any], named: bool
) -> None:
    entry = indexed(shard({"png": PNG, **members}), tmp_path)
    assert (entry["labels"], entry["named"]) == (labels, named)
    assert entry["account"]["unlabelled"] == (0 if labels else 1)


def index_of(tmp_path: Path) -> dict[str, Any]:
    return FolderStorage(tmp_path / "manifest").read_json("index/train-000000.json")


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    found = [indexed(shard({"png": PNG}, {"png": encode(pixels(1, 5), "png")}), tmp_path)]
    with pytest.raises(
        UserError, match=r"0000 in .* is 8 x 8, but 0001 in .* is 5 x 5; set index\.image_size"
    ):
        indexing._image_size(IndexOptions(train="x"), found)
    assert indexing._image_size(IndexOptions(train="x", image_size=6), found) == (6, 6)


# --- any bytes ------------------------------------------------------------------------------------

WHOLE = mixed(range(4))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=40), st.integers(0, len(WHOLE))
)
def test_a_tar_with_any_bytes_in_it_is_read_or_refused(at: int, change: bytes, end: int) -> None:
    for content in (WHOLE[:at] + change + WHOLE[at + len(change) :], WHOLE[:end]):
        try:
            reader = SampleReader("x.tar", None, None)
            found = list(reader.read(Pieces(iter([content]))))
        except UserError:
            pass
        else:
            assert all(content[s.offset : s.offset + len(s.content)] == s.content for s in found)
        if end < 512 * 10:
            with pytest.raises(tar.BadTar):
                list(tar.members(io.BytesIO(WHOLE[:end]), 10**6))


IMAGES = [
    encode(pixels(9), "png"),
    encode(pixels(9), "webp"),
    npy(pixels(9)),
    npy(pixels(9).transpose(2, 0, 1)),
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(IMAGES), st.integers(0, 300), st.binary(max_size=12), st.integers(0, 300))
def test_an_image_with_any_bytes_in_it_is_read_or_refused(
    image: bytes, at: int, change: bytes, end: int
) -> None:
    for content in (image[:at] + change + image[at + len(change) :], image[:end], change):
        for read in (
            lambda c: decode(c, 3, (4, 4), max_pixels=10**5),
            lambda c: measure(c, 10**5),
            array,
        ):
            try:
                read(content)
            except BadImage:
                continue


class Fixed(FolderStorage):
    """A storage that gives the same content whatever is asked for."""

    def __init__(self, content: bytes) -> None:
        super().__init__(Path("/nowhere"))
        object.__setattr__(self, "content", content)

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        yield self.content[start:]  # type: ignore[attr-defined]


SHARD = Shard("a.tar", 9000, "b" * 64, 4, "c", "d" * 64)
CONTENTS = manifest.Manifest("x", (1, 2, 3), 4, 5, {"train": (SHARD,)})
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_a_manifest_with_any_change_is_refused(data: st.DataObject) -> None:
    whole = json.dumps({**CONTENTS._content(), "sha256": CONTENTS.digest}).encode()
    at = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.binary(min_size=1, max_size=5))
    try:
        loaded = manifest.load(Fixed(whole[:at] + change + whole[at + len(change) :]))
    except UserError:
        return
    assert loaded == CONTENTS  # such as another way to write the same JSON


def altered(value: Any, data: st.DataObject) -> Any:
    """A JSON value with something in it replaced, or taken away."""
    if not value or not isinstance(value, dict | list) or data.draw(st.integers(0, 9)) == 0:
        return data.draw(ANYTHING)
    at = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    changed = dict(value) if isinstance(value, dict) else list(value)
    if data.draw(st.integers(0, 3)):
        changed[at] = altered(value[at], data)  # type: ignore[index]
    else:
        del changed[at]  # type: ignore[arg-type]
    return changed


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_a_manifest_that_was_forged_is_one_or_is_refused(data: st.DataObject) -> None:
    content = altered(CONTENTS._content(), data)
    if isinstance(content, dict):
        content["sha256"] = manifest._digest(content)
    try:
        loaded = manifest.load(Fixed(json.dumps(content).encode()))
        for split in loaded.splits:
            assert int(loaded.num_samples(split)) >= 0
            assert all(isinstance(each, Shard) for each in loaded.shards(split))
    except UserError:
        pass


COLUMNS = {"offset": [0, 3000], "size": [2000, 500], "checksum": ["a", "b"]}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(
        [{"num_samples": [3, 1], "keys": list("wxyz")}, {"labels": [1, 2], "keys": ["x", "y"]}]
    ),
    st.data(),
)
def test_an_index_that_was_forged_stays_within_its_shard_or_is_refused(
    others: dict[str, Any], data: st.DataObject
) -> None:
    content = json.dumps(altered(COLUMNS | others, data)).encode()
    shard = replace(SHARD, index_sha256=hashlib.sha256(content).hexdigest())
    try:
        loaded = Index.load(Fixed(content), shard)
    except UserError:
        return
    assert loaded.starts[-1] == shard.num_samples
    assert (loaded.offset >= 0).all()
    assert (loaded.offset + loaded.size <= shard.size).all()
    assert loaded.keys is None or [type(key) for key in loaded.keys] == [str] * shard.num_samples
