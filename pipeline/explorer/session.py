"""Everything that the page can ask, answered as JSON objects: no HTTP here, and no state but what
is known about the data set.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

import vlae
from pipeline.config.evaluation import BoundOptions
from pipeline.data.batch import Batch
from pipeline.data.loader import EvalLoader
from pipeline.errors import UserError
from pipeline.evaluation.resolution import resolution
from pipeline.explorer.asked import MOST_DRAWS, MOST_IMAGES, MOST_STEPS, Question, to_text
from pipeline.explorer.exploring import SEED, Explored, scale
from pipeline.explorer.gallery import Gallery
from pipeline.explorer.population import Population
from pipeline.machine import device
from pipeline.runs import OpenedModel
from pipeline.values import JsonObject

logger = logging.getLogger(__name__)

ENCODED = 64
"""Images that are encoded at a time in the background: few, so that no answer waits long."""
REDRAWN = 16
"""Images that are redrawn at a time for the resolution: few, so that Ctrl-C need not wait."""
SHOWN_LATENTS = 64
"""The most latents that the page shows, those of the largest capacity."""


class Stopped(Exception):
    """What was measured is no longer wanted."""


class Session:
    """The models, the images and the codes of the first of them. Thread-safe."""

    def __init__(self, models: Sequence[OpenedModel], gallery: Gallery) -> None:
        """``models`` see images of the gallery's shape; its first images are encoded at once.

        Raises UserError if these are missing or damaged.
        """
        self.gallery = gallery
        self.models = [Explored(opened) for opened in models]
        self.shape = gallery.data.manifest.image_shape
        self.populations = [
            Population(gallery.num_known, model.network.latents) for model in self.models
        ]
        self.num_encoded = 0
        self.resolutions: list[JsonObject | None] = [None] * len(models)
        """What is known of the resolution of each model's codes."""
        loader = EvalLoader(
            gallery.data,
            split=gallery.split,
            batch_size=ENCODED,
            num_images=gallery.num_known,
        )
        self._batches: Iterator[Batch] = iter(loader)
        self._stopped = threading.Event()
        self.problem: str | None = None
        """Why not all images could be encoded or redrawn."""
        self._encode(next(self._batches))
        self.answers: Mapping[str, Callable[[Question], JsonObject]] = {
            "start": self.start,
            "progress": self.progress,
            "images": self.images,
            "find": self.find,
            "code": self.code,
            "redraw": self.redraw,
            "walk": self.walk,
            "neighbours": self.neighbours,
        }
        """What can be asked, by name. Each raises UserError."""

    def encode_next(self) -> bool:
        """Encode the next images with every model; returns whether there were any.

        Images that are missing or damaged end it: ``problem`` says which. To be called by one
        thread at a time.
        """
        try:
            batch = next(self._batches, None)
        except UserError as error:
            self.problem, batch = str(error), None
            logger.warning("no more images are encoded: %s", error)
        if batch is not None:
            self._encode(batch)
        return batch is not None

    def measure_resolutions(self) -> None:
        """Measure the resolution of every model's codes, as ``vlae evaluate`` does by default.

        Returns early once ``stop`` is called.
        """
        for number, model in enumerate(self.models):
            images = EvalLoader(
                self.gallery.data,
                split=self.gallery.split,
                batch_size=REDRAWN,
                num_images=BoundOptions.resolution_images,
            )
            try:
                found = resolution(
                    model.network,
                    images,
                    binarization=model.opened.binarization,
                    seed=SEED,
                    device=device(),
                    threads=1,
                    progress=self._check,
                )
            except Stopped:
                return
            except UserError as error:
                self.problem = str(error)
                return
            self.resolutions[number] = found.to_json()

    def stop(self) -> None:
        """End what is measured in the background."""
        self._stopped.set()

    def _check(self, images: int) -> None:
        if self._stopped.is_set():
            raise Stopped

    def _encode(self, batch: Batch) -> None:
        for model, population in zip(self.models, self.populations, strict=True):
            population.add(model.encode(model.see(batch)))
        self.num_encoded += len(batch.images)

    def start(self, question: Question) -> JsonObject:
        """What the page needs to know before it asks anything else."""
        manifest = self.gallery.data.manifest
        return {
            "dataset": manifest.name,
            "split": self.gallery.split,
            "images": self.gallery.size,
            "shape": list(self.shape),
            "named": self.gallery.names([0]) is not None,
            "binary": all(model.is_binary for model in self.models),
            "models": [
                {
                    "name": name,
                    "about": vlae.describe(model.network.arguments),
                    "raw_bits": model.raw_bits,
                }
                for name, model in zip(self._names(), self.models, strict=True)
            ],
            **self.progress(question),
        }

    def progress(self, question: Question) -> JsonObject:
        """How many images are encoded, how many will be, and which resolutions are measured."""
        return {
            "encoded": self.num_encoded,
            "to_encode": self.gallery.num_known,
            "resolutions": self.resolutions,
            "problem": self.problem,
        }

    def images(self, question: Question) -> JsonObject:
        """Consecutive images of the data set."""
        count = question.integer("count", 1, MOST_IMAGES)
        start = question.integer("start", 0, self.gallery.size - 1)
        return {"images": self._shown(range(start, min(start + count, self.gallery.size)))}

    def find(self, question: Question) -> JsonObject:
        """The next image whose name contains a text."""
        after = question.integer("after", -1, self.gallery.size)
        return {"sample": self.gallery.find(question.text("text"), after)}

    def code(self, question: Question) -> JsonObject:
        """An image as a model sees it, its bits, and its latents in the order of their capacity."""
        number, model = self._model(question)
        x, _ = self._image(question, "image", model)
        bits, posterior = model.measure(x), model.encode(x)
        return {
            "seen": to_text(x[0]),
            **bits.rate.to_json("rate_bits"),
            **bits.distortion.to_json("distortion_bits"),
            **bits.code_length.to_json("code_length_bits"),
            "latents": self._latents(number, posterior.code[0], scale(posterior)),
        }

    def redraw(self, question: Question) -> JsonObject:
        """Drawings of an image from its code, whose latents may have been moved, and their mean."""
        _, model = self._model(question)
        x, _ = self._image(question, "image", model)
        draws = question.integer("draws", 1, MOST_DRAWS)
        shown = question.integer("shown", 0, draws)
        moved = question.moved(model.network.latents)
        drawn = model.redraw(x, self._seed(question), draws, moved)
        return {
            "drawn": [to_text(image) for image in drawn[:shown]],
            "mean": to_text(drawn.mean(0)),
            "draws": draws,
        }

    def walk(self, question: Question) -> JsonObject:
        """Drawings on the way from one image's code to another's."""
        _, model = self._model(question)
        (x, _), (to, _) = (self._image(question, key, model) for key in ("image", "to"))
        steps = question.integer("steps", 2, MOST_STEPS)
        walked = model.walk(x, to, self._seed(question), steps)
        return {"drawn": [to_text(image) for image in walked]}

    def neighbours(self, question: Question) -> JsonObject:
        """The images whose codes are nearest to an image's, among those encoded so far."""
        number, model = self._model(question)
        x, sample = self._image(question, "image", model)
        count = question.integer("count", 1, MOST_IMAGES)
        code = model.encode(x).code[0]
        found = self.populations[number].nearest(code, count, sample)
        shown = self._shown([sample for sample, _ in found])
        return {
            "images": [
                {**image, "distance": distance}
                for image, (_, distance) in zip(shown, found, strict=True)
            ],
            "among": self.num_encoded,
        }

    def _latents(self, number: int, code: Tensor, scale: Tensor | None) -> list[JsonObject]:
        """Of each latent of one image its number, capacity, and place among all images.

        ``place`` and ``width`` are the mean and the standard deviation of the image's posterior, in
        units of the latent's spread over the images, from their mean; ``spread`` is that unit.
        """
        known = self.populations[number].latents()
        place = (code.double().cpu() - known.center) / known.spread
        width = None if scale is None else scale[0].double().cpu() / known.spread
        return [
            {
                "latent": latent,
                "capacity_bits": (
                    None if known.capacity_bits is None else known.capacity_bits[latent].item()
                ),
                "spread": known.spread[latent].item(),
                "place": place[latent].item(),
                "width": None if width is None else width[latent].item(),
            }
            for latent in known.order[:SHOWN_LATENTS]
        ]

    def _shown(self, samples: Sequence[int]) -> list[JsonObject]:
        """Images of the data set with their numbers, and names and labels if they have any."""
        if not samples:
            return []
        batch, names = self.gallery.read(samples), self.gallery.names(samples)
        classes = self.gallery.data.manifest.class_names or []

        def label(number: int) -> str | None:
            if number < 0:
                return None
            return classes[number] if number < len(classes) else str(number)

        return [
            {
                "sample": sample,
                "pixels": to_text(pixels),
                "label": label(int(number)),
                "name": names[place] if names else None,
            }
            for place, (sample, pixels, number) in enumerate(
                zip(samples, batch.images, batch.labels, strict=True)
            )
        ]

    def _names(self) -> list[str]:
        """A short name for each model, unless two would be the same."""
        whole = [model.opened.reference.removeprefix("models:/") for model in self.models]
        short = [
            name if model.opened.version else name.rstrip("/").rpartition("/")[2]
            for name, model in zip(whole, self.models, strict=True)
        ]
        return short if len(set(short)) == len(short) else whole

    def _model(self, question: Question) -> tuple[int, Explored]:
        number = question.integer("model", 0, len(self.models) - 1)
        return number, self.models[number]

    def _image(self, question: Question, key: str, model: Explored) -> tuple[Tensor, int | None]:
        """The image under ``key`` as the model sees it, (1, channels, height, width), and its
        number in the split, if it is of the data set."""
        image = question.image(key, self.shape)
        if isinstance(image, int):
            return model.see(self.gallery.image(image)), image
        return model.see(self.gallery.drawn(image)), None

    @staticmethod
    def _seed(question: Question) -> int:
        return question.integer("seed", 0, 2**31)
