"""What the registry tells of a model, of a version, and of the check of a version."""

from dataclasses import asdict, dataclass

from pipeline.values import JsonObject


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
