"""Models from plain keyword arguments, and to and from a folder."""

import inspect
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vlae.decoder import Decoder
from vlae.encoder import Encoder
from vlae.flow import AutoregressiveFlow, StandardNormal
from vlae.layers import ACTIVATIONS, Trunk
from vlae.likelihood import BernoulliLikelihood, LogisticMixtureLikelihood
from vlae.model import VLAE
from vlae.window import Window

WEIGHTS_FILE, MODEL_FILE = "model.safetensors", "model.json"
CHOICES = {"code": ("vector", "maps"), "likelihood": ("bernoulli", "logistic"), "activation": tuple(ACTIVATIONS)}
LAYERS = ("flow_depth", "flow_layers", "posterior_depth", "blocks", "image_blocks", "decoder_blocks", "context_layers")
MAX_VALUES = 1 << 26
"""Of an image of a saved model: a few tables grow with it that are no weights."""
MAY_BE_ZERO = ("flow_depth", "posterior_depth", "flow_mean_only", "decoder_blocks", "image_blocks", "context_layers")


def build(
    *,
    image_shape: tuple[int, int, int],
    window: str = "5x2",
    latents: int = 32,
    code: str = "vector",
    flow_depth: int = 2,
    flow_hidden: int = 256,
    flow_layers: int = 2,
    flow_mean_only: bool = False,
    posterior_depth: int = 0,
    likelihood: str = "bernoulli",
    mixtures: int = 5,
    encoder_channels: int = 16,
    decoder_channels: int = 16,
    blocks: int = 1,
    image_blocks: int = 0,
    decoder_maps: int = 16,
    decoder_features: int = 64,
    decoder_blocks: int = 2,
    context_layers: int = 0,
    activation: str = "relu",
) -> VLAE:
    """A VLAE with fresh weights (drawn from torch's global generator).

    image_shape: (channels, height, width). window: the decoder's receptive field, as ``Window.parse`` reads it.
    context_layers: 0 looks at the window with one linear layer, more stack it from so many, as the paper does.
    latents: size of the code z if ``code`` is ``"vector"``; if it is ``"maps"``, how many maps z has, each of the size at which
    the encoder ends. flow_depth: steps of the autoregressive-flow prior; 0 is a standard normal prior.
    posterior_depth: steps of an inverse autoregressive flow that follows the encoder's diagonal Gaussian; 0 is that Gaussian.
    flow_hidden, flow_layers, flow_mean_only: of either flow's steps, their width, hidden layers, and whether they only shift.
    likelihood: ``"bernoulli"`` for binary images, ``"logistic"`` for 8-bit ones (``mixtures`` discretized logistics).
    blocks, image_blocks: residual blocks at each smaller size and at the image's own, in the encoder and the decoder.
    The rest are widths: ``decoder_features`` and ``decoder_blocks`` of the per-pixel network, ``decoder_maps`` the image-sized maps
    unfolded from z. activation: ``"relu"``, or the paper's ``"elu"``.

    The arguments, defaults included, are kept as ``model.arguments``, from which a saved model is rebuilt.

    Raises ValueError on a window that does not parse or fit, and on sizes that are impossible.
    """
    arguments = dict(locals())
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape is {tuple(image_shape)}; it must be (channels, height, width), each at least 1")
    for name, value in arguments.items():
        if isinstance(value, int) and value < (0 if name in MAY_BE_ZERO else 1):
            raise ValueError(f"{name} is {value}, which is too small")
    for name, choices in CHOICES.items():
        if arguments[name] not in choices:
            raise ValueError(f"{name} is {arguments[name]!r}; it must be one of {', '.join(choices)}")
    channels, height, width = image_shape
    shape, maps = (channels, height, width), code == "maps"
    trunk = Trunk(blocks, image_blocks, ACTIVATIONS[activation])
    decoder = Decoder(
        shape,
        latents,
        Window.parse(window),
        BernoulliLikelihood(channels) if likelihood == "bernoulli" else LogisticMixtureLikelihood(channels, mixtures),
        channels=decoder_channels,
        maps=decoder_maps,
        features=decoder_features,
        pixel_layers=decoder_blocks,
        context_layers=context_layers,
        code_maps=maps,
        trunk=trunk,
    )
    code_shape = (latents, *decoder.sizes[0]) if maps else latents
    flow = partial(AutoregressiveFlow, code_shape, hidden=flow_hidden, layers=flow_layers, mean_only=flow_mean_only)
    prior = flow(flow_depth) if flow_depth else StandardNormal()
    posterior = flow(posterior_depth, context=flow_hidden) if posterior_depth else None
    encoder = Encoder(shape, latents, encoder_channels, maps=maps, flow=posterior, trunk=trunk)
    size = latents * math.prod(decoder.sizes[0]) if maps else latents
    model = VLAE(encoder, decoder, prior, size)
    model.arguments = arguments
    return model


def save(model: VLAE, folder: str | Path) -> None:
    """Write a built model into ``folder``: its weights, and the arguments of ``build`` that made it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / MODEL_FILE).write_text(json.dumps(model.arguments, indent=2) + "\n")


def load(folder: str | Path) -> VLAE:
    """Rebuild a saved model from ``folder``, in evaluation mode, on the CPU. Nothing is unpickled or executed.

    The files may come from anybody: what the arguments ask for is held to what the weights' file holds before any of it is made.

    Raises FileNotFoundError if the folder holds no model, and ValueError, naming the file, if it is not one that ``save`` wrote.
    """
    folder = Path(folder)
    for name in (MODEL_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing; give a folder that vlae.save wrote")
    arguments, shapes = _read_arguments(folder / MODEL_FILE), _read_shapes(folder / WEIGHTS_FILE)
    # No layer is without a weight, and no weight without an element: so nothing here takes longer than its weights are large.
    most = {True: len(shapes), False: sum(map(math.prod, shapes.values()))}
    for name, value in arguments.items():
        if isinstance(value, int) and value > most[name in LAYERS]:
            raise ValueError(f"{folder / MODEL_FILE}: {name} is {value}, which is more than {WEIGHTS_FILE} has weights for")
    try:
        with torch.device("meta"):  # shapes alone, without memory
            expected = {name: tuple(value.shape) for name, value in build(**arguments).state_dict().items()}
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / MODEL_FILE}: {error}") from None
    wrong = sorted(name for name in expected | shapes if expected.get(name) != shapes.get(name))
    if wrong:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} does not belong to {MODEL_FILE}: {wrong[0]} has the shape {shapes.get(wrong[0])}, "
            f"the model's is {expected.get(wrong[0])}"
        )
    model = build(**arguments)
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()


def _read_arguments(path: Path) -> dict[str, Any]:
    """The arguments of ``build`` from a file; ValueError unless they are known by name and of their type."""
    try:
        arguments = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no saved model: it is not JSON ({error})") from None
    if not isinstance(arguments, dict) or "image_shape" not in arguments:
        raise ValueError(f"{path} is no saved model: it does not hold the arguments of vlae.build")
    defaults = {name: each.default for name, each in inspect.signature(build).parameters.items()}
    for name, value in arguments.items():
        if name not in defaults:
            raise ValueError(f"{path}: {name!r} is no argument of vlae.build")
        if name == "image_shape":
            fits = isinstance(value, list) and len(value) == 3 and all(type(each) is int for each in value)
            fits = fits and math.prod(value) <= MAX_VALUES
        else:
            fits = type(value) is type(defaults[name])
        if not fits:
            raise ValueError(f"{path}: {name} is {value!r:.100}, which is no value of its kind")
    return arguments


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a safetensors file; ValueError if it is none."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
