"""Files against the bound and against other coders, on binary MNIST and 8-bit Fashion-MNIST.

    .venv/bin/python benchmarks/coding.py --fashion /usr/share/datasets/fashion-mnist

Trains a model for each window of `--windows` and each data set (without Ray, on one core), unless
the folder holds it. Then compresses the first `--images` test images in one block on one thread,
decompresses them, compares every pixel, and times both. MNIST is binarized once, with seed 0.

Peers compress the same images. Each image coder gets every image alone and all images on one sheet,
and the smaller total counts; zstd and xz get all images as one string, of packed bits if they are
binary. What an image coder wrote is read back and compared with the sheet. JPEG XL takes part if
the package `pillow-jxl-plugin` can be imported, which the product does not depend on:

    .venv/bin/pip install --no-deps --target peers pillow-jxl-plugin
    PYTHONPATH=peers .venv/bin/python benchmarks/coding.py

A learned coder takes part if `--bits-back CLONE` gives a clone of BB-ANS's own code (see
`benchmarks/bits_back.py`), with the model that its authors trained on binary MNIST. It is slow: it
gets the first 1,000 of the images, and its initial bits are not counted.

`FOLDER/coding-*.png` stacks, for each model, the bits in z, the bits in x given z, and what the
file takes beyond the bound, beside the peers. `FOLDER/lossy-*.png` shows images redrawn from codes
of 8 to 20 bits by each model, and from codes of 16 bits by all, and the smallest files that lossy
image coders write. The last line is JSON. Its bits include initial bits, but no header.
"""

import argparse
import io
import json
import lzma
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
DATA = {
    "binary_mnist": (["dataset=mnist"], 180_000),
    "fashion_mnist": (
        ["dataset=idx", "dataset.name=fashion", "dataset.binarization=none"],
        120_000,
    ),
}
"""The options of each data set, and the images that a model is trained on."""
LEARNED = 1000
"""The images that the learned peer gets."""
LENGTHS = [8, 12, 16, 20]
"""The bits of the codes from which images are redrawn."""
COMPARED = "16 bits, sample"
"""The row of each window that is shown beside those of the others."""


def train(folder: str, data: str, window: str, fashion: str, images: int | None) -> str:
    """The folder of a trained model."""
    from pipeline import commands
    from pipeline.commands.images import shard
    from pipeline.config.options import to_dict
    from pipeline.runs import Run
    from pipeline.training import loop

    options, budget = DATA[data]
    options = [f"storage.root={folder}", *options]
    if data == "fashion_mnist":
        options += [f"dataset.path={fashion}"]
    name = f"{data}-{window}"
    typed = commands.load(
        "train",
        [
            *options,
            "model=fast",
            "train=standard",
            f"model.window={window}",
            f"name={name}",
            f"train.images={images or budget}",
        ],
    )
    if not (Path(to_dict(typed)["dataset"]["url"]) / "manifest.json").exists():
        shard.run(commands.load("shard", [each for each in options if "binarization" not in each]))
    run = Run.of(typed)
    if not run.storage.exists("model/model.safetensors"):
        loop.fit(typed)
    return run.url


def measure(url: str, images: int, samples: int) -> tuple[dict[str, Any], Pixels]:
    """The figures of one model, and the images that it compressed, (count, height, width)."""
    import torch

    from pipeline import noise
    from pipeline.coding import blocks
    from pipeline.coding.compression import ready
    from pipeline.config.sections import StorageOptions
    from pipeline.data.batch import binarize
    from pipeline.data.loader import EvalLoader
    from pipeline.noise import Purpose
    from pipeline.runs import Run, open_data
    from vlae.objective import estimate

    torch.set_num_threads(1)
    opened = Run.at(url).open()
    model = ready(opened.network)
    data = open_data(opened, None, StorageOptions())
    loader = EvalLoader(data, split="test", batch_size=50, num_images=images)
    parts, sums = [], np.zeros(3)
    for batch in loader:
        x = binarize(batch, opened.binarization, 0)
        parts.append(x)
        normal = np.stack(
            [
                noise.normal((k, Purpose.IMPORTANCE), batch.samples, model.latents)
                for k in range(samples)
            ]
        )
        found = estimate(model, x, torch.from_numpy(normal))
        each = (found.distortion, found.rate, found.slack)
        sums += [value.double().sum().item() / math.log(2) for value in each]
    x = torch.cat(parts)
    count, size = len(x), x[0].numel()
    begin = time.perf_counter()
    block = blocks.encode(model, x, 0, 0)
    middle = time.perf_counter()
    back = blocks.decode(model, block, count, 0, 0)
    end = time.perf_counter()
    assert torch.equal(back, x)
    distortion, rate, slack = sums / count
    length = 8 * len(block.payload) / count
    figures = {
        "bits_per_dim": length / size,
        "elbo_bits_per_dim": (distortion + rate) / size,
        "initial_bits": block.initial_bits,
        "encode_images_per_s": count / (middle - begin),
        "decode_images_per_s": count / (end - middle),
        "bits_per_image": length,
        "distortion_bits": distortion,
        "rate_bits": rate,
        "slack_bits": slack,
        "overhead_bits": length - block.initial_bits / count - distortion - rate,
    }
    return figures, blocks.to_bytes(x)[:, 0]


def has_jpeg_xl() -> bool:
    """Whether Pillow can write JPEG XL, by a plugin."""
    try:
        import pillow_jxl  # noqa: F401  (registers the format)
    except ImportError:
        return False
    return True


def coded(pixels: Pixels, form: str, mode: str, **settings: Any) -> tuple[int, Pixels]:
    """The bytes of an image in a format of Pillow's, and its pixels as they are read back."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode, dither=Image.Dither.NONE).save(file, form, **settings)
    with Image.open(file) as image:
        return len(file.getvalue()), np.asarray(image.convert("L"))


def peers(images: Pixels) -> dict[str, float]:
    """Bits a dimension of each general-purpose coder."""
    is_binary = bool(np.isin(images, (0, 255)).all())
    coders: dict[str, Callable[[Pixels], tuple[int, Pixels]]] = {
        "png": partial(coded, form="PNG", mode="1" if is_binary else "L", optimize=True),
        "webp": partial(coded, form="WEBP", mode="RGB", lossless=True, quality=100, method=6),
        "avif": partial(
            coded,
            form="AVIF",
            mode="L",
            quality=100,
            subsampling="4:0:0",
            range="full",
            speed=3,
        ),
    }
    if has_jpeg_xl():
        coders["jpeg_xl"] = partial(coded, form="JXL", mode="L", lossless=True, effort=9)
    else:
        print("JPEG XL is left out: pillow-jxl-plugin is not installed")
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[1:]
    sheet = np.zeros((rows * columns, height, width), np.uint8)
    sheet[: len(images)] = images
    sheet = sheet.reshape(rows, columns, height, width).swapaxes(1, 2)
    sheet = np.ascontiguousarray(sheet.reshape(rows * height, columns * width))
    found = {}
    for name, code in coders.items():
        of_sheet, back = code(sheet)
        assert np.array_equal(back, sheet), f"{name} is not lossless"
        found[name] = min(sum(code(image)[0] for image in images), of_sheet)
    import pyarrow

    content = (np.packbits(images > 0) if is_binary else images).tobytes()
    found["zstd"] = len(pyarrow.Codec("zstd", compression_level=22).compress(content, asbytes=True))
    found["xz"] = len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    return {name: 8 * size / images.size for name, size in found.items()}


def bits_back(clone: str, images: Pixels) -> float:
    """The bits per dimension of BB-ANS by its authors' code and model, on the first images."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, images[:LEARNED] != 0)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.bits_back", clone, file.name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"BB-ANS: {json.dumps(result)}", flush=True)
    return float(result["bits_per_dim"])


def draw(models: dict[str, dict[str, Any]], others: dict[str, float], path: Path) -> None:
    """Stack the bits of each model's files, beside the bits that peers take for an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = 2.5 + 0.8 * (len(models) + len(others))
    figure, axes = pyplot.subplots(figsize=(width, 4), layout="constrained")
    names, bottom = list(models), np.zeros(len(models))
    for key, label in (
        ("distortion_bits", "x given z"),
        ("rate_without_slack", "z"),
        ("slack_bits", "posterior slack"),
        ("overhead_bits", "beyond the bound"),
    ):
        values = [
            each["rate_bits"] - each["slack_bits"] if key == "rate_without_slack" else each[key]
            for each in models.values()
        ]
        axes.bar(names, values, bottom=bottom, label=label)
        bottom += np.maximum(values, 0)
    lengths = [each["bits_per_image"] for each in models.values()]
    axes.bar(list(others), list(others.values()), color="0.75", label="another coder")
    for name, length in zip([*names, *others], [*lengths, *others.values()], strict=True):
        axes.annotate(
            f"{length:.0f}", (name, length), (0, 3), textcoords="offset points", ha="center"
        )
    axes.set_ylabel("bits an image")
    axes.tick_params(axis="x", rotation=30)
    axes.margins(y=0.1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


def redraw(
    url: str, bits: list[int], count: int
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, dict[str, float]]]:
    """The first 16 of ``count`` test images, and for each code length what they are redrawn as,
    sampled and mode: (16, height, width) for each name.

    Also returns how much of the white is left in all of them: the mean over all pixels relative to
    the originals', and the share of images with less than a quarter of their original's.
    """
    import torch

    from pipeline.coding import blocks, lossy
    from pipeline.coding.compression import ready
    from pipeline.config.sections import StorageOptions
    from pipeline.data.batch import binarize
    from pipeline.data.loader import EvalLoader
    from pipeline.runs import Run, open_data

    opened = Run.at(url).open()
    model = ready(opened.network)
    data = open_data(opened, None, StorageOptions())
    (batch,) = EvalLoader(data, split="test", batch_size=count, num_images=count)
    x = binarize(batch, opened.binarization, 0)
    white = x.flatten(1).sum(1)
    found = {}
    files = [coded(image, "PNG", "L", optimize=True) for image in blocks.to_bytes(x)[:, 0]]
    png = sum(size for size, _ in files) / count
    rows = {f"original, {png:.0f} bytes as PNG": x}
    for length in bits:
        codes = lossy.candidates(model, length, 0)
        numbers = lossy.unpack(lossy.encode(model, x, codes, 0), len(x), length)
        z = codes[torch.from_numpy(numbers)]
        for most_likely in (False, True):
            name = f"{length} bits, {'mode' if most_likely else 'sample'}"
            rows[name] = lossy.redraw(model, z, 0, 0, most_likely)
            left = rows[name].flatten(1).sum(1)
            found[name] = {
                "white": (left.sum() / white.sum()).item(),
                "faint_images": (left < white / 4).double().mean().item(),
            }
    return {name: images[:16, 0].numpy() for name, images in rows.items()}, found


def smallest_files(images: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    """The images as lossy image coders give them back at their lowest quality."""
    forms = {"WebP": ("WEBP", "RGB", {"method": 6}), "AVIF": ("AVIF", "L", {"speed": 3})}
    if has_jpeg_xl():
        forms["JPEG XL"] = ("JXL", "L", {})
    rows = {}
    for name, (form, mode, settings) in forms.items():
        files = [
            coded(image, form, mode, quality=0, **settings)
            for image in (255 * images).round().astype(np.uint8)
        ]
        size = sum(size for size, _ in files) / len(files)
        back = np.stack([pixels for _, pixels in files]).astype(np.float32) / 255
        rows[f"{8 * size:.0f} bits, {name} at its lowest quality"] = back
    return rows


def show(rows: dict[str, npt.NDArray[np.float32]], path: Path) -> None:
    """Draw a row of images for each name."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9, 0.8 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        axis.imshow(np.concatenate(list(images), -1), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(name, fontsize=8, loc="left")
        axis.set_axis_off()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="coding", help="folder for all data")
    parser.add_argument("--fashion", help="folder of the IDX files of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=10_000, help="test images to compress")
    parser.add_argument("--samples", type=int, default=16, help="samples of the bound")
    parser.add_argument(
        "--windows", nargs="+", default=["5x2"], help="windows; the first is the one reported"
    )
    parser.add_argument("--bits-back", help="a clone of github.com/bits-back/bits-back")
    parser.add_argument("--train-images", type=int, help="number of training images")
    arguments = parser.parse_args()
    folder = str(Path(arguments.folder).absolute())
    result: dict[str, Any] = {}
    for data in DATA:
        if data == "fashion_mnist" and not arguments.fashion:
            continue
        accounts: dict[str, dict[str, Any]] = {}
        redrawn: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
        for window in arguments.windows:
            url = train(folder, data, window, arguments.fashion, arguments.train_images)
            figures, images = measure(url, arguments.images, arguments.samples)
            redrawn[window], figures["redrawn"] = redraw(url, LENGTHS, min(500, arguments.images))
            accounts[f"window {window}"] = figures
            print(f"{data} {window}: {json.dumps(figures)}", flush=True)
        original, first = next(iter(redrawn[window].items()))
        smallest = smallest_files(first)
        for window, rows in redrawn.items():
            show(rows | smallest, Path(folder) / f"lossy-{data}-{window}.png")
        by_window = {f"window {each}, {COMPARED}": redrawn[each][COMPARED] for each in redrawn}
        show({original: first} | by_window | smallest, Path(folder) / f"lossy-{data}.png")
        found = peers(images)
        if data == "binary_mnist" and arguments.bits_back:
            found["BB-ANS"] = bits_back(arguments.bits_back, images)
        print(f"{data} peers, bits/dim: {json.dumps(found)}", flush=True)
        result[data] = accounts[f"window {arguments.windows[0]}"] | {"peers": found}
        in_bits = {name: bits * images[0].size for name, bits in found.items()}
        draw(accounts, in_bits, Path(folder) / f"coding-{data}.png")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
