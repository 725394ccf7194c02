"""How much memory the driver of ``vlae shard`` needs for the names of very many files.

``.venv/bin/python benchmarks/listing.py --names 10000000`` lists simulated names, divides them into
splits, and reads the names of some shards. The last line is JSON.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator

from pipeline.data.sources.listing import Candidate, Listing


def names(count: int) -> Iterator[Candidate]:
    for number in range(count):
        folder = f"class-{number % 1000:04d}"
        key = f"{folder}/an-image-with-a-name-of-usual-length-{number:012d}.jpg"
        yield Candidate(key, "", "12345 1700000000000000000", label=number % 1000)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=10_000_000)
    count = parser.parse_args().names
    before, started = peak_mb(), time.monotonic()
    listing = Listing(mixed=True)
    listing.add_all(names(count))
    listing.name_labels()
    listing.divide(0.1, 1 / 6, "name")
    listing.sha256()
    listed = time.monotonic() - started
    shards = range(0, listing.counts["train"], max(5000, listing.counts["train"] // 100))
    for start in shards:
        listing.items("train", start, start + 5000)
    print(
        json.dumps(
            {
                "names": count,
                "peak_mb": round(peak_mb()),
                "before_mb": round(before),
                "seconds": round(listed, 1),
                "seconds_per_shard": round((time.monotonic() - started - listed) / len(shards), 4),
            }
        )
    )


if __name__ == "__main__":
    main()
