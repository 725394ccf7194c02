"""The decoder's window: the earlier pixels that a pixel sees, and in what resolution."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

NOTATION = (
    "0x0, full, or WIDTHxHEIGHT such as 5x2; -downN and -grey may follow, as in 4x2-down2 or "
    "7x4-grey"
)
"""The notation of windows, for help and error messages."""

MAX_PIXELS = 1 << 20
"""Upper limit for the pixels of a window, which are kept as a list."""


@dataclass(frozen=True)
class Window:
    """An A x B window, in the notation of the VLAE paper.

    A pixel sees the block ``width`` wide and ``height`` tall directly above it, and some pixels
    before it in its own row. Block and row reach ceil((width - 1) / 2) columns to the left; the
    block reaches floor((width - 1) / 2) columns to the right.

    ``0x0`` sees nothing: the factorized decoder of an ordinary VAE. ``full`` sees every earlier
    pixel in raster order.

    ``down`` makes a *down-sampled* window, which section 3 of the paper proposes. Its unit is a
    cell of ``down`` x ``down`` pixels, 1 x ``down`` in the pixel's own row, of which only the mean
    is seen. The decoder then models the long range, and the detail has to go through z. A ``grey``
    window sees only the luminance, so that z has to carry the colour.

    Reference: Chen et al., *Variational Lossy Autoencoder*, ICLR 2017, arXiv:1611.02731,
    section 4.3.
    """

    width: int
    height: int
    full: bool = False
    down: int = 1
    grey: bool = False

    def __post_init__(self) -> None:
        if self.full:
            if self.down != 1:
                raise ValueError(
                    f"window {self} is not understood; a down-sampled window needs a size, such as "
                    "4x2-down2"
                )
            return
        if min(self.width, self.height) < 0 or (self.width == 0 and self.height > 0):
            raise ValueError(
                f"window {self} has no column; use 0x0 to see nothing, or WIDTHxHEIGHT such as 5x2"
            )
        if self.down < 1:
            raise ValueError(f"window {self} is down-sampled by {self.down}; it must be at least 1")

    @classmethod
    def parse(cls, text: str) -> "Window":
        """Read ``"7x4"``, ``"7x4-grey"``, ``"4x2-down2"``, ``"0x0"`` or ``"full"``.

        Raises ValueError on anything else.
        """
        match = re.fullmatch(
            r"(?:(full)|([0-9]{1,4})x([0-9]{1,4}))(?:-down([0-9]{1,3}))?(-grey)?", text
        )
        if not match:
            raise ValueError(f"window {text!r} is not understood; use {NOTATION}")
        full, width, height, down, grey = match.groups()
        return cls(int(width or 0), int(height or 0), bool(full), int(down or 1), bool(grey))

    def check_fits(self, height: int, width: int) -> None:
        """Raise ValueError if the window is larger than such an image, or than ``MAX_PIXELS``."""
        if self.width * max(1, self.height) * self.down**2 > MAX_PIXELS:
            raise ValueError(
                f"window {self} has more than {MAX_PIXELS:,} pixels; use a smaller one, or full"
            )
        if self.width * self.down > width or self.rows > height:
            raise ValueError(
                f"window {self} is larger than the image of {width}x{height} pixels "
                f"(width x height); use a window of at most {width}x{height} pixels, or full"
            )

    def check_stacks(self) -> None:
        """Raise ValueError if a stack of layers cannot cover exactly this window.

        A stack needs a row above and a pixel to the left, and no down-sampling.
        """
        if (
            not self.full
            and self.width > 0
            and (self.down != 1 or self.height < 1 or self.left < 1)
        ):
            raise ValueError(
                f"window {self} cannot be stacked from layers; use context_layers=0, or a window "
                "such as 5x2"
            )

    @property
    def rows(self) -> int:
        """The number of rows seen above."""
        return self.height * self.down

    @property
    def left(self) -> int:
        """The number of columns seen to the left."""
        return self.down * max(0, math.ceil((self.width - 1) / 2))

    @property
    def right(self) -> int:
        """The number of columns seen to the right, in the rows above."""
        return self.down * (max(0, (self.width - 1) // 2) + 1) - 1 if self.height else 0

    @cached_property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """The (row, column) offsets that are seen, in raster order, all before (0, 0)."""
        if self.full:
            raise ValueError("the full window has no fixed list of offsets")
        above = [
            (-row, column)
            for row in range(self.rows, 0, -1)
            for column in range(-self.left, self.right + 1)
        ]
        return tuple(above + [(0, -column) for column in range(self.left, 0, -1)])

    @cached_property
    def cells(self) -> tuple[int, ...]:
        """The number of the cell of each of ``offsets``; without down-sampling each has its own."""
        places = [
            ((-row + self.down - 1) // self.down, column // self.down)
            for row, column in self.offsets
        ]
        numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
        return tuple(numbers[place] for place in places)

    def __str__(self) -> str:
        size = "full" if self.full else f"{self.width}x{self.height}"
        return (
            size + (f"-down{self.down}" if self.down != 1 else "") + ("-grey" if self.grey else "")
        )
