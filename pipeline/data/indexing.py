"""A manifest for existing WebDataset shards, which stay where they are and are not rewritten.

A Ray task reads each shard once: its size and sha256, and the offset, size, checksum and label of
every image. Only the manifest and these indices are written; the shards may be in a read-only
bucket or on the web.
"""

import hashlib
import itertools
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from braceexpand import braceexpand

from pipeline import cluster
from pipeline.config.sections import (
    Binarization,
    ClusterOptions,
    DatasetOptions,
    IndexOptions,
    StorageOptions,
)
from pipeline.data import images, manifest
from pipeline.data.journal import Journal
from pipeline.data.manifest import Decoding, Manifest
from pipeline.data.records import Index, Shard, checksum, paginate
from pipeline.data.sources.account import REPORT_KEY, Account
from pipeline.data.sources.base import SPLITS, hash_fraction
from pipeline.data.sources.files import refuse_compressed, why_passed_over
from pipeline.data.sources.listing import Label, names_of
from pipeline.data.sources.members import SampleReader
from pipeline.data.sources.names import stated_splits
from pipeline.errors import UserError
from pipeline.places import is_address, is_below, remember
from pipeline.progress import progress_bar
from pipeline.storage import open_storage
from pipeline.storage.base import ObjectNotFound, Storage
from pipeline.storage.pieces import Counted, Pieces
from pipeline.values import JsonObject

UNIT = "samples and other files"
MAX_RANGE = 10**7
"""Numbers that one range of a pattern may hold: more is a mistake, and would fill the memory."""


def write_manifest(
    dataset: DatasetOptions, options: IndexOptions, workers: ClusterOptions, place: StorageOptions
) -> JsonObject:
    """Write the manifest that the options name, unless it exists. Returns a summary of it.

    Raises UserError if a shard cannot be read or is unsafe, or the manifest exists but was made
    from other shards or options.
    """
    storage, account = open_storage(dataset.url, place.endpoint_url), Account(UNIT)
    splits = find_shards(options, place.endpoint_url, account)
    listed = hashlib.sha256(
        "\n".join(
            f"{split} {shard.url} {shard.version}" for split in splits for shard in splits[split]
        ).encode()
    ).hexdigest()
    recipe = {"source": "index", "shards": listed} | {
        name: getattr(options, name)
        for name in ("image_size", "channels", "label_key", "image_key", "max_megapixels")
    }
    places = find_places(options, splits)
    remember(places)
    recipe |= {"fit": options.fit.value, "binarization": dataset.binarization.value}
    contents = manifest.load_made_by(storage, recipe)
    reused = contents is not None
    if contents is None:
        cluster.connect(workers, place)
        contents = _index_all(dataset, options, storage, splits, places, recipe, account)
        contents.publish(storage)
        _remove_leftovers(storage, contents)
        storage.write_json(REPORT_KEY, account.to_json(contents.class_names, contents.num_classes))
        Journal(storage, recipe).clear()
    report = storage.read_json(REPORT_KEY) if storage.exists(REPORT_KEY) else None
    return {"url": storage.url, "reused": reused, **manifest.summary(contents), "report": report}


@dataclass(frozen=True)
class Tar:
    """A shard to be indexed."""

    url: str
    version: str
    """Another one when it is written again, if its place tells that without reading it."""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def find_shards(
    options: IndexOptions, endpoint_url: str | None, account: Account
) -> dict[str, list[Tar]]:
    """The shards of each split.

    Where ``valid`` or ``test`` has no pattern, the names of the shards of ``train`` decide, such as
    ``val-000.tar``; where they state none, whole shards are chosen by the hash of their names, and
    at least one.
    """
    found = {
        split: expand(getattr(options, split), endpoint_url, account)
        for split in SPLITS
        if getattr(options, split)
    }
    account.origins = dict.fromkeys(found, "option")
    fractions = {"test": options.test_fraction, "valid": options.valid_fraction}
    missing = [split for split in fractions if split not in found]
    stated = stated_splits(tar.url for tar in found["train"])
    for split in missing:
        if named := [tar for tar in found["train"] if stated.get(tar.url) == split]:
            found[split], account.origins[split] = named, "file name"
            found["train"] = [tar for tar in found["train"] if stated.get(tar.url) != split]
    for split in [split for split in fractions if split not in found]:
        hashes = {tar.url: hash_fraction(f"{split} {tar.name}") for tar in found["train"]}
        chosen = [tar for tar in found["train"] if hashes[tar.url] < fractions[split]]
        account.origins[split] = "hash of the shard's name"
        if not chosen and len(found["train"]) > 1:
            chosen = [min(found["train"], key=lambda tar: hashes[tar.url])]
            account.origins[split] += " (one shard, so that it has any)"
        found["train"] = [tar for tar in found["train"] if tar not in chosen]
        found[split] = chosen
    for split, tars in found.items():
        if not tars:
            raise UserError(
                f"there are no shards for {split}; name some with index.{split}=, or give more"
                " shards"
            )
    for tar in itertools.chain(*found.values()):
        if not is_address(tar.url):
            raise UserError(
                f"cannot index {tar.url!r}: its address has '..' or odd characters; rename it"
            )
    return {split: found[split] for split in SPLITS}


def find_places(options: IndexOptions, splits: dict[str, list[Tar]]) -> list[str]:
    """The folders and addresses below which the options say that shards lie."""
    found = set[str]()
    for pattern in filter(None, (options.train, options.valid, options.test)):
        is_folder = not pattern.lower().endswith(".tar")
        above = pattern.partition("{")[0].rpartition("/")[0] or "."
        found.add(open_storage(pattern if is_folder else above).url)
    others = (tar for tar in itertools.chain(*splits.values()) if not is_below(tar.url, found))
    return sorted(found | {tar.url.rpartition("/")[0] for tar in others})


def expand(pattern: str, endpoint_url: str | None, account: Account) -> list[Tar]:
    """The tars that a pattern stands for: a folder is all tars below it, and braces are expanded as
    in a shell, ``{000..123}`` and ``{a,b}``. Other files of a folder are passed over.

    Raises UserError for a range that is too long or runs downwards, and where nothing is found.
    """
    refuse_compressed(pattern)
    if not pattern.lower().endswith(".tar"):
        place, found = open_storage(pattern, endpoint_url), []
        for entry in sorted(place.entries(), key=lambda entry: entry.key):
            if reason := why_passed_over(entry.key, (".tar",)):
                account.pass_over(reason, f"{place.url}/{entry.key}")
            else:
                found.append(Tar(f"{place.url}/{entry.key}", f"{entry.size} {entry.version}"))
        if not found:
            others = ", ".join(f"{count} {why}" for why, count in account.passed_over.items())
            raise UserError(
                f"there are no .tar files at {pattern}" + (f", only {others}" if others else "")
            )
        return found
    for span in re.finditer(r"\{(-?\d+)\.\.(-?\d+)(\.\.-?\d+)?\}", pattern):
        first, last = int(span[1]), int(span[2])
        if last < first or last - first > MAX_RANGE:
            raise UserError(f"{pattern}: {span[0]} is no range of numbers")
    try:
        urls = list(braceexpand(pattern, escape=False))
    except ValueError:
        raise UserError(f"{pattern}: its braces do not match") from None
    return [Tar(url, "") if "://" in url else _local_tar(url) for url in urls]


def _local_tar(path: str) -> Tar:
    """A shard in a folder; reading it will tell if it is missing.

    In an object store and on the web, where asking takes time, the sha256 in the index tells
    whether a shard was written again.
    """
    folder, _, name = path.rpartition("/")
    place, version = open_storage(folder or "."), ""
    with suppress(ObjectNotFound):
        entry = place.entry(name)
        version = f"{entry.size} {entry.version}"
    return Tar(f"{place.url}/{name}", version)


def _index_all(
    dataset: DatasetOptions,
    options: IndexOptions,
    storage: Storage,
    splits: dict[str, list[Tar]],
    places: list[str],
    recipe: JsonObject,
    account: Account,
) -> Manifest:
    """Index all shards; what becomes of their members goes to ``account``."""
    journal = Journal(storage, recipe | {"version": manifest.VERSION})
    finished = journal.finished()
    jobs = [
        (split, f"{split}-{number:06d}", tar.url)
        for split in splits
        for number, tar in enumerate(splits[split])
    ]
    waiting = [job for job in jobs if job[1] not in finished]
    initial = len(jobs) - len(waiting)
    with progress_bar(len(jobs), "indexing", initial=initial, unit="shards") as bar:
        for _ in cluster.in_tasks(
            index_shard, ((storage, journal, job, url, options) for _, job, url in waiting)
        ):
            bar.update()
    found = [journal.read(job) for _, job, _ in jobs]
    for each in found:
        account.add(Account.from_json(each["account"]))
    if options.label_key is not None and account.unlabelled == account.used:
        raise UserError(
            f"no sample has the label index.label_key={options.label_key}; leave it out, or name a"
            " key of their .json"
        )
    names = _number_labels(storage, found)
    shards = {split: list[Shard]() for split in splits}
    for each, (split, _, _) in zip(found, jobs, strict=True):
        shards[split].append(Shard(**each["shard"]))
    for split in splits:
        if not sum(shard.num_samples for shard in shards[split]):
            raise UserError(f"the shards for {split} hold no images")
    labels = max(each["largest_label"] for each in found)
    channels = options.channels or max(each["channels"] for each in found)
    image_shape = (channels, *_image_size(options, found))
    return Manifest(
        name=dataset.name,
        image_shape=image_shape,
        num_classes=labels + 1 if labels >= 0 else None,
        block_size=1,
        splits={split: paginate(storage, split, shards[split], places) for split in splits},
        source=recipe,
        encoding="image",
        decoding=Decoding(images.METHOD, images.FILTER, images.library()),
        fit=options.fit.value if options.image_size else None,
        binarization=manifest.chosen_binarization(
            dataset.binarization, Binarization.none, image_shape, is_binary=False
        ),
        class_names=names,
        places=places,
    )


def _remove_leftovers(storage: Storage, contents: Manifest) -> None:
    """Delete indices that the manifest does not name."""
    wanted = {shard.index_name for shards in contents.splits.values() for shard in shards}
    storage.delete(key for key in storage.list("index") if key not in wanted)


def _number_labels(storage: Storage, found: list[Any]) -> list[str] | None:
    """Number the labels of all shards in one way; returns their names, if they have names.

    Labels that count from 0 stay as they are. Others are replaced by their places in their order,
    in the index of each shard.
    """
    distinct = {label for each in found for label in each["labels"]}
    names = names_of(distinct)
    if names is None:
        for each in found:
            each["largest_label"] = max(each["labels"], default=-1)
        return None
    places = {name: number for number, name in enumerate(names)}
    numbering = [
        (storage, each["shard"]["index_name"], each["labels"], places, each["named"])
        for each in found
    ]
    renamed = {old: (new, sha256) for old, new, sha256 in cluster.in_tasks(renumber, numbering)}
    for each in found:
        shard = each["shard"]
        shard["index_name"], shard["index_sha256"] = renamed[shard["index_name"]]
        each["largest_label"] = max((places[str(label)] for label in each["labels"]), default=-1)
    return names


def renumber(
    storage: Storage, name: str, labels: list[Label], places: dict[str, int], named: bool
) -> tuple[str, str, str]:
    """Write an index anew with other labels; returns its old name, its new one and its sha256.

    ``labels`` are the shard's different ones; the index has their places in that list if it is
    ``named``, else the labels themselves.
    """
    columns = storage.read_json(name)
    keys = range(len(labels)) if named else labels
    new = {key: places[str(label)] for key, label in zip(keys, labels, strict=True)}
    columns["labels"] = [new.get(label, -1) for label in columns["labels"]]
    content = Index.to_bytes(**columns)
    # Under another name, so that a command that is killed here finds the old one unchanged.
    renamed = f"{name.removesuffix('.json')}-named.json"
    storage.write(renamed, content)
    return name, renamed, hashlib.sha256(content).hexdigest()


def _image_size(options: IndexOptions, found: list[Any]) -> tuple[int, int]:
    """The height and width to which the loader brings all images."""
    if options.image_size is not None:
        return options.image_size, options.image_size
    sizes = {
        tuple(size): f"{key} in {each['shard']['name']}"
        for each in found
        for *size, key in each["sizes"]
    }
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise UserError(
            f"{first} is {one[1]} x {one[0]}, but {second} is {other[1]} x {other[0]}; "
            "set index.image_size to bring all to one size as they are read"
        )
    ((height, width),) = sizes
    return int(height), int(width)


def index_shard(
    storage: Storage, journal: Journal, name: str, url: str, options: IndexOptions
) -> None:
    """Read one shard, and write its index, then its entry in the journal."""
    folder, _, key = url.rpartition("/")
    passing = Counted(storage.elsewhere(folder).stream(key))
    columns: dict[str, list[Any]] = {
        column: [] for column in ("offset", "size", "checksum", "labels", "keys")
    }
    sizes: dict[tuple[int, int], str] = {}
    most_channels, max_pixels = options.channels or 1, int(options.max_megapixels * 1e6)
    reader = SampleReader(url, options.label_key, options.image_key)
    for sample in reader.read(Pieces(passing)):
        try:
            height, width, channels = images.measure(sample.content, max_pixels)
        except images.BadImage as error:
            raise UserError(
                f"{url}: the image of sample {sample.key!r} cannot be used: {error}"
            ) from None
        if options.channels is None:
            most_channels = max(most_channels, channels)
        if len(sizes) < 2:
            sizes.setdefault((height, width), sample.key)
        row = (
            sample.offset,
            len(sample.content),
            checksum(sample.content),
            sample.label,
            sample.key,
        )
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    passing.finish()
    labels = columns["labels"]
    reader.account.unlabelled = sum(label is None for label in labels)
    distinct = sorted({label for label in labels if label is not None}, key=str)
    index_name = f"index/{name}.json"
    named = not all(isinstance(label, int) and 0 <= label < 1 << 31 for label in distinct)
    places = {label: place if named else label for place, label in enumerate(distinct)}
    columns["labels"] = [-1 if label is None else places[label] for label in labels]
    index = Index.to_bytes(**columns)
    storage.write(index_name, index)
    shard = Shard(
        url,
        passing.size,
        passing.sha256,
        len(columns["offset"]),
        index_name,
        hashlib.sha256(index).hexdigest(),
    )
    journal.write(
        name,
        {
            "shard": asdict(shard),
            "sizes": [[*size, key] for size, key in sizes.items()],
            "labels": distinct,
            "named": named,
            "channels": most_channels,
            "account": reader.account.counts(),
        },
    )
