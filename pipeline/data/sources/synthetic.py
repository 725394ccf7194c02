"""Images drawn from a distribution whose entropy is known."""

import math

import numpy as np

from pipeline.config.sections import DatasetOptions, ShardOptions
from pipeline.data.sources.base import SPLITS, Images, ImageSource, Labels
from pipeline.errors import UserError
from pipeline.noise import Purpose, uniform
from pipeline.values import JsonObject


class SyntheticSource(ImageSource):
    """70,000 black and white images of ``vlae.synthetic.clouds``, split as MNIST is.

    The class of an image is its pattern. Each image depends on the seed and its number alone.
    """

    @classmethod
    def open(
        cls, dataset: DatasetOptions, options: ShardOptions, endpoint_url: str | None
    ) -> "SyntheticSource":
        if dataset.path:
            raise UserError(
                "dataset.source=synthetic draws its images itself; leave dataset.path out"
            )
        return cls(options.seed)

    def __init__(self, seed: int) -> None:
        from vlae.synthetic import clouds  # here, since other sources do not need PyTorch

        self._seed, self._distribution = seed, clouds()

    @property
    def description(self) -> JsonObject:
        return {"source": "synthetic", "seed": self._seed}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._distribution.image_shape

    @property
    def num_classes(self) -> int:
        return self._distribution.classes

    @property
    def splits(self) -> dict[str, int]:
        return {"train": 50_000, "valid": 10_000, "test": 10_000}

    def read(self, split: str, start: int, stop: int) -> tuple[Images, Labels]:
        import torch

        first = sum(
            count for name, count in self.splits.items() if SPLITS.index(name) < SPLITS.index(split)
        )
        key = (Purpose.SYNTHETIC, self._seed)
        noise = uniform(key, first + np.arange(start, stop), 1 + math.prod(self.image_shape))
        labels = (noise[:, 0] * self.num_classes).astype(np.int64)
        pixels = torch.from_numpy(noise[:, 1:].reshape(-1, *self.image_shape))
        images = self._distribution.draw(torch.from_numpy(labels), pixels)
        return (255 * images).to(torch.uint8).permute(0, 2, 3, 1).numpy(), labels
