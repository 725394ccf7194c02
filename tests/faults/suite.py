"""Run faults one by one: a line for each, and a line of JSON at the end."""

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NoReturn

WIDTH = 46
"""Width of the table's column of names."""


def run(faults: Iterable[tuple[str, Callable[[], str]]]) -> tuple[int, int]:
    """Run each named fault, and print its outcome or why it failed.

    Returns the number of faults, and how many of them passed.
    """
    count = passed = 0
    for name, fault in faults:
        start = time.monotonic()
        try:
            outcome = fault()
            passed += 1
        except Exception as error:  # noqa: BLE001  (whatever ends a fault, the others are played)
            traceback.print_exc()
            outcome = f"FAILED: {error}"
        count += 1
        print_row(name, start, outcome)
    return count, passed


def print_row(name: str, start: float, outcome: str = "") -> None:
    """Print a row of the table: a name, the seconds since ``start``, and the outcome."""
    print(f"{name:<{WIDTH}} {time.monotonic() - start:5.1f} s  {outcome}".rstrip(), flush=True)


def finish(count: int, passed: int) -> NoReturn:
    """Print the line of JSON, and exit with 1 if a fault failed."""
    print(json.dumps({"faults": count, "passed": passed}))
    sys.exit(passed < count)
