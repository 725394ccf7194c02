"""Drawing z from the autoregressive flow: unit by unit, or by repeating whole passes.

    .venv/bin/python benchmarks/flow.py

Draws 64 codes on one core and measures processor time. Both methods must give the same z. For codes
of maps, the benchmark also compares the form that a layer has in training, a gather and a matrix
product, with the same layer as a convolution. The last line is JSON.
"""

import json
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.machine import keep_freed_memory
from vlae.flow import AutoregressiveFlow, _scale_and_shift, turned
from vlae.networks.made import MapMADE

BATCH = 64
FLOWS: list[tuple[int | tuple[int, int, int], int, int]] = [
    (32, 2, 256),
    (32, 4, 256),
    (64, 2, 256),
    (64, 4, 256),
    (64, 4, 640),
    ((16, 8, 8), 6, 128),
]
"""Latents, depth and hidden units or maps; the last two are the sizes of the paper's priors."""


def naive_sample(flow: AutoregressiveFlow, noise: Tensor) -> Tensor:
    """z by a fixed-point iteration for each step.

    After pass i, the first i + 1 latents in the step's order are final.
    """
    for number, step in enumerate(flow.steps):
        noise = turned(noise, number)
        z = torch.zeros_like(noise)
        for _ in range(noise.shape[-1]):
            z = _scale_and_shift(noise, step(z))
        noise = turned(z, number)
    return noise


def convolution(made: MapMADE, x: Tensor) -> Tensor:
    """``made.forward``, but each layer is a masked convolution over two rows of three taps."""
    x = x.unflatten(-1, made.shape).contiguous(memory_format=torch.channels_last)
    for layer in (*made.hidden, made.head):
        taps = F.pad((layer.weight * layer.mask).unflatten(1, (5, -1)), (0, 0, 0, 1)).unflatten(
            1, (2, 3)
        )
        kernel = taps.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(
            F.pad(F.relu(x) if layer is not made.hidden[0] else x, (1, 1, 1, 0)), kernel, layer.bias
        )
    return x.unflatten(1, (made.shape[0], made.outputs)).transpose(1, 2).flatten(2)


def seconds(functions: dict[str, Callable[[], object]], *, rounds: int = 9) -> dict[str, float]:
    """The median processor time of each function; they are run alternately."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.process_time()
            function()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = []
    for latents, depth, hidden in FLOWS:
        flow = AutoregressiveFlow(latents, depth, hidden)
        for step in flow.steps:
            torch.nn.init.normal_(step.head.weight, std=0.01)
        size = latents if isinstance(latents, int) else math.prod(latents)
        # Over maps, the naive inversion of one step takes 1,024 passes, so only one step is timed,
        # once, and multiplied by their number.
        checked = flow if isinstance(latents, int) else AutoregressiveFlow(latents, 1, hidden)
        checked.load_state_dict(flow.state_dict(), strict=False)
        noise = torch.randn(BATCH, size)
        with torch.no_grad():
            started = time.process_time()
            expected = naive_sample(checked, noise)
            naive = (time.process_time() - started) * depth / len(checked.steps)
            difference = (checked.sample(noise) - expected).abs().max().item()
            assert difference < 1e-3, f"the two methods differ by {difference}"
            times = seconds(
                {
                    "incremental": lambda f=flow, z=noise: f.sample(z),
                    "one_pass": lambda f=flow, z=noise: f.inverse(z),
                }
            )
        times["naive"] = naive
        row = {"latents": latents, "depth": depth, "hidden": hidden} | {
            f"{name}_ms": round(1e3 * t, 1) for name, t in times.items()
        }
        results.append(row | {"speedup": round(times["naive"] / times["incremental"], 1)})
        print(json.dumps(results[-1]), flush=True)

    made = MapMADE((16, 8, 8), 2, 128)
    z = torch.randn(BATCH, 16 * 8 * 8)
    torch.nn.init.normal_(made.head.weight, std=0.01)
    torch.testing.assert_close(made(z), convolution(made, z), rtol=1e-4, atol=1e-4)
    forms = seconds(
        {
            "matrix_product": lambda: made(z).square().sum().backward(),
            "convolution": lambda: convolution(made, z).square().sum().backward(),
        }
    )
    form = {f"{name}_ms": round(1e3 * t, 1) for name, t in forms.items()}
    print(
        json.dumps({"batch": BATCH, "inversion": results, "map_layer_forward_and_backward": form})
    )


if __name__ == "__main__":
    main()
