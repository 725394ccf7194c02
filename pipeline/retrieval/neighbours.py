"""The images whose codes are nearest to an image's: a table, a sheet, and scores by class."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline import noise
from pipeline.data import DataSet
from pipeline.data.reader import STRICT, Reader
from pipeline.data.records import Integers
from pipeline.errors import UserError
from pipeline.evaluation import sheets
from pipeline.evaluation.encoding import as_text
from pipeline.machine import device, num_threads
from pipeline.noise import Purpose
from pipeline.progress import progress_bar
from pipeline.retrieval.collection import Collection, images_at
from pipeline.retrieval.nearest import nearest, scores
from pipeline.values import JsonObject

PIXELS = "pixels"
"""The name of the comparison by pixels, beside those by the codes of models."""


def find(
    data: DataSet, split: str, wanted: Sequence[str | int], shown: int, seed: int
) -> list[int]:
    """The numbers of the images with these keys or numbers; ``shown`` drawn at random if none.

    Raises UserError if there is no such image.
    """
    total = data.manifest.num_samples(split)
    if not wanted:
        return sorted(noise.permutation((Purpose.SHOWN, seed), total)[:shown].tolist())
    reader, found = Reader(data, split, STRICT), []
    keys = reader.keys(np.arange(total)) if any(isinstance(each, str) for each in wanted) else None
    places = {key: number for number, key in enumerate(keys or ())}
    for each in wanted:
        number = places.get(each) if isinstance(each, str) else each
        if number is None or not 0 <= number < total:
            known = (
                f"its images are numbered 0 to {total - 1}"
                if keys is None
                else f"its names are such as {keys[0]}"
            )
            raise UserError(
                f"images: split {split} of data set {data.manifest.name} has no image {each!r};"
                f" {known}"
            )
        found.append(number)
    return found


def check(data: DataSet, split: str, among: str) -> None:
    """Raise UserError unless the splits exist, and each image has another to be compared with."""
    data.manifest.shards(split)
    if data.manifest.num_samples(among) < 1 + (split == among):
        raise UserError(
            f"split {among} of data set {data.manifest.name} has too few images to have neighbours;"
            " choose another with among="
        )


@dataclass(frozen=True)
class Search:
    """The first images of a split as queries, and the images that are searched."""

    data: DataSet
    queries: Collection
    items: Collection
    num_queries: int

    @property
    def own(self) -> Tensor | None:
        """The number of each query among the items; None if they are of another split."""
        return torch.arange(len(self.queries.labels)) if self.queries is self.items else None

    def spaces(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What queries and items are compared by: each model's codes, and pixels."""
        by_codes = {
            name: (self.queries.codes[name], self.items.codes[name]) for name in self.items.codes
        }
        return {**by_codes, PIXELS: (self.queries.pixels, self.items.pixels)}

    def table(self, model: str, k: int) -> bytes:
        """The k images nearest to each query by the codes of a model, as a Parquet file.

        A row for each pair: ``sample``, ``key``, ``rank`` from 1, ``neighbour``, ``neighbour_key``,
        ``distance``. Keys are omitted if images have no names.
        """
        file, writer, (codes, among) = io.BytesIO(), None, self.spaces()[model]
        own = None if self.own is None else self.own[: self.num_queries]
        found = nearest(codes[: self.num_queries], among, k, own, num_threads(device()))
        with progress_bar(self.num_queries, "neighbours") as bar:
            for start, distances, numbers in found:
                count, width = numbers.shape
                samples, neighbours = (
                    np.arange(start, start + count).repeat(width),
                    numbers.flatten(),
                )
                part = pa.table(
                    {
                        "sample": samples,
                        **_names("key", self.queries, samples),
                        "rank": pa.array(np.tile(np.arange(1, width + 1), count), pa.int32()),
                        "neighbour": neighbours.numpy(),
                        **_names("neighbour_key", self.items, neighbours.numpy()),
                        "distance": distances.flatten().numpy(),
                    }
                )
                writer = writer or pq.ParquetWriter(file, part.schema, compression="zstd")
                writer.write_table(part)
                bar.update(count)
        if writer is not None:
            writer.close()
        return file.getvalue()

    def scores(self) -> JsonObject:
        """The scores by class of each model's codes and of pixels; empty without classes."""
        labels = self.queries.labels[: self.num_queries]
        found = {
            name: scores(sought[: self.num_queries], labels, among, self.items.labels, self.own)
            for name, (sought, among) in self.spaces().items()
        }
        return {name: figures for name, figures in found.items() if figures}

    def sheet(self, shown: Sequence[int], k: int, labels: dict[str, str]) -> bytes:
        """A PNG of some queries beside their k nearest by each comparison, named by ``labels``."""
        chosen = torch.tensor(shown)
        own = None if self.own is None else self.own[chosen]
        found = {
            name: torch.cat([numbers for _, _, numbers in nearest(sought[chosen], among, k, own)])
            for name, (sought, among) in self.spaces().items()
        }
        known = bool((self.items.labels >= 0).any())
        agree = {
            labels[name]: self.items.labels[numbers] == self.queries.labels[chosen, None]
            for name, numbers in found.items()
        }
        rows = {
            labels[name]: images_at(
                self.data, self.items.split, numbers.flatten().tolist()
            ).unflatten(0, numbers.shape)
            for name, numbers in found.items()
        }
        images = images_at(self.data, self.queries.split, shown)
        return sheets.neighbours(images, rows, agree if known else None)


def _names(column: str, images: Collection, numbers: Integers) -> dict[str, pa.Array]:
    if images.keys is None:
        return {}
    return {column: pa.array([as_text(images.keys[n]) for n in numbers], pa.string())}
