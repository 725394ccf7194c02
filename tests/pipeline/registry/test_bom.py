"""The bill of materials of a version: CycloneDX by its schema, and true to what it lists."""

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from pipeline.config.sections import RegistryOptions
from pipeline.errors import UserError
from pipeline.registry import tracking
from pipeline.registry.versions import Registry
from pipeline.storage.folder import FolderStorage
from tests.pipeline.models import FIGURES, prepare_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a version."""
    place = tmp_path_factory.mktemp("registry")
    options = RegistryOptions(
        f"sqlite:///{place}/registry.db", str(place / "artifacts"), license="CC-BY-4.0"
    )
    registry = Registry(options)
    registry.register("model", prepare_run(FolderStorage(place / "store"), 0))
    return registry.download("model", 1, place / "there")


@pytest.fixture
def bom(folder: Path) -> dict[str, Any]:
    materials: dict[str, Any] = json.loads((folder / "bom.json").read_text())
    return materials


def mistakes(bom: dict[str, Any]) -> object:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom))


def test_it_follows_the_schema_of_cyclonedx(bom: dict[str, Any]) -> None:
    assert mistakes(bom) is None
    wrong = copy.deepcopy(bom)
    wrong["metadata"]["component"]["modelCard"]["modelParameters"]["task"] = 3
    assert mistakes(wrong) is not None


def test_it_lists_every_other_file_with_its_sha256(folder: Path, bom: dict[str, Any]) -> None:
    listed = {
        each["name"]: each["hashes"][0]["content"]
        for each in bom["metadata"]["component"]["components"]
    }
    assert listed == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "bom.json"
    }


def test_it_tells_data_code_licences_and_figures(bom: dict[str, Any]) -> None:
    model = bom["metadata"]["component"]
    assert model["licenses"] == [{"expression": "CC-BY-4.0"}]
    components = {each["bom-ref"]: each for each in bom["components"]}
    assert components["data"]["hashes"] == [{"alg": "SHA-256", "content": "0" * 64}]
    assert components["vlae-pipeline"]["version"] == tracking.code_version()
    assert components["torch"]["licenses"]
    assert set(bom["dependencies"][0]["dependsOn"]) == components.keys()
    metrics = {
        each["type"]: each
        for each in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    }
    assert metrics.keys() == {key for key in FIGURES if key.endswith("_nats")}
    for key, metric in metrics.items():
        assert float(metric["value"]) == FIGURES[key]
        low, high = (
            float(metric["confidenceInterval"][f"{end}Bound"]) for end in ("lower", "upper")
        )
        assert math.isclose(high - low, 4 * FIGURES[f"{key}_se"])


@pytest.mark.parametrize("license", ["free", "MIT AND", "<b>", ""])
def test_a_licence_that_spdx_does_not_know_is_refused(tmp_path: Path, license: str) -> None:
    with pytest.raises(UserError, match=r"registry\.license"):
        Registry(RegistryOptions(f"sqlite:///{tmp_path}/registry.db", license=license))
