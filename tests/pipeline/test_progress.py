"""Progress is redrawn in place on a terminal, and is a few lines in a log."""

import os
import pty
import re
import sys
import termios

import pytest

from pipeline import progress
from pipeline.progress import progress_bar


def count_to_a_thousand() -> None:
    with progress_bar(1000, "counting", initial=200, note="slowly") as bar:
        for _ in range(800):
            bar.update()


def test_a_log_has_a_line_at_the_start_and_at_the_end_and_no_carriage_return(
    capfd: pytest.CaptureFixture[str],
) -> None:
    count_to_a_thousand()
    first, last = capfd.readouterr().err.removesuffix("\n").split("\n")
    assert re.fullmatch(r"counting: 20% 200/1\.00k \[00:00<\?, \? images/s, slowly\]", first)
    assert re.fullmatch(r"counting: 100% 1\.00k/1\.00k \[00:00<00:00, .* images/s, slowly\]", last)


def test_a_long_count_adds_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    count_to_a_thousand()
    assert capfd.readouterr().err.count("\n") > 2


def test_a_slow_count_has_a_rate_too_and_not_seconds_for_each(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with progress_bar(2, "counting") as bar:
        bar.start_t -= 100  # as if it had begun earlier
        bar.update(2)
    assert "[01:40<00:00, 0.02 images/s]" in capfd.readouterr().err


def test_a_terminal_shows_a_bar_that_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    shown_by, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with os.fdopen(terminal, "w") as standard_error:
        monkeypatch.setattr(sys, "stderr", standard_error)
        count_to_a_thousand()
        standard_error.flush()
        shown = ""
        while "\n" not in shown:  # what was written comes in parts
            shown += os.read(shown_by, 1 << 16).decode()
    os.close(shown_by)
    assert "counting:  20%|" in shown
    assert "counting: 100%|" in shown
    assert shown.count("\n") == 1
    assert "\r" in shown.rstrip("\r\n")
