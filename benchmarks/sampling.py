"""How long it takes to draw images: naively, by patches, and by wavefronts.

    .venv/bin/python benchmarks/sampling.py

Everything runs on one core, and inverting the prior is included. *naive* runs the whole decoder
once for every pixel, and the whole flow once for every latent. *patch* also goes pixel by pixel,
but evaluates only that pixel and inverts the flow incrementally. *wavefront* is what `vlae.sample`
does. All methods get the same noise and must give the same images. At 64x64 the naive method takes
too long: some of its passes, which all cost the same, are timed, and its images are compared on a
few examples. The last line is JSON; `seconds` are medians over interleaved rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vlae
from vlae.flow import AutoregressiveFlow
from vlae.prior import Prior
from vlae.sampling import decode_naively, draw_pixels


def make(size: int) -> vlae.VLAE:
    """`fast` with window 7x4; the weights are random and none is zero."""
    torch.manual_seed(0)
    model = vlae.build(image_shape=(1, size, size), window="7x4", latents=32, flow_depth=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def invert_naively(prior: Prior, noise: Tensor) -> Tensor:
    """z by as many passes of each step as there are latents.

    After pass i, the first i + 1 latents in the step's order are final.
    """
    assert isinstance(prior, AutoregressiveFlow)
    for number in range(len(prior.steps)):
        one = AutoregressiveFlow(noise.shape[-1], 1, 32)
        one.steps = torch.nn.ModuleList([prior.steps[number]])
        turned = noise.flip(-1) if number % 2 else noise  # odd steps work in the reversed order
        z = torch.zeros_like(noise)
        for _ in range(noise.shape[-1]):
            # `back` is (z - mean) / scale and `log_det` the log of 1 / scale: the next z is what
            # this step makes of the wanted noise.
            back, log_det = one.inverse(z)
            z = z + (turned - back) * torch.exp(-log_det)
        noise = z.flip(-1) if number % 2 else z
    return noise


@torch.no_grad()
def by_patches(model: vlae.VLAE, noise: Tensor, uniform: Tensor) -> Tensor:
    decoder = model.decoder
    assert decoder.context is not None
    _, height, width = decoder.image_shape
    condition, thresholds = (
        decoder.condition(model.prior.sample(noise)),
        uniform.permute(0, 2, 3, 1),
    )
    front, x = decoder.context.front(len(noise), height, width), torch.zeros_like(uniform)
    for row in range(height):
        for column in range(width):
            at = torch.tensor([row]), torch.tensor([column])
            hidden = condition[:, *at] + front.features(*at)
            pixels = decoder.predict(hidden).sample(thresholds[:, *at]).transpose(1, 2)
            x[:, :, *at] = pixels
            front.draw(*at, decoder.show(pixels))
    return x


@torch.no_grad()
def naively(model: vlae.VLAE, noise: Tensor, uniform: Tensor) -> Tensor:
    return decode_naively(model.decoder, invert_naively(model.prior, noise), uniform)


@torch.no_grad()
def by_wavefronts(model: vlae.VLAE, noise: Tensor, uniform: Tensor) -> Tensor:
    return draw_pixels(model.decoder, model.prior.sample(noise), uniform)


@torch.no_grad()
def naive_seconds(model: vlae.VLAE, noise: Tensor, uniform: Tensor, passes: int) -> float:
    """The time of the naive method, extrapolated from ``passes`` of its decoder passes."""
    started = time.perf_counter()
    z = invert_naively(model.prior, noise)
    condition, thresholds = model.decoder.condition(z), uniform.permute(0, 2, 3, 1)
    once = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(passes):
        model.decoder.predict(condition + model.decoder.see(uniform)).sample(thresholds)
    _, height, width = model.image_shape
    return once + (time.perf_counter() - started) * height * width / passes


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"images": arguments.images, "rounds": arguments.rounds}
    for size, checked, passes in ((28, arguments.images, None), (64, 2, 32)):
        model, generator = make(size), torch.Generator().manual_seed(1)
        noise = torch.randn(arguments.images, model.latents, generator=generator)
        uniform = torch.rand(arguments.images, 1, size, size, generator=generator)
        few = noise[:checked], uniform[:checked]
        started = time.perf_counter()
        expected = naively(model, *few)
        whole = time.perf_counter() - started
        same = all(torch.equal(way(model, *few), expected) for way in (by_patches, by_wavefronts))
        seconds: dict[str, list[float]] = {"naive": [], "patch": [], "wavefront": [], "prior": []}
        for number in range(arguments.rounds):
            seconds["wavefront"].append(timed(by_wavefronts, model, noise, uniform))
            seconds["prior"].append(timed(model.prior.sample, noise))
            if number < 3:  # these two are slow, and the differences are large
                seconds["patch"].append(timed(by_patches, model, noise, uniform))
                if passes or number:
                    seconds["naive"].append(naive_seconds(model, noise, uniform, passes or 64))
                else:
                    seconds["naive"].append(whole)
        medians = {way: statistics.median(values) for way, values in seconds.items()}
        result[f"{size}x{size}"] = {
            "same_images": same,
            "seconds": {way: round(value, 4) for way, value in medians.items()},
            "speedup_vs_naive": round(medians["naive"] / medians["wavefront"], 1),
            "speedup_vs_patch": round(medians["patch"] / medians["wavefront"], 1),
        }
        print(f"{size}x{size}: {result[f'{size}x{size}']}", flush=True)
    result["speedup_vs_naive"] = result["28x28"]["speedup_vs_naive"]
    result["speedup_vs_naive_64x64"] = result["64x64"]["speedup_vs_naive"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
