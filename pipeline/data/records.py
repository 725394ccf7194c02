"""The index of a shard: where each record begins, how long it is, and its checksum."""

import json
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.data.manifest import Integers, Shard, read_verified
from pipeline.errors import UserError
from pipeline.storage.base import Storage


def checksum(record: bytes) -> str:
    """What a record is held to each time it is read: XXH3 of 128 bits.

    It finds any damage, ten times as fast as sha256; against forgery there is the sha256 of the
    whole shard, and of the index.
    """
    return xxhash.xxh3_128_hexdigest(record)


@dataclass(frozen=True)
class Index:
    """The records of one shard; every array has shape ``(num_records,)``, but ``starts`` one more,
    and ``keys`` one for each sample.
    """

    offset: Integers  # in bytes
    size: Integers  # in bytes
    checksum: tuple[str, ...]
    starts: Integers  # each record's first sample, and the number of all
    labels: (
        Integers | None
    )  # of encoding "image", which has a sample in each record; else they are in the records
    keys: tuple[str, ...] | None  # the samples' names where they came from, if they had any

    @staticmethod
    def to_bytes(
        offset: list[int], size: list[int], checksum: list[str], **others: list[int] | list[str]
    ) -> bytes:
        """The index object, from one value for each record: ``num_samples``, or ``labels``.
        ``keys`` has one for each sample.
        """
        return json.dumps(
            {"offset": offset, "size": size, "checksum": checksum, **others}, separators=(",", ":")
        ).encode()

    @classmethod
    def load(cls, storage: Storage, shard: Shard) -> "Index":
        """A shard's index. Raises ``UserError`` if it is missing or is not the one that the
        manifest names.
        """
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
