"""Write the files of pinned dependencies, with the sha256 of all their files: ``make lock``.

uv resolves what ``pyproject.toml`` asks for, for all systems and Python versions at once. What is
pinned already stays as it is; ``--upgrade-package NAME`` and uv's other arguments are passed on.

PyTorch has two builds of each version. The build with CUDA is on the package index; the packages
that it alone needs are in a file of their own. The build for CPUs is on PyTorch's own index, or in
a folder that pip knows of. ``torch`` has the hashes of both. uv finds those of the package index;
the others were added by hand, and are kept as long as the version is the same.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD, RUN, DEVELOPMENT, CUDA = FILES = (
    "constraints-build.txt",
    "constraints.txt",
    "constraints-dev.txt",
    "constraints-cuda.txt",
)
"""The files; together they pin every package once."""
BUILDERS = ("setuptools==",)
"""What builds packages without a wheel, and this project: installed before the others."""
CUDA_ONLY = ("cuda-", "nvidia-", "triton==")
HEADER = "# Written by `make lock`; install by `make install`.\n"
BLOCK = re.compile(r"^\w.*(?:\n[ \t]+\S.*)*", re.MULTILINE)
"""A pinned version and the lines of its hashes."""


def resolve(pinned: list[str], *arguments: str) -> list[str]:
    """The versions that uv chooses, those in ``pinned`` where possible, each with its hashes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pinned.txt"
        # Without the hashes: uv keeps those that it finds, and would not look for others.
        path.write_text("".join(block.split(" \\\n")[0] + "\n" for block in pinned))
        subprocess.run(
            [
                *("uv", "pip", "compile", "--quiet", "--no-config", "--universal"),
                *("--python-version", "3.11"),
                # One version of a package, even where later Pythons could have a later one.
                *("--fork-strategy", "fewest"),
                *("--generate-hashes", "--no-annotate", "--no-header", "--output-file", str(path)),
                *("pyproject.toml", *arguments),
            ],
            cwd=ROOT,
            check=True,
        )
        return BLOCK.findall(path.read_text())


def with_other_builds(block: str, pinned: list[str]) -> str:
    """``block`` with the hashes that ``pinned`` has for the same version besides."""
    first, *hashes = block.split(" \\\n    ")
    for other in pinned:
        same, *more = other.split(" \\\n    ")
        if same == first:
            hashes += more
    return " \\\n    ".join([first, *sorted(set(hashes))])


def main() -> None:
    paths = [ROOT / name for name in FILES if (ROOT / name).exists()]
    pinned = [block for path in paths for block in BLOCK.findall(path.read_text())]
    everything = resolve(pinned, "--extra", "dev", *sys.argv[1:])
    needed = {block.split("==")[0] for block in resolve(everything)}
    files: dict[str, list[str]] = {name: [] for name in FILES}
    for block in everything:
        if block.startswith(BUILDERS):
            files[BUILD].append(block)
        elif block.startswith(CUDA_ONLY):
            files[CUDA].append(block)
        elif block.startswith("torch=="):
            files[RUN].append(with_other_builds(block, pinned))
        else:
            files[RUN if block.split("==")[0] in needed else DEVELOPMENT].append(block)
    for name, chosen in files.items():
        (ROOT / name).write_text(HEADER + "\n".join(chosen) + "\n")


if __name__ == "__main__":
    main()
