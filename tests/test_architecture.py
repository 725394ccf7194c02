"""What import-linter's contracts cannot say: who may unpickle, and who may use Ray."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

USES_RAY = {
    "cluster.py",
    "data/sharding.py",
    "search/runner.py",
    "training/launch.py",
    "training/restarts.py",
    "training/watch.py",
}


def files(package: str) -> dict[str, Path]:
    """The modules of a package, by their path in it."""
    folder = ROOT / package
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The top-level names of the modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_only_what_runs_on_ray_imports_it() -> None:
    assert {name for name, path in files("pipeline").items() if "ray" in imports(path)} == USES_RAY


def test_nothing_is_unpickled() -> None:
    for package in ("vlae", "pipeline"):
        for name, path in files(package).items():
            text = path.read_text()
            assert "torch.load(" not in text
            assert "allow_pickle=True" not in text
            assert "pickle.load" not in text
            assert "pickle" not in imports(path), name


def test_no_module_and_no_package_grows_too_large() -> None:
    for package in ("vlae", "pipeline"):
        for path in files(package).values():
            assert len(path.read_text().splitlines()) <= 400, path
        for folder in {path.parent for path in files(package).values()}:
            assert len(set(folder.glob("*.py")) - {folder / "__init__.py"}) <= 16, folder
