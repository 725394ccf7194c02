"""``vlae plan``: estimate what a training run needs, before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.commands import AUTO, Command
from pipeline.config.model import ModelOptions, preset_for
from pipeline.config.options import option, require, section, to_dict
from pipeline.config.sections import Binarization
from pipeline.errors import UserError
from pipeline.values import JsonObject


@dataclass
class PlanConfig:
    """Estimate what a training run needs: shards, streams, batches, and memory of each worker."""

    num_images: int = option("training images of the data set", 50_000, at_least=1, below=1 << 40)
    image_size: int = option("their height and width in pixels", 28, at_least=1, below=1 << 14)
    channels: int = option("1 is grey, 3 is RGB", 1, at_least=1, below=1 << 10)
    binarization: Binarization = option(
        "as dataset.binarization; auto: dynamic for grey images, none for RGB", Binarization.auto
    )
    num_workers: list[int] = option(
        "numbers of workers; each gets a row in the table", [1, 2, 4, 8], at_least=1, below=1 << 20
    )
    local_batch: int = option("images of each worker in a step", 16, at_least=1, below=1 << 20)
    output: str = option("folder of the result", "outputs/plan", path=True)
    model: ModelOptions = section(ModelOptions, "the VLAE")

    def check(self) -> None:
        require(bool(self.num_workers), "num_workers is empty; give numbers of workers")


def follow(config: Any, presets: Mapping[str, str | None]) -> list[str]:
    """What ``auto`` stands for, by the shape of the images. See ``Command.follow``."""
    binarization = config.binarization
    if binarization is Binarization.auto:
        binarization = Binarization.none if config.channels > 1 else Binarization.dynamic
    followed = [f"binarization={binarization.value}"]
    if presets["model"] == AUTO:
        size = config.image_size
        followed.append(f"model={preset_for((config.channels, size, size), binarization)}")
    return followed


def run(config: PlanConfig) -> JsonObject:
    """A plan for each number of workers.

    Raises UserError if the model does not fit the images, or a plan is impossible.
    """
    from pipeline.training.plan import plans

    size = config.image_size
    try:
        model = config.model.build((config.channels, size, size), config.binarization)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    found = plans(model, config.num_images, config.num_workers, config.local_batch)
    return {"config": to_dict(config), **found}


def format_result(config: PlanConfig, result: JsonObject) -> str:
    """The plans as a Markdown table, with sizes in MB (10^6 bytes)."""
    counts = {
        "workers": "num_workers",
        "`train.num_streams`": "num_streams",
        "`train.global_batch`": "global_batch",
        "`shard.samples_per_shard`": "samples_per_shard",
        "shards": "num_shards",
        "steps per epoch": "steps_per_epoch",
        "shuffled together": "group_samples",
    }
    sizes = {
        "loader MB": "loader_bytes",
        "weights etc. MB": "state_bytes",
        "activations MB": "activation_bytes",
        "checkpoint MB": "checkpoint_bytes",
    }
    rows = [[*counts, *sizes], ["---:"] * (len(counts) + len(sizes))]
    for each in result["plans"]:
        rows.append(
            [f"{each[name]:,}" for name in counts.values()]
            + [f"{each[name] / 1e6:,.1f}" for name in sizes.values()]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


COMMAND = Command(PlanConfig, run, format_result, lambda config: config.output, follow=follow)
