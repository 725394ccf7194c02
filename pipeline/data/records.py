"""The index of a shard: the offset, size and checksum of each record."""

import json
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.data.manifest import Integers, Shard, read_verified
from pipeline.errors import UserError
from pipeline.storage.base import Storage


def checksum(record: bytes) -> str:
    """The checksum that is verified each time a record is read: XXH3 with 128 bits.

    It detects damage ten times as fast as sha256. The sha256 of the whole shard and of the index
    detect forgery.
    """
    return xxhash.xxh3_128_hexdigest(record)


@dataclass(frozen=True)
class Index:
    """The records of one shard; arrays have shape ``(num_records,)`` unless stated."""

    offset: Integers  # in bytes
    size: Integers  # in bytes
    checksum: tuple[str, ...]
    starts: Integers
    """(num_records + 1,): the first sample of each record, and the number of samples."""
    labels: Integers | None
    """The labels of encoding "image", which has one sample in each record; else in the records."""
    keys: tuple[str, ...] | None
    """(num_samples,): the names that the samples had in their source, if any."""

    @staticmethod
    def to_bytes(
        offset: list[int], size: list[int], checksum: list[str], **others: list[int] | list[str]
    ) -> bytes:
        """The bytes of an index, from columns with one value for each record.

        ``others`` are ``num_samples`` or ``labels``, and ``keys``, which has one for each sample.
        """
        return json.dumps(
            {"offset": offset, "size": size, "checksum": checksum, **others}, separators=(",", ":")
        ).encode()

    @classmethod
    def load(cls, storage: Storage, shard: Shard) -> "Index":
        """The index of a shard. Raises ``UserError`` if it is missing or damaged."""
        content = read_verified(storage, shard.index_name, shard.index_sha256)
        try:
            columns = json.loads(content)
            offset, size = (np.array(columns[name], dtype=np.int64) for name in ("offset", "size"))
            labels = np.array(columns["labels"], dtype=np.int64) if "labels" in columns else None
            counts = np.array(
                columns["num_samples"] if "num_samples" in columns else [1] * len(offset),
                dtype=np.int64,
            )
            keys = tuple(columns["keys"]) if "keys" in columns else None
            loaded = cls(
                offset,
                size,
                tuple(columns["checksum"]),
                np.append(0, np.cumsum(counts)),
                labels,
                keys,
            )
            lengths = {
                len(column)
                for column in (size, counts, loaded.checksum, labels)
                if column is not None
            }
            ends = np.append(0, offset + size)
            if (
                lengths != {len(offset)}
                or loaded.starts[-1] != shard.num_samples
                or (
                    keys is not None
                    and (
                        len(keys) != shard.num_samples
                        or not all(isinstance(key, str) for key in keys)
                    )
                )
                or min(size.min(initial=0), counts.min(initial=1)) < 0
            ):
                raise ValueError("its columns do not fit together")
            if (offset < ends[:-1]).any() or ends[-1] > shard.size:
                raise ValueError("its records do not follow each other within the shard")
            return loaded
        except (
            AttributeError,
            KeyError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(
                f"{storage.url}/{shard.index_name} is no index of {shard.name} ({error})"
            ) from None
