"""Data goes one way: the imports say so."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"errors", "noise", "tar", "pieces"},
    {"goals"},
    {"config", "order", "images"},
    {"storage"},
    {"manifest", "cache", "store", "schedule", "optimizer", "cluster", "foreign", "receipts", "uploads"},
    {"reader", "sources"},
    {"loader", "checkpoint", "pictures", "search"},
    {"metrics"},
    {"measure", "learner", "tracking"},
    {"loop", "information", "probe", "card", "restarts"},
    {"versions", "train", "shard", "index", "data", "plan"},
    {"encode", "reconstruct", "sample", "theory"},
    {"evaluate"},
    {"registry", "report"},
    {"tune"},
    {"demo"},
    {"cli"},
]
"""The modules of ``pipeline``, each set importing only from those above it."""

USES_RAY = {"cluster", "restarts", "shard", "train", "tune", "encode"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, as dotted names; ``from pipeline import x`` counts as ``pipeline.x``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            found |= {f"pipeline.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def is_entry_point(path: Path, name: str) -> bool:
    """Whether a module's import of the command line is only its ``python -m`` entry."""
    return name == "pipeline.cli" and 'if __name__ == "__main__":\n    from pipeline.cli import main' in path.read_text()


def test_the_model_library_knows_nothing_of_the_pipeline() -> None:
    for path in (ROOT / "vlae").glob("*.py"):
        roots = {name.partition(".")[0] for name in imports(path)}
        assert not roots & {"pipeline", "configs", "ray", "boto3", "hydra", "omegaconf", "mlflow", "webdataset"}, path


def test_every_module_of_the_pipeline_imports_only_from_layers_before_its_own() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    files = {path.stem: path for path in (ROOT / "pipeline").glob("*.py") if path.stem != "__init__"}
    assert files.keys() == layer.keys()
    for stem, path in files.items():
        for name in imports(path):
            if name.startswith("pipeline.") and not is_entry_point(path, name):
                assert layer[name.removeprefix("pipeline.")] < layer[stem], f"{stem} imports {name}"


def test_only_what_runs_on_ray_imports_it() -> None:
    for path in (ROOT / "pipeline").glob("*.py"):
        if any(name.partition(".")[0] == "ray" for name in imports(path)):
            assert path.stem in USES_RAY


def test_nothing_is_unpickled_but_by_the_restricted_unpickler() -> None:
    for path in [*(ROOT / "vlae").glob("*.py"), *(ROOT / "pipeline").glob("*.py")]:
        text = path.read_text()
        assert "torch.load(" not in text
        assert "allow_pickle=True" not in text
        assert "pickle.load" not in text
        assert ("pickle" in {name.partition(".")[0] for name in imports(path)}) == (path.stem == "sources")
