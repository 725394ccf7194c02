"""A nested model's codes, cut to their first latents: what each length costs, and what it keeps."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

import vlae
from pipeline.config.sections import Binarization
from pipeline.data.batch import Batch, binarize
from pipeline.data.loader import EvalLoader
from pipeline.evaluation.information import LN_2
from pipeline.evaluation.measure import map_batches
from pipeline.evaluation.moments import Moments
from pipeline.evaluation.page import GAP, MARGIN, TEXT, TITLE, Page
from pipeline.evaluation.pictures import BAR, CHART_HEIGHT, HEADER, RATE, shortened
from pipeline.evaluation.probe import Codes, accuracy_of_first, code_noise
from pipeline.evaluation.style import FAINT, INK, styled
from pipeline.values import JsonObject

BATCH = 16
"""Images in a batch; each has a code of every length."""
PICTURED = 10
"""The most images on the sheet of decodings."""
CHART_WIDTH = 520
"""Pixels of a chart."""


class Line(NamedTuple):
    """A line of a chart, of one figure of every row."""

    name: str
    color: str
    scale: float = 1.0


NATS = {
    "elbo_nats": Line("code length", INK),
    "distortion_nats": Line("distortion", BAR),
}
"""The lines of the first chart, by the key of their figure."""
KEPT = (
    ("linear probe, % right", "linear_accuracy", Line("linear probe", RATE, 100.0)),
    ("resolution, pixels", "resolution_px", Line("resolution", RATE)),
)
"""The other charts: the label of the axis, the key of the figure, its line."""


def lengths(latents: int) -> list[int]:
    """The numbers of latents that are measured: 0, 1, 2, 3, 4, 6, 8, 12, 16, ..., and all."""
    powers = [1 << exponent for exponent in range(latents.bit_length())]
    found = {0, latents, *powers, *(3 * power // 2 for power in powers)}
    return sorted(number for number in found if number <= latents)


def measure_curve(
    model: vlae.VLAE,
    numbers: list[int],
    loader: EvalLoader,
    *,
    binarization: Binarization,
    seed: int,
    device: torch.device,
    threads: int,
    progress: Callable[[int], object],
) -> list[JsonObject]:
    """Rate, distortion and code length of codes cut to some numbers of latents, in nats per image.

    One code of each image is drawn, and cut to every number.
    """
    dtype = next(model.parameters()).dtype
    sent = torch.tensor(numbers, device=device)[:, None]

    def bounds(batch: Batch) -> dict[str, Tensor]:
        x = binarize(batch, binarization, seed).to(device, dtype)
        noise = code_noise(model, batch, seed).to(device, dtype)
        with torch.no_grad():  # here, since the setting is per thread
            bound = model(x, noise.expand(len(numbers), -1, -1), sent)
        return {
            "rate": bound.rate.T,
            "distortion": bound.distortion.T,
            "elbo": -bound.elbo.T,
        }

    moments = Moments()
    for found in map_batches(bounds, loader, threads):
        moments.add(found)
        progress(len(found["rate"]))
    rows: list[JsonObject] = [{"latents": number} for number in numbers]
    for name in ("rate", "distortion", "elbo"):
        means, errors = moments.means(name).tolist(), moments.standard_errors(name)
        for row, mean, error in zip(rows, means, errors, strict=True):
            row |= {f"{name}_nats": mean, f"{name}_nats_se": error}
    for row in rows:
        row["rate_bits"] = row["rate_nats"] / LN_2
    return rows


def add_probes(rows: list[JsonObject], train: Codes, valid: Codes, test: Codes) -> None:
    """Add to each row of the curve the accuracy of a linear probe of so many latents' means."""
    for row in rows:
        if row["latents"]:
            accuracy = accuracy_of_first(train, valid, test, row["latents"])
            row |= accuracy.to_json("linear_accuracy")


@torch.no_grad()
def draw_decodings(
    model: vlae.VLAE, x: Tensor, rows: list[JsonObject], generator: torch.Generator
) -> bytes:
    """A picture of images above decodings of their codes, cut to each length of the curve.

    x: (num_images, channels, height, width).
    """
    state = generator.get_state()
    drawn = {}
    for row in rows:
        generator.set_state(state)  # the same noise for every length: they differ in what is sent
        noun = "latent" if row["latents"] == 1 else "latents"
        label = f"{row['latents']} {noun}, {row['rate_bits']:.1f} bits"
        drawn[label] = vlae.reconstruct(model, x[:PICTURED], generator, row["latents"])
    return shortened(x[:PICTURED], drawn)


@styled
def draw_curve(rows: list[JsonObject]) -> bytes:
    """Charts over the rate: code length and distortion and, where they were measured, the accuracy
    of the probe and the resolution.
    """
    charts = [("nats per image", NATS)]
    charts += [(label, {key: line}) for label, key, line in KEPT if _points(rows, key)]
    left, top, pitch = MARGIN + 72, MARGIN + HEADER + 24, CHART_WIDTH + 100
    page = Page(left + len(charts) * pitch - 100 + MARGIN + GAP, top + CHART_HEIGHT + 56 + MARGIN)
    page.text(MARGIN, MARGIN + 18, "One model at every rate", TITLE)
    told = "codes cut to their first latents; points are labelled with the number of latents"
    page.text(MARGIN, MARGIN + 46, told, TEXT, FAINT)
    # Not all of them: the points of the longest codes lie close together.
    labelled = {0, rows[-1]["latents"], *(1 << exponent for exponent in range(32))}
    for place, (unit, lines) in enumerate(charts):
        axes = page.axes(left + place * pitch, top, CHART_WIDTH, CHART_HEIGHT)
        for key, line in lines.items():
            points = _points(rows, key)
            rates = [row["rate_bits"] for row in points]
            heights = [line.scale * row[key] for row in points]
            axes.plot(rates, heights, color=line.color, marker="o", ms=4, label=line.name)
            for row, x, y in zip(points, rates, heights, strict=True):
                if row["latents"] in labelled and key != "distortion_nats":
                    axes.annotate(
                        str(row["latents"]),
                        (x, y),
                        (0, 6),
                        textcoords="offset points",
                        ha="center",
                        color=FAINT,
                        fontsize=TEXT - 1,
                    )
        axes.set_ylabel(unit, fontsize=TEXT)
        axes.set_xlabel("rate, bits per image", fontsize=TEXT)
        axes.tick_params(length=0, labelsize=TEXT)
        axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.margins(y=0.08)
        if len(lines) > 1:
            axes.legend(fontsize=TEXT)
    return page.png()


def _points(rows: list[JsonObject], key: str) -> list[JsonObject]:
    """The rows that have a figure of this name."""
    return [row for row in rows if row.get(key) is not None]
