"""A data set: a manifest, and the storage that its shards are read from."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.data.order import GROUP_BYTES
from pipeline.storage import open_storage
from pipeline.storage.base import Storage

if TYPE_CHECKING:
    from pipeline.data.loader import Batches, InOrder
    from pipeline.data.reader import ReadOptions


@dataclass(frozen=True)
class DataSet:
    """Shards and their manifest. Small and picklable: pass it to workers as it is."""

    storage: Storage
    """Holds the manifest and the indices, and the shards unless they are elsewhere."""
    manifest: Manifest

    @classmethod
    def open(cls, url: str, endpoint_url: str | None = None) -> "DataSet":
        """The data set at ``url``: a local folder, ``s3://bucket/prefix`` or ``https://...``.

        ``endpoint_url`` is the address of an S3 server other than Amazon's; AWS_ENDPOINT_URL does
        the same. Raises as ``load`` does.
        """
        return cls.load(open_storage(url, endpoint_url))

    @classmethod
    def load(cls, storage: Storage) -> "DataSet":
        """The data set in ``storage``.

        Raises ``UserError`` if there is none, or one that is damaged or of another version, or
        whose shards lie where they are not followed (``pipeline.places``).
        """
        return cls(storage, manifests.load(storage))

    def with_valid(self) -> "DataSet":
        """This data set with the images of the split valid in train, too, after train's own.

        Raises ``UserError`` if one of the two does not exist.
        """
        both = [*self.manifest.shards("train"), *self.manifest.shards("valid")]
        splits = {**self.manifest.splits, "train": both}
        return replace(self, manifest=replace(self.manifest, splits=splits))

    def batches(
        self,
        batch: int,
        *,
        split: str = "train",
        epochs: int | None = 1,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        streams: int | None = None,
        group_bytes: int = GROUP_BYTES,
        options: "ReadOptions | None" = None,
    ) -> "Batches":
        """Shuffled batches for training: ``for images, labels in data.batches(256): ...``.

        ``images`` is uint8 of shape ``(local_batch, channels, height, width)``; ``labels`` is int64
        of shape ``(local_batch,)``, -1 where there is no label. ``batch`` counts the images of all
        ranks together, and ``local_batch = batch / world_size``.

        One ``for`` gives ``epochs`` epochs, or never ends if it is None; the next ``for`` goes on
        with the next epochs, in another order. An epoch has no image twice. The images that fill no
        batch, fewer than ``batch``, are left out of it, others in each epoch. The order is a
        function of the data set, ``split``, ``seed``, ``batch``, ``streams`` and ``group_bytes``
        alone. So a position, which ``state_dict`` returns, may be continued with another number of
        ranks, and still every image comes exactly once.

        ``rank`` and ``world_size`` are those of torch.distributed when a ``for`` begins, if it is
        initialised, else 0 and 1. The number of ranks must divide ``streams``, the number of places
        that are read at once, which divides ``batch``. By default it is chosen from ``batch``, at
        most 32; more ranks need more. About ``group_bytes`` of images are shuffled together, over
        all ranks. ``options`` adds a cache of shards, or a number of damaged images to skip.

        Raises ``UserError`` if an argument is impossible, the split does not exist or has fewer
        images than a batch; while iterating, if the number of ranks does not divide ``streams``, or
        data is missing or damaged.
        """
        from pipeline.data.loader import Batches, chosen_ranks  # here: PyTorch takes long to import
        from pipeline.data.reader import STRICT

        return Batches(
            self,
            batch=batch,
            split=split,
            epochs=epochs,
            seed=seed,
            ranks=chosen_ranks(rank, world_size),
            streams=streams,
            group_bytes=group_bytes,
            options=options or STRICT,
        )

    def in_order(
        self,
        batch: int,
        *,
        split: str = "valid",
        rank: int | None = None,
        world_size: int | None = None,
        options: "ReadOptions | None" = None,
    ) -> "InOrder":
        """Every image of a split exactly once, for an evaluation; each ``for`` begins anew.

        Gives ``(images, labels)`` as ``batches`` does, at most ``batch`` images at a time on each
        rank; the last ones may be fewer. Each rank has a part of the split, in the order of the
        data set; the parts differ by at most one image. ``rank``, ``world_size`` and ``options``
        are as for ``batches``.

        Raises ``UserError`` if an argument is impossible or there is no such split; while
        iterating, if data is missing or damaged.
        """
        from pipeline.data.loader import InOrder, chosen_ranks
        from pipeline.data.reader import STRICT

        return InOrder(
            self,
            batch=batch,
            split=split,
            ranks=chosen_ranks(rank, world_size),
            options=options or STRICT,
        )
