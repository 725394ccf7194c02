"""Images of a data set that are equal, or nearly so, within a split and across splits.

Equal images have the same hash. For near-duplicates, each image is compared with those whose codes
are nearest: all pairs of codes can be compared, which all pairs of pixels cannot. Of these
candidates, a pair is a near-duplicate if its pixels differ by less than ``SAME`` of what is usual
between such neighbours, for both of its images. So the threshold follows the images: it is tight
where many resemble each other.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.data import DataSet
from pipeline.evaluation import sheets
from pipeline.evaluation.encoding import as_text
from pipeline.progress import progress_bar
from pipeline.retrieval.collection import Collection, images_at
from pipeline.retrieval.nearest import nearest
from pipeline.values import JsonObject

CANDIDATES = 20
"""Images with the nearest codes that each image is compared with."""
LONGEST = 24
"""Characters of a name that a caption shows, the last ones."""
SAME = 1 / 3
"""Part of the median difference to the candidates below which two images are nearly the same."""

Place = tuple[str, int]
"""An image: its split, and its number there."""


@dataclass(frozen=True)
class Pair:
    """Two images that are equal or nearly so."""

    first: Place
    second: Place
    difference: float
    """The root mean square difference of the pixels' values, 0 to 255; 0 if they are equal."""

    @property
    def across(self) -> bool:
        """Whether the images are of different splits: what was trained on is tested on."""
        return self.first[0] != self.second[0]


def duplicates(splits: Sequence[Collection], model: str, threads: int) -> list[Pair]:
    """All pairs, those across splits first, then by their difference.

    Of images that are equal, each is paired with the first one.
    """
    places = [(each.split, number) for each in splits for number in range(len(each.labels))]
    hashes = [digest for each in splits for digest in each.hashes]
    first: dict[bytes, int] = {}
    pairs = []
    for number, digest in enumerate(hashes):
        if first.setdefault(digest, number) != number:
            pairs.append(Pair(places[first[digest]], places[number], 0.0))
    # Copies would take the places of other candidates.
    kept = torch.tensor(sorted(first.values()))
    codes = torch.cat([each.codes[model] for each in splits])[kept]
    pixels = torch.cat([each.pixels for each in splits])[kept]
    for one, other, difference in _near(codes, pixels, threads):
        pairs.append(Pair(places[int(kept[one])], places[int(kept[other])], difference))
    return sorted(pairs, key=lambda pair: (not pair.across, pair.difference, pair.first))


def _near(codes: Tensor, pixels: Tensor, threads: int) -> list[tuple[int, int, float]]:
    """Pairs of near-duplicates of different images, and their differences."""
    count = len(codes)
    if count < 2:
        return []
    usual, found = torch.empty(count, dtype=torch.float64), dict[tuple[int, int], float]()
    searched = nearest(codes, codes, CANDIDATES, torch.arange(count), threads)
    with progress_bar(count, "duplicates") as bar:
        for start, _, numbers in searched:
            own = pixels[start : start + len(numbers), None].float()
            squares = (pixels[numbers].float() - own).square().mean(-1).double()
            differences = squares.sqrt()  # (block, candidates)
            part = differences.median(1).values
            usual[start : start + len(numbers)] = part
            for row, place in (differences < SAME * part[:, None]).nonzero().tolist():
                one, other = start + row, int(numbers[row, place])
                found[min(one, other), max(one, other)] = float(differences[row, place])
            bar.update(len(numbers))
    return [
        (one, other, difference)
        for (one, other), difference in found.items()
        if difference < SAME * min(usual[one], usual[other])
    ]


def table(pairs: Sequence[Pair], splits: Mapping[str, Collection]) -> bytes:
    """All pairs as a Parquet file: split, number and name of both images, and their difference."""
    columns: dict[str, pa.Array] = {}
    for place, ending in ((0, ""), (1, "_2")):
        found = [(pair.first, pair.second)[place] for pair in pairs]
        columns[f"split{ending}"] = pa.array([split for split, _ in found], pa.string())
        columns[f"sample{ending}"] = pa.array([number for _, number in found], pa.int64())
        names = [as_text(splits[split].name(number)) for split, number in found]
        columns[f"key{ending}"] = pa.array(names, pa.string())
    columns["difference"] = pa.array([pair.difference for pair in pairs], pa.float64())
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression="zstd")
    return file.getvalue()


def sheet(data: DataSet, pairs: Sequence[Pair], splits: Mapping[str, Collection]) -> bytes:
    """A PNG of pairs, each with where its images are and how they differ."""
    first, second = (
        torch.cat([images_at(data, split, [number]) for split, number in places])
        for places in ([pair.first for pair in pairs], [pair.second for pair in pairs])
    )
    return sheets.pairs(first, second, [_caption(pair, splits) for pair in pairs])


def _caption(pair: Pair, splits: Mapping[str, Collection]) -> str:
    """Where the two images are, and how they differ, in three lines."""
    lines = []
    for split, number in (pair.first, pair.second):
        name = as_text(splits[split].name(number))
        lines.append(f"{split} {name if len(name) <= LONGEST else '...' + name[-LONGEST:]}")
    differ = f"differ by {pair.difference:.1f} of 255" if pair.difference else "equal"
    return "\n".join([*lines, differ])


def summary(pairs: Sequence[Pair], names: Mapping[str, Collection], examples: int) -> JsonObject:
    """The numbers of equal and of nearly equal pairs, those across splits, and the first pairs."""
    kinds: dict[str, list[Pair]] = {"equal": [], "near": []}
    for pair in pairs:
        kinds["near" if pair.difference else "equal"].append(pair)
    across = {
        kind: dict(Counter(f"{p.first[0]} and {p.second[0]}" for p in found if p.across))
        for kind, found in kinds.items()
    }
    return {
        **{kind: len(found) for kind, found in kinds.items()},
        "across_splits": across,
        "examples": [
            {
                "splits": [pair.first[0], pair.second[0]],
                "images": [
                    names[split].name(number) for split, number in (pair.first, pair.second)
                ],
                "difference": pair.difference,
            }
            for pair in pairs[:examples]
        ],
    }
