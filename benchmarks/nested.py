"""One model at every rate against models trained for one rate each, on dynamically binarized MNIST.

    .venv/bin/python benchmarks/nested.py --folder nested

Trains a model of 32 latents with `train.nested=true`, and an ordinary one for each of `--latents`,
all with `experiment=study model.flow_depth=1`: the same images, as many of them, and the same
network apart from the size of its code. Trains on one core, without Ray; existing models are
reused. Then the nested model's codes are cut to the latents of each ordinary one, and the code
lengths of test images compared; and so is the distortion of lossy files with as many bits, of the
nested model and of the ordinary one of 32 latents. The last line is JSON.
"""

import argparse
import json
from pathlib import Path
from typing import Any

LATENTS = 32


def train(folder: str, name: str, *options: str) -> str:
    """The folder of a trained model."""
    from pipeline import commands
    from pipeline.runs import Run
    from pipeline.training import loop

    start = [f"storage.root={folder}", f"name={name}", "experiment=study", "model=fast"]
    typed = commands.load("train", [*start, "model.flow_depth=1", *options])
    run = Run.of(typed)
    if not run.storage.exists("model/model.safetensors"):
        loop.fit(typed)
    return run.url


def curve(url: str, lengths: list[int], images: int) -> dict[int, dict[str, Any]]:
    """The figures of a model's codes cut to each length, by the number of latents."""
    import torch

    from pipeline.config.sections import StorageOptions
    from pipeline.data.loader import EvalLoader
    from pipeline.evaluation.nested import measure_curve
    from pipeline.runs import Run, open_data

    opened = Run.at(url).open()
    data = open_data(opened, None, StorageOptions())
    rows = measure_curve(
        opened.network.eval(),
        lengths,
        EvalLoader(data, split="test", batch_size=16, num_images=images),
        binarization=opened.binarization,
        seed=0,
        device=torch.device("cpu"),
        threads=1,
        progress=lambda count: None,
    )
    return {row["latents"]: row for row in rows}


def distortion(url: str, bits: int, is_cut: bool, images: int) -> tuple[int, float]:
    """How many latents of a lossy file's codes are sent, and -log p(x|z) in nats per image."""
    import torch

    from pipeline.coding import compression, lossy
    from pipeline.config.sections import StorageOptions
    from pipeline.data.batch import binarize
    from pipeline.data.loader import EvalLoader
    from pipeline.runs import Run, open_data

    opened = Run.at(url).open()
    model, data = opened.network.eval(), open_data(opened, None, StorageOptions())
    (batch,) = EvalLoader(data, split="test", batch_size=images, num_images=images)
    x = binarize(batch, opened.binarization, 0)
    rates = compression.rate_bits(model, data, "test", opened.binarization)
    sent = compression.latents_within(rates, bits) if is_cut else model.latents
    codes = lossy.candidates(model, bits, 0, sent)
    numbers = lossy.unpack(lossy.encode(model, x, codes, 0), images, bits)
    z = lossy.whole(model, codes[torch.from_numpy(numbers)])
    with torch.no_grad():
        return sent, -model.decoder.log_prob(z, x).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="nested", help="folder for all data")
    parser.add_argument("--images", type=int, default=2000, help="test images to measure")
    parser.add_argument("--train-images", type=int, default=30_000, help="images of training")
    parser.add_argument(
        "--latents", type=int, nargs="+", default=[2, 4, 8, LATENTS], help="sizes of a code alone"
    )
    parser.add_argument(
        "--bits", type=int, nargs="+", default=[2, 4, 6, 8, 10, 12], help="lengths of lossy codes"
    )
    parser.add_argument("--lossy-images", type=int, default=500, help="test images of lossy files")
    parser.add_argument("--seed", type=int, default=0, help="the seed of training")
    arguments = parser.parse_args()
    import torch

    from pipeline import commands
    from pipeline.commands.images import shard

    torch.set_num_threads(1)
    folder = str(Path(arguments.folder).absolute())
    if not (Path(folder) / "datasets/mnist/manifest.json").exists():
        shard.run(commands.load("shard", [f"storage.root={folder}"]))
    common = [f"train.seed={arguments.seed}", f"train.images={arguments.train_images}"]
    of_nested = train(folder, f"nested-{arguments.seed}", "train.nested=true", *common)
    of_alone = {
        latents: train(
            folder, f"alone-{latents}-{arguments.seed}", f"model.latents={latents}", *common
        )
        for latents in arguments.latents
    }
    nested, rows = curve(of_nested, arguments.latents, arguments.images), []
    print(f"{'':<10}{'nested':^28}{'alone':^28}")
    print(f"{'latents':<10}" + 2 * f"{'rate, bits':<12}{'code, nats':<16}" + "difference")
    for latents, url in of_alone.items():
        cut, alone = nested[latents], curve(url, [latents], arguments.images)[latents]
        difference = cut["elbo_nats"] - alone["elbo_nats"]
        cells = [f"{latents:<10}"]
        for row in (cut, alone):
            length = f"{row['elbo_nats']:.2f} +- {row['elbo_nats_se']:.2f}"
            cells.append(f"{row['rate_bits']:<12.2f}{length:<16}")
        print("".join(cells) + f"{difference:+.2f}", flush=True)
        rows.append(
            {"latents": latents, "nested": cut, "alone": alone, "difference_nats": difference}
        )
    lossy = []
    print("distortion of lossy files in nats: nested, cut; nested, whole; alone, whole")
    for bits in arguments.bits:
        sent, cut = distortion(of_nested, bits, True, arguments.lossy_images)
        _, whole = distortion(of_nested, bits, False, arguments.lossy_images)
        row = {"bits": bits, "latents": sent, "cut_nats": cut, "whole_nats": whole}
        if LATENTS in of_alone:
            row["alone_nats"] = distortion(of_alone[LATENTS], bits, False, arguments.lossy_images)[
                1
            ]
        lossy.append(row)
        print(json.dumps(row), flush=True)
    print(json.dumps({"compared": rows, "lossy": lossy}))


if __name__ == "__main__":
    main()
