"""Writing shards: images to a tar with its index."""

import hashlib
import io
from typing import Any

import numpy as np
import webdataset

from pipeline.config.sections import Encoding
from pipeline.data import tar
from pipeline.data.images import encode
from pipeline.data.records import Index, Shard, checksum
from pipeline.data.sources.base import Labels
from pipeline.storage.base import Storage


def write_images(
    storage: Storage,
    name: str,
    first: int,
    images: Any,
    labels: Labels,
    block_size: int,
    encoding: Encoding,
    keys: list[str] | None = None,
) -> Shard:
    """Write images, each ``(height, width, channels)``, to one shard with its index.

    ``first`` is the number of the first image, and ``keys`` their names in the source.
    """
    file = io.BytesIO()
    # A fixed time and owner: equal images must give equal bytes.
    with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        if encoding is Encoding.npy:
            columns = _write_blocks(writer, first, images, labels, block_size)
        else:
            for number, (pixels, label) in enumerate(
                zip(images, labels.tolist(), strict=True), first
            ):
                sample = {
                    "__key__": f"{number:09d}",
                    encoding.value: encode(pixels, encoding.value),
                }
                writer.write(sample | ({"cls": str(label).encode()} if label >= 0 else {}))
    content = file.getvalue()
    if encoding is not Encoding.npy:
        found = [
            m
            for m in tar.members(io.BytesIO(content), len(content))
            if m.name.endswith(encoding.value)
        ]
        columns = {"offset": [m.offset for m in found], "size": [m.size for m in found]}
        columns |= {"labels": labels.tolist()}
    if keys is not None:
        columns |= {"keys": keys}
    places = zip(columns["offset"], columns["size"], strict=True)
    columns["checksum"] = [checksum(content[offset : offset + size]) for offset, size in places]
    index = Index.to_bytes(**columns)
    index_name = name.removesuffix(".tar") + ".index.json"
    sha256, index_sha256 = hashlib.sha256(content).hexdigest(), hashlib.sha256(index).hexdigest()
    shard = Shard(name, len(content), sha256, len(labels), index_name, index_sha256)
    storage.write(name, content)
    storage.write(index_name, index)
    return shard


def _write_blocks(
    writer: Any, first: int, images: Any, labels: Labels, block_size: int
) -> dict[str, list[Any]]:
    """Write records of ``block_size`` images. Returns the columns of their index."""
    columns: dict[str, list[Any]] = {"offset": [], "size": [], "num_samples": []}
    for start in range(0, len(labels), block_size):
        block, part = (
            np.stack(images[start : start + block_size]),
            labels[start : start + block_size],
        )
        offset = writer.tarstream.offset
        writer.write(
            {
                "__key__": f"{first + start:09d}",
                # Channels first, as the model wants them.
                "images.npy": _npy(block.transpose(0, 3, 1, 2)),
                "labels.npy": _npy(part),
            }
        )
        for name, value in zip(
            columns, (offset, writer.tarstream.offset - offset, len(part)), strict=True
        ):
            columns[name].append(value)
    return columns


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()
