"""Playing faults one by one: a line for each, and a line of JSON at the end."""

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

WIDTH = 46


def play(faults: Iterable[tuple[str, Callable[[], str]]]) -> tuple[int, int]:
    """Play each fault, by its name, and print its outcome, or why it failed; how many there were,
    and how many passed.
    """
    count = passed = 0
    for name, fault in faults:
        start = time.monotonic()
        try:
            outcome = fault()
            passed += 1
        except (AssertionError, subprocess.SubprocessError) as error:
            traceback.print_exc()
            outcome = f"FAILED: {error}"
        count += 1
        say(name, start, outcome)
    return count, passed


def say(name: str, start: float, outcome: str = "") -> None:
    """A line of the table: what was done since ``start``, and what came of it."""
    print(f"{name:<{WIDTH}} {time.monotonic() - start:5.1f} s  {outcome}".rstrip(), flush=True)


def finish(count: int, passed: int) -> NoReturn:
    """The last line, and the exit code."""
    print(json.dumps({"faults": count, "passed": passed}))
    sys.exit(passed < count)
