"""``vlae explore``: a page on loopback that shows what codes keep. It does not use Ray."""

from dataclasses import dataclass

from pipeline.commands import Command
from pipeline.config.evaluation import A_MODEL
from pipeline.config.options import option, require, section
from pipeline.config.sections import RegistryOptions, StorageOptions


@dataclass
class ExploreConfig:
    """Serve a page on this machine that shows what codes keep: images redrawn by models side by
    side, latents to move, neighbours, walks.
    """

    model: str | None = option(f"{A_MODEL}; for several, give models", None)
    models: list[str] = option("models to see side by side, each named as model is", [])
    split: str = option("the part of the data set: train, valid or test", "test")
    dataset_url: str | None = option(
        "another data set's folder; by default that of the first model's training", None, path=True
    )
    num_images: int = option(
        "images, the first ones, that neighbours are found among, and that say how far latents vary"
        " and what they tell",
        10_000,
        at_least=2,
        below=1 << 20,
    )
    port: int = option("its port on loopback; 0 is any free port", 8282, at_least=0, below=1 << 16)
    browser: bool = option("open the page in a browser", False)
    storage: StorageOptions = section(StorageOptions, "where data is stored")
    registry: RegistryOptions = section(RegistryOptions, "where models:/ looks")

    def check(self) -> None:
        """Raise UserError unless one of ``model`` and ``models`` is given."""
        require(
            (self.model is None) == bool(self.models),
            "give either model=MODEL or models=[MODEL,...]",
        )


def run(config: ExploreConfig) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns the exit code 0.

    Raises UserError if a model, the data set or the split does not exist, its images do not suit a
    model, or the port is taken.
    """
    import torch

    from pipeline.explorer.gallery import Gallery
    from pipeline.explorer.server import serve
    from pipeline.explorer.session import Session
    from pipeline.machine import keep_freed_memory
    from pipeline.registry.models import open_models

    keep_freed_memory()
    torch.set_num_threads(1)
    addresses = config.models or [str(config.model)]
    models, data = open_models(addresses, config.dataset_url, config.registry, config.storage)
    gallery = Gallery(data, config.split, config.num_images)
    serve(Session(models, gallery), config.port, config.browser)
    return 0


COMMAND = Command(ExploreConfig, run, lambda config, result: "", lambda config: "")
