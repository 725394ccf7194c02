"""The pictures that show what a model has learned, as PNG."""

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import vlae

MARGIN, GAP, LABEL_HEIGHT = 24, 6, 30
CHART_HEIGHT = 200
BAR, RATE, RULE = (122, 158, 201), (232, 140, 70), (222, 222, 222)
INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)
SEES = {
    "factorized": "sees no pixel ({window})",
    "covering": "sees the texture's window ({window})",
    "full": "sees every earlier pixel ({window})",
}


def reconstructions(originals: Tensor, drawn: list[Tensor], columns: int = 10) -> bytes:
    """Each original above several images drawn from its code: what the rows share is in z, what
    differs is not.

    originals: (num_images, channels, height, width), pixels in [0, 1]; drawn: a list of tensors
    like it.
    """
    blocks = []
    for start in range(0, len(originals), columns):
        part = slice(start, start + columns)
        blocks.append([_row(images[part]) for images in (originals, *drawn)])
    return _sheet(
        f"Top row of each block: originals. Below: {len(drawn)} decodings of the same code.", blocks
    )


def contact_sheet(images: Tensor, title: str, columns: int = 10) -> bytes:
    """Images of a data set; (num_images, channels, height, width), pixels in [0, 1]."""
    rows = [_row(images[start : start + columns]) for start in range(0, len(images), columns)]
    return _sheet(title, [[row] for row in rows])


DECODINGS = 3
"""How many times each code is decoded in a picture of reconstructions."""


def draw_samples(model: vlae.VLAE, num_images: int, generator: torch.Generator) -> bytes:
    """A picture of images drawn from the model."""
    return samples(vlae.sample(model, num_images, generator))


def draw_reconstructions(model: vlae.VLAE, x: Tensor, generator: torch.Generator) -> bytes:
    """A picture of images, as the model sees them, above decodings of their codes.

    x: (num_images, channels, height, width).
    """
    return reconstructions(x, [vlae.reconstruct(model, x, generator) for _ in range(DECODINGS)])


def samples(images: Tensor, columns: int = 10) -> bytes:
    """Images drawn from the model; (num_images, channels, height, width), pixels in [0, 1]."""
    return contact_sheet(images, "Samples: z from the prior, x from the decoder.", columns)


def latents(capacity: list[float], rate: list[float] | None, active: list[bool]) -> bytes:
    """A bar for each latent, the largest first: the most that it can tell of an image by itself, in
    bits.

    Where latents have rates of their own, these are narrow bars within the wide ones. Latents that
    are not active are pale.
    """
    order = sorted(range(len(capacity)), key=lambda latent: -capacity[latent])
    largest = max(capacity + (rate or []))
    step = next(
        (each for each in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2) if largest <= 5 * each), 5
    )
    lines = [step * number for number in range(max(1, math.ceil(largest / step)) + 1)]
    title = (
        f"The most that each latent can tell of an image, in bits; together {sum(capacity):.1f}."
    )
    title += f" {sum(active)} of {len(active)} are active." + (" Dark: its rate." if rate else "")
    font, small = ImageFont.load_default(16), ImageFont.load_default(12)
    pitch = max(4, min(26, 832 // len(order)))  # from one bar to the next
    left = MARGIN + 6 + math.ceil(max(small.getlength(f"{line:g}") for line in lines))
    right, top = left + len(order) * pitch, MARGIN + LABEL_HEIGHT + GAP
    width = max(right, MARGIN + math.ceil(font.getlength(title))) + MARGIN
    sheet = Image.new("RGB", (width, top + CHART_HEIGHT + LABEL_HEIGHT + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), title, INK, font)
    pixels_per_bit = CHART_HEIGHT / lines[-1]
    bottom = top + CHART_HEIGHT
    for line in lines:
        height = bottom - round(line * pixels_per_bit)
        draw.text((left - 6, height), f"{line:g}", FAINT, small, anchor="rm")
        draw.line((left, height, right, height), RULE)
    for place, latent in enumerate(order):
        begin, end = left + place * pitch, left + (place + 1) * pitch - pitch // 4 - 1
        for values, inset, color in ((capacity, 0, BAR), (rate, pitch // 4, INK)):
            height = round(values[latent] * pixels_per_bit) if values else 0
            if height > 0:
                fill = color if active[latent] else RULE
                draw.rectangle((begin + inset, bottom - height, end - inset, bottom - 1), fill)
        if pitch >= 20:
            draw.text(((begin + end) // 2, bottom + 5), str(latent), FAINT, small, anchor="mt")
    return _png(sheet)


def theory(
    figures: Mapping[str, Any],
    images: Mapping[str, Tensor],
    drawn: Mapping[str, Mapping[str, Tensor]],
) -> bytes:
    """Each decoder's code length as a bar of distortion and rate against the entropy, beside what
    it makes of some images' codes.

    figures: what ``vlae theory`` measured. images: rows of pictures by their names, each
    (num_images, 1, height, width), in [0, 1]; drawn: such rows for each decoder.
    """
    entropy, texture = figures["entropy"], figures["entropy_given_class"]
    title, font, small = (
        ImageFont.load_default(36),
        ImageFont.load_default(22),
        ImageFont.load_default(18),
    )
    count, _, size, _ = next(iter(images.values())).shape
    label_width, chart_width, row_height = 300, 760, 6 * size + GAP
    band = max(map(len, drawn.values())) * row_height + 28
    chart = 2 * MARGIN + label_width
    tiles = chart + chart_width + 170
    top = 170 + len(images) * row_height + 2 * MARGIN
    sheet = Image.new(
        "RGB", (tiles + count * row_height + 2 * MARGIN, top + len(drawn) * band + 110), PAPER
    )
    draw = ImageDraw.Draw(sheet)

    def paste(rows: Mapping[str, Tensor], top: int) -> None:
        for place, (name, row) in enumerate(rows.items()):
            y = top + place * row_height
            draw.text((tiles - 2 * GAP, y + row_height // 2), name, FAINT, small, anchor="rm")
            for number, image in enumerate(row[:, 0]):
                pixels = Image.fromarray((255 * image).round().to(torch.uint8).numpy()).convert(
                    "RGB"
                )
                scaled = pixels.resize(
                    (6 * pixels.width, 6 * pixels.height), Image.Resampling.NEAREST
                )
                sheet.paste(scaled, (tiles + number * row_height, y))

    draw.text((2 * MARGIN, 36), "What the decoder sees decides what the code carries", INK, title)
    known = (
        f"Images of known entropy: H = {entropy:.2f} nats, {figures['global_information']:.2f} of"
        " them global"
    )
    draw.text(
        (2 * MARGIN, 92),
        f"{known} (which of {figures['classes']} patterns), {texture:.2f} local texture.",
        FAINT,
        font,
    )
    legend = {"rate R: carried by the code z": RATE, "distortion D: left to the decoder": BAR}
    for y, (text, color) in zip((170, 206), legend.items(), strict=True):
        draw.rectangle((chart, y, chart + 24, y + 20), color)
        draw.text((chart + 36, y + 10), text, INK, font, anchor="lm")
    paste(images, 170)

    # The bars begin where something is to be seen: nats that all decoders spend on texture alike
    # are cut off.
    rows = [figures[name] for name in drawn]
    first = 2 * math.floor((min(texture, *(row["distortion"] for row in rows)) - 3) / 2)
    last = 2 * math.ceil(
        (max(entropy, *(row["code_length"] for row in rows), figures["without_z"]["covering"]) + 2)
        / 2
    )

    def at(nats: float) -> int:
        return chart + round((nats - first) / (last - first) * chart_width)

    bottom = top + len(drawn) * band
    step = next(each for each in (2, 4, 10, 20, 40, 100) if (last - first) / each <= 10)
    for tick in range(math.ceil(first / step) * step, last + 1, step):
        draw.line((at(tick), top, at(tick), bottom), RULE)
        draw.text((at(tick), bottom + 10), str(tick), FAINT, small, anchor="mt")
    draw.text(
        (chart + chart_width // 2, bottom + 40),
        "nats per image (the axis does not begin at 0)",
        FAINT,
        small,
        anchor="mt",
    )
    for name, row, y in zip(drawn, rows, range(top, bottom, band), strict=True):
        middle, half = y + band // 2, 34
        excess = f"C - H = {row['excess']:.2f}  ({100 * row['excess'] / entropy:.1f} %)"
        draw.text((2 * MARGIN, middle - 42), f"{name} decoder", INK, font, anchor="lm")
        draw.text(
            (2 * MARGIN, middle - 12),
            SEES[name].format(window=row["window"]),
            FAINT,
            small,
            anchor="lm",
        )
        terms = f"R = {round(row['rate'], 2) + 0.0:.2f}   D = {row['distortion']:.2f}"  # no -0.00
        draw.text((2 * MARGIN, middle + 22), terms, INK, small, anchor="lm")
        draw.text((2 * MARGIN, middle + 48), excess, INK, small, anchor="lm")
        begin, end = at(row["distortion"]), at(row["code_length"])
        draw.rectangle((at(first), middle - half, begin, middle + half), BAR)
        if end > begin:
            draw.rectangle((begin, middle - half, end, middle + half), RATE)
        without = figures["without_z"].get(name, math.inf)
        if without < last:
            draw.line((at(without), middle - half - 6, at(without), middle + half + 6), INK, 2)
            draw.text(
                (at(without), middle + half + 10), "least without z", FAINT, small, anchor="mt"
            )
        paste(drawn[name], y + 14)
    for nats, text, anchor in ((texture, "texture H(x|c)", "rb"), (entropy, "entropy H", "lb")):
        for y in range(top - 8, bottom, 14):
            draw.line(
                (at(nats), y, at(nats), min(y + (7 if nats == texture else 14), bottom)), INK, 3
            )
        draw.text(
            (at(nats) + (6 if anchor == "lb" else -6), top - 10), text, INK, small, anchor=anchor
        )
    return _png(sheet)


def side_by_side(
    originals: Tensor, models: Mapping[tuple[str, str], tuple[Tensor, Tensor]]
) -> bytes:
    """Models below each other: decodings of the same originals, which stand on top, and on the
    right images that each draws by itself.

    originals: (num_images, channels, height, width), pixels in [0, 1]; models: by two lines of text
    on each, two tensors like it.
    """
    title, small = ImageFont.load_default(20), ImageFont.load_default(16)
    tile = _row(originals[:1])[0]
    block, height = len(originals) * (tile.width + GAP), max(tile.height + 2 * GAP, 58)
    left = 2 * MARGIN + math.ceil(
        max(
            font.getlength(text)
            for words in models
            for text, font in zip(words, (title, small), strict=True)
        )
    )
    right = left + block + 2 * MARGIN
    sheet = Image.new(
        "RGB",
        (right + block + MARGIN, 2 * MARGIN + LABEL_HEIGHT + (len(models) + 1) * height + GAP),
        PAPER,
    )
    draw = ImageDraw.Draw(sheet)

    def paste(images: Tensor, x: int, y: int) -> None:
        for place, each in enumerate(_row(images)):
            sheet.paste(each, (x + place * (tile.width + GAP), y + (height - tile.height) // 2))

    top = MARGIN + LABEL_HEIGHT
    for x, text in (
        (left, "one decoding of each image's code"),
        (right, "drawn by the model: z from the prior, x from the decoder"),
    ):
        draw.text((x, MARGIN - 4), text, FAINT, small)
    draw.text((MARGIN, top + height // 2), "originals", INK, title, anchor="lm")
    paste(originals, left, top)
    draw.line((MARGIN, top + height + GAP // 2, right + block, top + height + GAP // 2), RULE, 2)
    for (name, figures), (decoded, samples) in models.items():
        top += height + (GAP if top == MARGIN + LABEL_HEIGHT else 0)
        draw.text((MARGIN, top + height // 2 - 2), name, INK, title, anchor="lb")
        draw.text((MARGIN, top + height // 2 + 4), figures, FAINT, small, anchor="lt")
        paste(decoded, left, top)
        paste(samples, right, top)
    return _png(sheet)


def _row(images: Tensor) -> list[Image.Image]:
    scale = max(1, round(56 / images.shape[-2]))
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    tiles = [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
    return [
        tile.resize((tile.width * scale, tile.height * scale), Image.Resampling.NEAREST).convert(
            "RGB"
        )
        for tile in tiles
    ]


def _sheet(title: str, blocks: list[list[list[Image.Image]]]) -> bytes:
    """A titled sheet of blocks of rows of tiles; the first row of a block with several is set off
    from the rest.
    """
    tile = blocks[0][0][0]
    columns = max(len(row) for block in blocks for row in block)
    font = ImageFont.load_default(16)
    between = 3 * GAP if len(blocks) > 1 and len(blocks[0]) > 1 else 0
    block_height = sum(tile.height + GAP for _ in blocks[0]) + between
    width = max(
        2 * MARGIN + columns * (tile.width + GAP) - GAP, 2 * MARGIN + round(font.getlength(title))
    )
    sheet = Image.new(
        "RGB", (width, 2 * MARGIN + LABEL_HEIGHT + block_height * len(blocks) - GAP), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), title, INK, font)
    top = MARGIN + LABEL_HEIGHT
    for block in blocks:
        for number, row in enumerate(block):
            for column, image in enumerate(row):
                left = MARGIN + column * (tile.width + GAP)
                if number == 0 and len(block) > 1:
                    draw.rectangle(
                        (left - 2, top - 2, left + tile.width + 1, top + tile.height + 1),
                        outline=FAINT,
                        width=2,
                    )
                sheet.paste(image, (left, top))
            top += tile.height + GAP
        top += between
    return _png(sheet)


def _png(sheet: Image.Image) -> bytes:
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
