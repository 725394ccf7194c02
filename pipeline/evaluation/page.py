"""A page laid out in whole pixels, for figures that show images beside text and charts."""

from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.transforms import IdentityTransform
from torch import Tensor

from pipeline.data import images
from pipeline.evaluation.style import INK

DPI = 128
"""A power of two, so that a number of pixels in inches is exact."""
MARGIN, GAP = 32, 8
"""Pixels around a page's content, and between images."""
FRAME = "#9aa1ab"
"""Dark enough to bound a white image on a white page, where a browser shrinks the sheet as well."""
TITLE, HEADING, TEXT = 13, 10, 9
"""Font sizes in points."""


class Page:
    """A figure whose parts are placed by pixels, counted from the top left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.pixels = np.full((height, width, 3), 255, np.uint8)
        self.figure = Figure((width / DPI, height / DPI), DPI)
        self.figure.set_layout_engine("none")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = TEXT,
        color: str = INK,
        align: Literal["left", "center", "right"] = "left",
    ) -> None:
        """Write a line of text whose baseline is at ``y``."""
        self.figure.text(
            x,
            self.height - y,
            text,
            size=size,
            color=color,
            ha=align,
            va="baseline",
            transform=IdentityTransform(),
            parse_math=False,
        )

    def row(
        self, tiles: images.Pixels, left: int, top: int, frame: str = FRAME, width: int = 1
    ) -> None:
        """Place tiles in a row, each in a frame that lies outside it, ``width`` pixels wide.

        tiles: (num_tiles, height, width, 3).
        """
        _, tile_height, tile_width, _ = tiles.shape
        for number, tile in enumerate(tiles):
            x = left + number * (tile_width + GAP)
            self.fill(
                x - width, top - width, tile_width + 2 * width, tile_height + 2 * width, frame
            )
            self.pixels[top : top + tile_height, x : x + tile_width] = tile

    def fill(self, left: int, top: int, width: int, height: int, color: str) -> None:
        """Fill a rectangle with a colour."""
        self.pixels[top : top + height, left : left + width] = np.round(
            255 * np.array(to_rgb(color))
        )

    def axes(self, left: int, top: int, width: int, height: int) -> Axes:
        """Axes whose data area is the given rectangle."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height),
            facecolor="none",
        )

    def png(self) -> bytes:
        """The page as a PNG file, which depends on nothing but what is on the page."""
        self.figure.figimage(self.pixels, zorder=-1)
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return images.encode(np.asarray(canvas.buffer_rgba())[..., :3], "png")


def tiles(batch: Tensor, size: int) -> images.Pixels:
    """Images enlarged by a whole factor to about ``size`` pixels in height, in colour.

    batch: (num_images, 1 or 3, height, width), in [0, 1]; what lies beyond is clipped.
    """
    scale = max(1, round(size / batch.shape[-2]))
    colored = batch.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    pixels = (colored.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return pixels.repeat(scale, 1).repeat(scale, 2)


def text_width(text: str, size: float = TEXT) -> int:
    """How many pixels wide a text is on a page."""
    renderer = RendererAgg(1, 1, DPI)
    font = FontProperties(size=size)
    return round(renderer.get_text_width_height_descent(text, font, ismath=False)[0])
