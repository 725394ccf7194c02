"""What the command line's help, and a mistake in an option, cost: processor time of the process.

    python -m benchmarks.startup

Each line is the median over runs of user and system time together, in seconds. The last line is
JSON.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

CASES = {
    "help_s": (["--help"], 0),
    "command_help_s": (["train", "--help"], 0),
    "mistake_s": (["train", "model.windw=7x4"], 2),
}
"""The command lines, each with the exit code that it must have."""


def seconds(words: list[str], code: int) -> float:
    """Processor time of one process, with all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pipeline", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7, help="processes for each figure")
    arguments = parser.parse_args()
    figures = {}
    for name, (words, code) in CASES.items():
        seconds(words, code)  # fills the caches of the file system
        figures[name] = round(
            statistics.median(seconds(words, code) for _ in range(arguments.runs)), 3
        )
        print(f"vlae {' '.join(words):<24} {figures[name]:.3f} s", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
