"""What the registry tells of a model, a version, the check of a version, and a comparison."""

from dataclasses import asdict, dataclass

from pipeline.values import JsonObject, Measured

COMPARED = {"nll": "negative log-likelihood", "code_length": "code length", "rate": "rate"}
"""What is measured of both models on every image, in nats.

``nll`` decides; with one sample it equals ``code_length``.
"""
PARTS = ("version", "other", "difference")
"""The figures of each quantity: of both models, and of the first less the second."""


@dataclass(frozen=True)
class ModelSummary:
    """A registered model, as a list shows it."""

    name: str
    versions: int
    """The number of its versions."""
    aliases: dict[str, str]
    """The version that each alias stands for."""

    def to_json(self) -> JsonObject:
        return asdict(self)


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: int
    aliases: list[str]
    run: str | None
    """The address of the run that trained it."""
    tags: dict[str, str]
    parameters: dict[str, str]
    """The options of its training, such as ``model.window``, and the data set's checksum."""
    metrics: dict[str, float]
    """The figures of its evaluations, such as ``valid/elbo_nats``."""

    @property
    def reference(self) -> str:
        """``models:/NAME/NUMBER``, as commands and MLflow take it."""
        return f"models:/{self.name}/{self.number}"

    def to_json(self) -> JsonObject:
        fields = asdict(self)
        return {"name": fields.pop("name"), "version": fields.pop("number"), **fields}


@dataclass(frozen=True)
class Verification:
    """What the check of a version's files found."""

    version: int
    files: dict[str, int]
    """The size of each file that could be read, in bytes."""
    signed: bool
    """Whether there is a signature."""
    checked: bool
    """Whether a key to verify with was configured, so that the signature was checked."""
    problems: list[str]
    """A sentence for each damaged, missing or unsigned file; none if all is well."""

    def to_json(self) -> JsonObject:
        return asdict(self)


def format_comparison(comparison: JsonObject) -> str:
    """A comparison as a table."""
    data, k = comparison["dataset"], comparison["bounds"]["samples"]
    images = f"{comparison['num_images']:,} {data['split']} images of {data['url']}"
    version, other = f"version {comparison['version']}", f"version {comparison['other']}"
    lines = [
        f"{images}, binarization {data['binarization']}; nats per image:",
        f"  {'':<26}{version:>18}{other:>18}{'difference':>18}",
    ]
    for name, label in COMPARED.items():
        row = comparison["nats"][name]
        shown = "".join(f"{Measured.from_json(row, part).text(3):>18}" for part in PARTS)
        lines.append(f"  {label + f', k = {k}' * (name == 'nll'):<26}{shown}")
    difference = comparison["nats"]["nll"]["difference"]
    verdict = (
        "is better"
        if comparison["better"]
        else "is not better"
        if difference >= 0
        else "may be better, but not by two standard errors"
    )
    return "\n".join([*lines, f"{version} {verdict}"])
