"""How long each preset trains: processor time of a step, as a multiple of that of ``fast``.

    python benchmarks/presets.py [--rounds N]

Times are of one core, and the shortest of the rounds. The minutes are of 1,000,000 images by two
workers, from the speeds in docs/results.md: 478 images a second by ``fast`` on one core, and 1.51
times that on two. The last line is JSON.
"""

import argparse
import json
import time

import torch

import vlae
from pipeline import commands
from pipeline.config.options import to_dict

CASES = {
    "fast": ((1, 28, 28), "bernoulli", 16),
    "tiny": ((1, 28, 28), "bernoulli", 16),
    "grey": ((1, 28, 28), "logistic", 16),
    "colour": ((3, 32, 32), "logistic", 16),
    "paper_binary": ((1, 28, 28), "bernoulli", 16),
    "paper_cifar": ((3, 32, 32), "logistic", 4),
    "large": ((3, 64, 64), "logistic", 1),
}
"""The images that a preset is for, and how many are in a step here."""
PER_SECOND, TWO_CORES = 478, 1.51


def seconds_per_image(preset: str, rounds: int) -> float:
    """Processor time of a step, for each image."""
    shape, likelihood, batch = CASES[preset]
    options = to_dict(commands.load("train", [f"model={preset}"]))["model"]
    model = vlae.build(image_shape=shape, likelihood=likelihood, **options)
    optimizer = torch.optim.Adam(model.parameters())
    x, times = torch.rand(batch, *shape).round(), []
    for _ in range(rounds):
        start = time.process_time()
        optimizer.zero_grad()
        (-model(x, torch.randn(batch, model.latents)).elbo.mean()).backward()
        optimizer.step()
        times.append(time.process_time() - start)
    return min(times) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    result, fast = {}, seconds_per_image("fast", rounds)
    for preset in CASES:
        relative = seconds_per_image(preset, rounds) / fast
        minutes = 1_000_000 * relative / (PER_SECOND * TWO_CORES) / 60
        result[preset] = {"relative": relative, "minutes": minutes}
        print(f"{preset:<14}{relative:8.2f} times fast, {minutes:8.0f} minutes", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
