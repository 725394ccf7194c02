"""The decoder's window: which earlier pixels a pixel may see."""

import math
import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Window:
    """An A x B window in the notation of the VLAE paper (Chen et al., 2017, arXiv:1611.02731, section 3.1).

    A pixel sees the block ``width`` wide and ``height`` tall directly above it, reaching ``left`` columns to the left
    and ``right`` columns to the right, and the ``left`` pixels before it in its own row:

        left = ceil((width - 1) / 2),   right = floor((width - 1) / 2)

    ``0x0`` sees nothing: the factorized decoder of an ordinary VAE. ``full`` sees every earlier pixel in raster order.
    """

    width: int
    height: int
    full: bool = False

    def __post_init__(self) -> None:
        if self.full:
            return
        if min(self.width, self.height) < 0 or (self.width == 0 and self.height > 0):
            raise ValueError(f"window {self} has no column; use 0x0 to see nothing, or WIDTHxHEIGHT such as 5x2")

    @classmethod
    def parse(cls, text: str) -> "Window":
        """Read ``"7x4"``, ``"0x0"`` or ``"full"``. Raises ValueError on anything else."""
        if text == "full":
            return cls(0, 0, full=True)
        match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", text)
        if not match:
            raise ValueError(f"window {text!r} is not understood; use 0x0, full, or WIDTHxHEIGHT such as 5x2")
        return cls(int(match[1]), int(match[2]))

    def check_fits(self, height: int, width: int) -> None:
        """Raise ValueError if the window is larger than an image of ``height`` x ``width`` pixels."""
        if self.width > width or self.height > height:
            raise ValueError(
                f"window {self} is larger than the image of {width}x{height} pixels (width x height); "
                f"use a window of at most {width}x{height}, or full"
            )

    @property
    def left(self) -> int:
        return max(0, math.ceil((self.width - 1) / 2))

    @property
    def right(self) -> int:
        return max(0, (self.width - 1) // 2)

    @cached_property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """The (row, column) offsets that are seen, in raster order; all of them earlier than (0, 0)."""
        if self.full:
            raise ValueError("the full window has no fixed list of offsets")
        above = [(-row, column) for row in range(self.height, 0, -1) for column in range(-self.left, self.right + 1)]
        return tuple(above + [(0, -column) for column in range(self.left, 0, -1)])

    def __str__(self) -> str:
        return "full" if self.full else f"{self.width}x{self.height}"
