"""The bill of materials of a registered version (ML-BOM), as CycloneDX 1.6 JSON.

It says what the version consists of and was made from: its files, the manifest of its data set, the
code and the libraries with their licences, its architecture, and what was measured. It states no
licence of the data set, which manifests do not hold.

https://cyclonedx.org/docs/1.6/json/
"""

import importlib.metadata
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime

import vlae
from pipeline.errors import UserError
from pipeline.registry import card
from pipeline.values import JsonObject, Measured
from vlae.files import WEIGHTS_FILE

BOM_FILE = "bom.json"
LIBRARIES = ("torch", "numpy", "safetensors")
"""The distributions that a model's weights are computed, and loaded, with."""
MEASURED = ("elbo_nats", "rate_nats", "distortion_nats", "iwae_nats")
"""The figures of an evaluation that the bill of materials repeats, in nats per image."""


def make(
    name: str,
    training: JsonObject,
    evaluation: JsonObject,
    origin: Mapping[str, str],
    files: Mapping[str, str],
    finished: datetime,
    license: str | None,
) -> JsonObject:
    """The bill of materials of a version of the model ``name``.

    training, evaluation: their records. origin: the version's tags. files: the sha256 of each of
    its files but this one. finished: when its training ended. license: an SPDX expression, of the
    model. The same arguments give the same document.
    """
    dataset, shape = training["config"]["dataset"], evaluation["image_shape"]
    libraries = [_library("vlae-pipeline", origin["code_version"]), *map(_library, LIBRARIES)]
    data = {
        "type": "data",
        "bom-ref": "data",
        "name": dataset["name"],
        "hashes": _hashes(training["manifest"]),
        "description": "the data set of the training; the hash is of its manifest.json, which holds"
        " those of its shards",
    }
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": files[WEIGHTS_FILE][:16],
        "hashes": _hashes(files[WEIGHTS_FILE]),
        **({"licenses": [{"expression": license}]} if license else {}),
        "components": [
            {"type": "file", "bom-ref": f"file:{file}", "name": file, "hashes": _hashes(digest)}
            for file, digest in sorted(files.items())
        ],
        "modelCard": {
            "modelParameters": {
                "task": "image representation and density estimation",
                "architectureFamily": "variational autoencoder",
                "modelArchitecture": vlae.describe(training["config"]["model"]),
                "datasets": [{"ref": "data"}],
                "inputs": [{"format": f"float32 (batch, {', '.join(map(str, shape))}) in [0, 1]"}],
                "outputs": [{"format": "float32 codes, and distributions of pixels"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(evaluation))},
            "considerations": {"technicalLimitations": card.limits(training, evaluation)},
        },
        "properties": [
            {"name": f"vlae:{key}", "value": value} for key, value in sorted(origin.items())
        ],
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, f"{name} {sorted(files.items())}").urn,
        "version": 1,
        "metadata": {
            "timestamp": finished.isoformat(),
            "tools": {"components": [libraries[0]]},
            "component": model,
        },
        "components": [data, *libraries],
        "dependencies": [
            {"ref": "model", "dependsOn": ["data", *(each["bom-ref"] for each in libraries)]}
        ],
    }


def check_license(expression: str | None) -> None:
    """Raise UserError unless ``expression`` is a licence in SPDX's terms, or none."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        if expression is not None:
            canonicalize_license_expression(expression)
    except InvalidLicenseExpression:
        raise UserError(
            f"registry.license={expression!r} is no licence that SPDX lists; write its identifier,"
            " such as Apache-2.0 or CC-BY-4.0, or LicenseRef-NAME for one of your own"
        ) from None


def _metrics(evaluation: JsonObject) -> Iterator[JsonObject]:
    """The figures, each with the interval of two standard errors around it."""
    split = evaluation["split"]
    for key in MEASURED:
        if key not in evaluation[split]:
            continue
        figure = Measured.from_json(evaluation[split], key)
        metric: JsonObject = {"type": key, "value": str(figure.value), "slice": split}
        if figure.error is not None:
            low, high = figure.value - 2 * figure.error, figure.value + 2 * figure.error
            metric["confidenceInterval"] = {"lowerBound": str(low), "upperBound": str(high)}
        yield metric


def _library(name: str, version: str | None = None) -> JsonObject:
    """An installed distribution, with the licence that it states."""
    found: JsonObject = {"type": "library", "bom-ref": name, "name": name}
    try:
        stated = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:  # this project, from a plain checkout
        return found | {"version": version or "unknown"}
    found["version"] = version or stated["Version"]
    if "License-Expression" in stated:
        found["licenses"] = [{"expression": stated["License-Expression"]}]
    elif classified := [
        each.rpartition(" :: ")[2]
        for each in stated.get_all("Classifier", [])
        if each.startswith("License :: ")
    ]:
        found["licenses"] = [{"license": {"name": each}} for each in classified]
    return found


def _hashes(sha256: str) -> list[JsonObject]:
    return [{"alg": "SHA-256", "content": sha256}]
