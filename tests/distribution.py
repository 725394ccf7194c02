"""Checks that the wheel and the sdist hold every file that they should: ``make dist`` runs it.

The interpreter is one in which only the wheel is installed, without its dependencies.
"""

import sys
import tarfile
from importlib.metadata import distribution
from pathlib import Path

from vlae import pretrained

ROOT = Path(__file__).parents[1]
PACKAGES = ("configs", "pipeline", "vlae")
PROJECT_FILES = (
    "LICENSE",
    "README.md",
    "pyproject.toml",
    *(f"constraints{part}.txt" for part in ("", "-build", "-cuda", "-dev")),
)


def package_files() -> set[str]:
    """The files of the packages in this checkout, relative to it."""
    paths = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}


def wheel_files() -> set[str]:
    """The files of the packages that the installed wheel brought, relative to site-packages."""
    installed = distribution("vlae-pipeline").files or []
    return {str(path) for path in installed if path.parts[0] in PACKAGES and path.suffix != ".pyc"}


def sdist_files() -> set[str]:
    """The files of the sdist, relative to its folder."""
    (path,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(path) as file:
        return {member.name.partition("/")[2] for member in file if member.isfile()}


def main() -> None:
    expected = package_files()
    license_file = next(
        (p for p in distribution("vlae-pipeline").files or [] if p.name == "LICENSE"), None
    )
    problems = [f"the wheel lacks {name}" for name in sorted(expected - wheel_files())]
    problems += [
        f"the wheel holds {name}, which is not in the checkout"
        for name in sorted(wheel_files() - expected)
    ]
    problems += [
        f"the sdist lacks {name}"
        for name in sorted((expected | set(PROJECT_FILES)) - sdist_files())
    ]
    if license_file is None:
        problems.append("the wheel lacks LICENSE")
    for name in pretrained.names():
        try:
            pretrained.folder(name)  # holds its files to their checksums
        except ValueError as error:
            problems.append(str(error))
    if problems:
        sys.exit("\n".join(problems))
    print(f"the wheel and the sdist hold all {len(expected)} files of {', '.join(PACKAGES)}")


if __name__ == "__main__":
    main()
