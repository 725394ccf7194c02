"""How fast the loader gives batches of MNIST, from the embedded S3 server, on one core.

    .venv/bin/python benchmarks/loader.py

The last line is JSON: images per second over one epoch (median of several), and seconds to the first batch.
"""

import json
import os
import statistics
import tempfile
import time

from pipeline.config import Binarization
from pipeline.loader import TrainLoader, binarize
from pipeline.manifest import Manifest
from pipeline.shard import write_shard
from pipeline.sources import MnistSource
from pipeline.storage import open_storage
from pipeline.store import ObjectStore

EPOCHS, BATCH, SHARD = 5, 128, 5000


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ObjectStore(folder, "benchmark") as store:
        os.environ.update(store.environment())
        storage = open_storage("s3://benchmark/mnist")
        source = MnistSource()
        shards = tuple(
            write_shard(storage, source, "train", f"train/{start // SHARD:05d}.tar", start, start + SHARD, 250)
            for start in range(0, 50_000, SHARD)
        )
        manifest = Manifest("mnist", source.image_shape, 10, 250, {"train": shards})
        rates, firsts = {"plain": [], "binarized": []}, []
        for epoch in range(EPOCHS):
            for kind, values in rates.items():
                steps = 50_000 // BATCH
                loader = TrainLoader(storage, manifest, seed=epoch, global_batch=BATCH, num_streams=8, num_steps=steps)
                started = time.perf_counter()
                for batch in loader:
                    if batch.step == 0:
                        firsts.append(time.perf_counter() - started)
                    if kind == "binarized":
                        binarize(batch, Binarization.dynamic, epoch)
                values.append(steps * BATCH / (time.perf_counter() - started))
    print(
        json.dumps(
            {
                "images_per_s": round(statistics.median(rates["plain"])),
                "images_per_s_binarized": round(statistics.median(rates["binarized"])),
                "seconds_to_first_batch": round(statistics.median(firsts), 3),
                "epochs": EPOCHS,
            }
        )
    )


if __name__ == "__main__":
    main()
