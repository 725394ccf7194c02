"""The options of a search."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.compose import reason_of, unknown_option
from pipeline.config.goals import ON_THE_WAY, QUANTITIES, Goals
from pipeline.config.options import (
    check_all,
    describe,
    digest,
    identity,
    option,
    require,
    section,
    to_dict,
)
from pipeline.config.run import TrainConfig
from pipeline.errors import UserError
from pipeline.values import JsonObject


class Sampler(Enum):
    tpe = "tpe"
    random = "random"
    grid = "grid"


class Stopping(Enum):
    asha = "asha"
    median = "median"
    none = "none"


@dataclass
class SearchOptions:
    space: dict[str, Any] = option(
        "what is tried: options of model, optim and train with their values, as"
        " search.space.model.window=[3x1,5x2]",
        {},
    )
    objectives: list[str] = option(
        f"min or max, and one of {', '.join(QUANTITIES)}; several are traded off", ["min nll"]
    )
    constraints: list[str] = option("bounds on these quantities, as ['20 <= rate_bits <= 60']", [])
    sampler: Sampler = option(
        "how the next trial is chosen: by Optuna's TPE, at random, or every point in turn",
        Sampler.tpe,
    )
    stopping: Stopping = option(
        "which trials stop early. asha: those outside the top 1/reduction at a rung; median: those"
        " worse than the median at any validation",
        Stopping.asha,
    )
    num_trials: int = option("the most models that are trained", at_least=1, identity=False)
    hours: float | None = option(
        "the longest that the search may take; trials running then are interrupted, and resumed if"
        " it gets more time",
        None,
        above=0,
        identity=False,
    )
    core_hours: float | None = option(
        "the most core-hours that its trials may take together", None, above=0, identity=False
    )
    max_concurrent: int = option(
        "the most trials that run at once; 0 is as many as fit in the cluster",
        0,
        at_least=0,
        identity=False,
    )
    grace_fraction: float = option(
        "the fraction of a run before which no trial is stopped early; no trial is stopped before"
        " the end of its free bits and of its rate warm-up either, since they hold the rate up",
        0.25,
        above=0,
        at_most=1,
    )
    reduction: int = option("asha: one in this many trials continues at each rung", 3, at_least=2)
    samples: int = option(
        "k of the bound that finished trials are measured with; 1 is the code length", 8, at_least=1
    )
    num_images: int = option(
        "validation images that finished trials are measured on (all of them if there are fewer)",
        1000,
        at_least=2,
    )
    probe_images: int = option(
        "training images that the probes of labelled data are fitted on; 0 is no probe",
        2000,
        at_least=0,
    )

    def check(self) -> None:
        judged = self.goals.quantities
        require(
            self.stopping is Stopping.none or bool(judged.intersection(ON_THE_WAY)),
            f"search.stopping={self.stopping.value} compares trials while they run, when only"
            f" {', '.join(ON_THE_WAY)} are known: make one of them an objective, or use"
            " search.stopping=none",
        )
        require(
            "probe_accuracy" not in judged or self.probe_images > 0,
            "search.probe_images=0 fits no probe, but probe_accuracy is searched for; raise it",
        )

    @property
    def goals(self) -> Goals:
        return Goals.parse(self.objectives, self.constraints)

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The searched options by their dotted keys, each with its values, without repeats."""
        return {
            f"{part}.{name}": list({repr(value): value for value in values}.values())
            for part, options in self.space.items()
            for name, values in options.items()
        }

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination of the values, as dotted keys; the last key's values change first."""
        return (
            dict(zip(self.axes, values, strict=True))
            for values in itertools.product(*self.axes.values())
        )


MOST_POINTS = 20_000
"""How many combinations a search's space may have: each is checked before anything is trained."""


@dataclass
class TuneConfig(TrainConfig):
    """Search over the decoder's window, the latent size and the prior's depth, or others; register
    the best models.
    """

    search: SearchOptions = section(SearchOptions, "what is searched, and how")
    register_best: int = option(
        "the number of best models to register", 1, at_least=1, identity=False
    )
    model_name: str = option(
        "their name in the registry", "vlae-${dataset.name}", name=True, identity=False
    )

    def check(self) -> None:
        require(
            not self.train.with_valid,
            "train.with_valid=true trains on the validation images, which a search compares its"
            " models on; search without it, then train the best model with it by vlae train",
        )
        typed = self._typed_space()
        size = math.prod(map(len, typed.values()))
        require(
            size <= MOST_POINTS,
            f"search.space has {size:,} combinations; use fewer values, for at most"
            f" {MOST_POINTS:,}",
        )
        for values in itertools.product(*typed.values()):
            point = dict(zip(typed, values, strict=True))
            try:
                check_all(self._at(point))
            except UserError as error:
                tried = ", ".join(
                    f"{key}={value.value if isinstance(value, Enum) else value}"
                    for key, value in point.items()
                )
                raise UserError(f"{error} (search.space tries {tried})") from None

    @property
    def search_name(self) -> str:
        """The name given, or one made from the data set and all that the search depends on."""
        return self.name or f"{self.dataset.name}-search-{digest(self.search_identity())}"

    @property
    def grace_images(self) -> int:
        """The images that every trial sees before it can be stopped early.

        That is ``search.grace_fraction`` of a run, or longer, until no trial's loss holds its rate
        up: before, a code length includes nats that the model would not spend by itself, and
        the constraints on the rate say nothing about the model that the run ends with.
        """
        chosen = {
            key: values for key, values in self._typed_space().items() if key.startswith("train.")
        }
        held = max(
            self._at(dict(zip(chosen, point, strict=True))).train.held_fraction
            for point in itertools.product(*chosen.values())
        )
        budget = self.train.num_steps * self.train.global_batch
        return math.ceil(round(max(self.search.grace_fraction, held) * budget, 6))

    def search_identity(self) -> JsonObject:
        """What makes this search this one; its budget and concurrency are no part of it."""
        values = to_dict(self)
        judged = {key: values["train"][key] for key in ("valid_images", "valid_every")}
        searched = identity(SearchOptions, values["search"])
        return {**self.identity(), "valid": judged, "search": searched}

    def _typed_space(self) -> dict[str, list[Any]]:
        """The searched options with their values as a ``TrainConfig`` holds them.

        Raises UserError unless each is one that trials can differ in, and takes each of its values.
        """
        space, typed = self.search.space, dict[str, list[Any]]()
        known, trial = dict(describe(TrainConfig)), OmegaConf.structured(self._at({}))
        require(
            bool(space),
            "search.space is empty; give at least one option to vary, as"
            " search.space.model.window=[3x1,5x2]",
        )
        for part, options in space.items():
            require(
                isinstance(options, dict),
                f"search.space.{part} is {options}; write search.space.model.window=[3x1,5x2], and"
                " in YAML `model: {window: [3x1, 5x2]}`",
            )
            for name, values in options.items():
                key = f"{part}.{name}"
                shared = key in known and known[key].metadata["shared"]
                require(
                    part in ("model", "optim", "train") and not shared,
                    f"search.space.{key}: trials differ in options of model, optim and train, but"
                    " not in their budget or how they are watched",
                )
                require(
                    isinstance(values, list) and bool(values),
                    f"search.space.{key} is {values}; give a list of the values to choose from",
                )
                if key not in known:
                    raise UserError(f"search.space.{key}: {unknown_option(key, known)}")
                typed[key] = [_taken(trial, key, value) for value in values]
        return typed

    def _at(self, point: dict[str, Any]) -> TrainConfig:
        """The training run of a point of the space, whose values have their types."""
        parts: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(TrainConfig)
        }
        for key, value in point.items():
            part, _, name = key.partition(".")
            parts[part] = dataclasses.replace(parts[part], **{name: value})
        return TrainConfig(**parts)


def _taken(trial: DictConfig, key: str, value: Any) -> Any:
    """Give a searched option a value in the configuration of a trial; returns the value as the
    configuration holds it. Raises UserError if it is of another kind.
    """
    try:
        OmegaConf.update(trial, key, value)
        taken = OmegaConf.select(trial, key)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"search.space.{key}: {reason_of(error)}") from None
    plain = taken.value if isinstance(taken, Enum) else taken
    require(
        plain == value,
        f"search.space.{key}: {value!r} would be read as {plain!r}; write {plain!r}",
    )
    return taken
