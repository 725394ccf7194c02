"""Two forms of decoder: a wide window with per-pixel layers (ours), or masked 3x3 convolutions.

    .venv/bin/python benchmarks/decoder.py --seconds 60

The stack of masked convolutions is the paper's. Both decoders have the same width and get the same
code, on one core. First their training steps are timed alternately. Then each is trained on
dynamically binarized MNIST for the same time, and their bounds on 1,000 validation images are
compared. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlae
from pipeline.data.sources.mnist import MnistSource
from pipeline.machine import keep_freed_memory

BATCH, ROUNDS, LAYERS = 16, 20, 6


class MaskedStack(nn.Module):
    """The paper's context: masked 3x3 convolutions, of which the first excludes the pixel itself.

    Reference: van den Oord et al., 2016.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(1 if n == 0 else features, features, 3, padding=1) for n in range(LAYERS)
        )
        for number, layer in enumerate(self.layers):
            mask = torch.ones(3, 3)
            mask[1, 1 + (number > 0) :] = 0
            mask[2] = 0
            layer.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        h = x.contiguous(memory_format=torch.channels_last)
        for number, layer in enumerate(self.layers):
            out = F.conv2d(
                F.relu(h) if number else h, layer.weight * layer.mask, layer.bias, padding=1
            )
            h = h + out if number else out
        return h.permute(0, 2, 3, 1)


class Trainer:
    """A model and its optimizer, training on MNIST."""

    def __init__(self, images: Tensor, stacked: bool) -> None:
        torch.manual_seed(0)
        self.model = vlae.build(image_shape=(1, 28, 28), window="7x4", latents=16)
        if stacked:
            self.model.decoder.context = MaskedStack(64)  # type: ignore[assignment]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.images, self.generator = images, torch.Generator().manual_seed(1)

    def draw(self) -> Tensor:
        x = self.images[torch.randint(len(self.images), (BATCH,), generator=self.generator)]
        return (torch.rand(x.shape, generator=self.generator) < x).float()

    def step(self, done: float = 0.0) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - done))
        bound = self.model(self.draw(), torch.randn(BATCH, 16, generator=self.generator))
        loss = vlae.training_loss(
            bound, bound.rate.mean().detach(), 10.0 if done < 0.4 else 0.0, 1.0
        )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 200.0)
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    keep_freed_memory()
    torch.set_num_threads(1)
    source = MnistSource()
    images = torch.from_numpy(source.read("train", 0, 50_000)[0]).permute(0, 3, 1, 2).float() / 255
    valid = torch.from_numpy(source.read("valid", 0, 1000)[0]).permute(0, 3, 1, 2).float() / 255
    valid = (torch.rand(valid.shape, generator=torch.Generator().manual_seed(2)) < valid).float()

    trainers = {
        name: Trainer(images, stacked)
        for name, stacked in (("window", False), ("masked_3x3", True))
    }
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(ROUNDS):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            trainer.step()
            times[name].append(time.perf_counter() - started)
    speed = {name: BATCH / statistics.median(values) for name, values in times.items()}

    code_length, seen = {}, {}
    for name, stacked in (("window", False), ("masked_3x3", True)):
        trainer, started, steps = Trainer(images, stacked), time.perf_counter(), 0
        while (done := (time.perf_counter() - started) / seconds) < 1:
            trainer.step(done)
            steps += 1
        noise = torch.randn(1, len(valid), 16, generator=torch.Generator().manual_seed(3))
        code_length[name] = -vlae.estimate(trainer.model, valid, noise).elbo.mean().item()
        seen[name] = steps * BATCH
    print(
        json.dumps(
            {
                "images_per_s": {name: round(value) for name, value in speed.items()},
                "speed_ratio": round(speed["window"] / speed["masked_3x3"], 2),
                "seconds": seconds,
                "images_seen": seen,
                "valid_code_length_nats": {
                    name: round(value, 2) for name, value in code_length.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()
