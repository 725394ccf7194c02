"""Progress bars: redrawn in place on a terminal, and a line now and then in a log."""

import sys
from typing import Never, TextIO

from tqdm import tqdm

TERMINAL_SECONDS, LOG_SECONDS = 0.5, 30.0
"""Seconds between two displays on a terminal, and elsewhere, as in the log of a submitted job."""

# tqdm's own format turns a low rate into seconds per unit.
FIGURES = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
TERMINAL_FORMAT = f"{{l_bar}}{{bar}}| {FIGURES}"
LOG_FORMAT = f"{{desc}}: {{percentage:.0f}}% {FIGURES}"


class _Lines:
    """What tqdm draws, a line each time."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        if line := text.strip():
            self._file.write(f"{line}\n")

    def flush(self) -> None:
        self._file.flush()


def progress_bar(
    total: int, description: str, *, initial: int = 0, unit: str = "images", note: str | None = None
) -> "tqdm[Never]":
    """A bar on standard error that counts from ``initial`` to ``total``; ``note`` stands behind it
    until another is set.
    """
    is_terminal = sys.stderr.isatty()
    seconds = TERMINAL_SECONDS if is_terminal else LOG_SECONDS
    return tqdm(
        total=total,
        desc=description,
        initial=initial,
        unit=f" {unit}",
        unit_scale=True,
        postfix=note,
        file=None if is_terminal else _Lines(sys.stderr),
        bar_format=TERMINAL_FORMAT if is_terminal else LOG_FORMAT,
        dynamic_ncols=is_terminal,
        mininterval=seconds,
        maxinterval=max(10.0, seconds),  # tqdm's own, after which it draws whatever was counted
    )
