"""What the registry tells of a model and of a version."""

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
