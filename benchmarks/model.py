"""Training speed on one core: ours, the paper's architecture, and textbook models.

    .venv/bin/python benchmarks/model.py

All models see the same batches of 28x28 binary images. A step is forward, backward, clipping and
Adam. The models' steps are interleaved, and medians are reported in images per second. Each model
also runs with `torch.compile`, unless `--no-compile` is given. Ours also run with matrix products
in bfloat16 (`train.precision=bfloat16`). The textbook models are a factorized convolutional VAE,
and the same with a decoder of six masked 3x3 convolutions; both have 32 latents and a standard
normal prior. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.commands import load
from pipeline.machine import keep_freed_memory

BATCH, LATENTS = 16, 32


class TextbookVAE(nn.Module):
    """Convolutions down to 7x7, a code of 32, and back.

    With ``masked`` layers, the decoder also sees earlier pixels.
    """

    def __init__(self, masked: int = 0, channels: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 3, 2, 1),
            nn.ELU(),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1),
            nn.ELU(),
            nn.Flatten(),
            nn.Linear(2 * channels * 49, 2 * LATENTS),
        )
        self.unfold = nn.Linear(LATENTS, 2 * channels * 49)
        self.decoder = nn.Sequential(
            nn.ELU(),
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1),
            nn.ELU(),
            nn.ConvTranspose2d(channels, channels, 4, 2, 1),
        )
        self.masked = nn.ModuleList(
            nn.Conv2d(channels + (n == 0), channels, 3, padding=1) for n in range(masked)
        )
        self.mask: Tensor
        self.register_buffer("mask", torch.tensor([[1.0, 1, 1], [1, 1, 0], [0, 0, 0]]))
        self.head = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Minus the ELBO in nats, averaged over the batch."""
        mean, log_scale = self.encoder(x).chunk(2, -1)
        z = mean + log_scale.exp() * noise
        h = self.decoder(self.unfold(z).unflatten(1, (-1, 7, 7)))
        for number, layer in enumerate(cast("list[nn.Conv2d]", list(self.masked))):
            # Shifting the image by one pixel hides each pixel from itself in the first layer.
            seen = torch.cat([h, F.pad(x, (1, 0))[..., :-1]], 1) if number == 0 else h
            h = F.elu(F.conv2d(seen, layer.weight * self.mask, layer.bias, padding=1))
        distortion = F.binary_cross_entropy_with_logits(self.head(h), x, reduction="sum") / len(x)
        return distortion + (
            0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale
        ).sum() / len(x)


class Ours(nn.Module):
    """A model of our configuration, as a loss."""

    def __init__(self, option: str, bfloat16: bool = False) -> None:
        super().__init__()
        self.model = load("train", [option]).build((1, 28, 28))
        self.bfloat16 = bfloat16

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return -self.model(x, noise).elbo.mean()


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "fast": (lambda: Ours("model=fast"), 32),
    "fast, bfloat16": (lambda: Ours("model=fast", True), 32),
    "long": (lambda: Ours("experiment=long"), 32),
    "long, bfloat16": (lambda: Ours("experiment=long", True), 32),
    "paper_binary": (lambda: Ours("model=paper_binary"), 64),
    "textbook VAE": (TextbookVAE, LATENTS),
    "textbook PixelCNN decoder": (lambda: TextbookVAE(masked=6), LATENTS),
}


class Trainer:
    def __init__(self, make: Callable[[], nn.Module], latents: int, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model = make()
        self.loss = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.latents = latents

    def step(self, x: Tensor) -> float:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(x, torch.randn(len(x), self.latents)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 200.0)
        self.optimizer.step()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    trainers = {name: Trainer(make, latents, False) for name, (make, latents) in MODELS.items()}
    if not arguments.no_compile:
        trainers |= {
            f"{name}, compiled": Trainer(make, latents, True)
            for name, (make, latents) in MODELS.items()
        }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    generator = torch.Generator().manual_seed(0)
    for number in range(5 + arguments.rounds):
        x = (torch.rand(BATCH, 1, 28, 28, generator=generator) < 0.13).float()
        for name, trainer in trainers.items():
            taken = trainer.step(x)
            if number >= 5:  # the first steps compile and warm caches
                seconds[name].append(taken)
    rates = {name: round(BATCH / statistics.median(values), 1) for name, values in seconds.items()}
    for name, rate in rates.items():
        parameters = sum(p.numel() for p in trainers[name].model.parameters())
        print(
            f"{name:<36}{rate:>8.0f} images/s{parameters:>12,} parameters   "
            f"{rate / rates['fast']:>5.2f} x fast"
        )
    print(json.dumps({"batch": BATCH, "rounds": arguments.rounds, "images_per_s": rates}))


if __name__ == "__main__":
    main()
