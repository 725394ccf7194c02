"""Checks every pretrained model of an installed package: run with the folder of the installation.

    python -I tests/check_pretrained.py FOLDER

Prints a line for each model, and ends with an error if the bound on its example images is not the
one that was measured when it was added.
"""

import math
import sys
from pathlib import Path


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    import torch
    from safetensors.torch import load_file

    import vlae
    from vlae import pretrained

    assert Path(vlae.__file__).is_relative_to(folder), vlae.__file__
    for name in pretrained.names():
        model = vlae.load(name)
        measured = load_file(pretrained.folder(name) / pretrained.EXAMPLES_FILE)["elbo"]
        x = pretrained.examples(name)
        noise = torch.randn(16, len(x), model.latents, generator=torch.Generator().manual_seed(1))
        difference = vlae.estimate(model, x, noise).elbo - measured
        mean, error = difference.mean().item(), difference.std().item() / math.sqrt(len(x))
        print(f"{name}: {len(x)} images, code length {-measured.mean():.2f} nats, of another draw"
              f" {-mean:+.3f} +- {error:.3f}")  # fmt: skip
        if not abs(mean) <= 5 * error:
            sys.exit(f"{name} does not have the code length that was measured")


if __name__ == "__main__":
    main(sys.argv[1])
