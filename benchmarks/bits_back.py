"""BB-ANS by its authors' own code, with their own model of binary MNIST, as a peer of ours.

The code of Townsend, Bird and Barber (ICLR 2019, https://github.com/bits-back/bits-back) has no
licence that would let us carry it along. This runs a clone of it, as its script
``torch_vae/torch_bin_mnist_compress.py`` does, on the images that it is given:

    python -m benchmarks.bits_back CLONE IMAGES.npy

``IMAGES.npy`` holds (count, 28, 28) of 0 and 1. Encodes all, decodes all and compares them. The
last line is JSON, and ``bits_per_dim`` leaves out the initial bits, as the script does.
"""

import argparse
import json
import os
import sys
import time
from types import ModuleType

import numpy as np
import torch

INITIAL_WORDS = 20
"""The random words of 32 bits that the first images take their codes from."""
PRECISIONS = {"prior": 8, "pixels": 12, "posterior": 14}
"""Bits of the discretized distributions, as in the authors' script."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone")
    parser.add_argument("images")
    arguments = parser.parse_args()
    images = np.load(arguments.images).reshape(-1, 784)
    torch.set_num_threads(1)
    os.chdir(arguments.clone)
    sys.path.insert(0, ".")
    # Imported by the authors' modules, for training alone.
    for name in ("torchvision", "torchvision.utils"):
        sys.modules[name] = ModuleType(name)
    vars(sys.modules["torchvision"]).update(datasets=None, transforms=None)
    vars(sys.modules["torchvision.utils"])["save_image"] = None
    import rans
    import util
    from torch_vae import tvae_utils
    from torch_vae.tvae_binary import BinaryVAE

    model = BinaryVAE(hidden_dim=100, latent_dim=40)
    weights = "torch_vae/saved_params/torch_binary_vae_params_random"
    model.load_state_dict(torch.load(weights, weights_only=True))
    networks = [tvae_utils.torch_fun_to_numpy_fun(each) for each in (model.decode, model.encode)]
    pixels = PRECISIONS["pixels"]
    precisions = PRECISIONS["prior"], PRECISIONS["posterior"]
    append = util.vae_append((40,), *networks, tvae_utils.bernoulli_obs_append(pixels), *precisions)
    pop = util.vae_pop((40,), *networks, tvae_utils.bernoulli_obs_pop(pixels), *precisions)
    initial = np.random.RandomState(0).randint(1 << 16, 1 << 31, INITIAL_WORDS, np.uint32)
    state = rans.unflatten(initial)
    begin = time.perf_counter()
    for image in torch.from_numpy(images).float():
        state = append(state, image)
    message = rans.flatten(state)
    middle = time.perf_counter()
    state = rans.unflatten(message)
    for image in images[::-1]:
        state, found = pop(state)
        assert np.array_equal(np.asarray(found), image)
    end = time.perf_counter()
    result = {
        "bits_per_dim": 32 * (len(message) - INITIAL_WORDS) / images.size,
        "encode_images_per_s": len(images) / (middle - begin),
        "decode_images_per_s": len(images) / (end - middle),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
