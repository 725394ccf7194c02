"""Models from plain keyword arguments, and to and from a folder.

A new likelihood is its class and a row of ``LIKELIHOODS``. A new prior is its class, a row of
``PRIORS``, and the argument of ``build`` that selects it. What either is made from is in
``Options``.
"""

import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vlae import pretrained
from vlae.files import MODEL_FILE, WEIGHTS_FILE
from vlae.flow import AutoregressiveFlow
from vlae.likelihood import BernoulliLikelihood, Likelihood, LogisticMixtureLikelihood
from vlae.model import VLAE
from vlae.networks.decoder import Decoder
from vlae.networks.encoder import Encoder
from vlae.networks.layers import ACTIVATIONS, Trunk, scales
from vlae.prior import Prior, StandardNormal
from vlae.window import Window


@dataclass(frozen=True)
class Options:
    """The arguments of ``build`` that likelihoods and priors are made from."""

    channels: int
    mixtures: int
    code_shape: int | tuple[int, int, int]
    """The length of z, or the (channels, height, width) of a code of maps."""
    flow_depth: int
    flow_hidden: int
    flow_layers: int
    flow_mean_only: bool

    def flow(self, depth: int, context: int = 0) -> AutoregressiveFlow:
        """An autoregressive flow over the code, with fresh weights."""
        return AutoregressiveFlow(
            self.code_shape,
            depth,
            self.flow_hidden,
            layers=self.flow_layers,
            mean_only=self.flow_mean_only,
            context=context,
        )


LIKELIHOODS: dict[str, Callable[[Options], Likelihood]] = {
    "bernoulli": lambda options: BernoulliLikelihood(options.channels),
    "logistic": lambda options: LogisticMixtureLikelihood(options.channels, options.mixtures),
}
PRIORS: dict[str, Callable[[Options], Prior]] = {
    "standard_normal": lambda options: StandardNormal(),
    "autoregressive_flow": lambda options: options.flow(options.flow_depth),
}
CHOICES = {
    "code": ("vector", "maps"),
    "likelihood": tuple(LIKELIHOODS),
    "activation": tuple(ACTIVATIONS),
}
LAYERS = (
    "flow_depth",
    "flow_layers",
    "posterior_depth",
    "blocks",
    "image_blocks",
    "decoder_blocks",
    "context_layers",
)
"""Arguments that count layers; a saved model has at least one weight for each layer."""
MAY_BE_ZERO = (
    "flow_depth",
    "posterior_depth",
    "flow_mean_only",
    "decoder_blocks",
    "image_blocks",
    "context_layers",
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What a saved model's weights may be, by the names of safetensors."""
MAX_VALUES = 1 << 26
"""Upper limit for the sub-pixels of a saved model's images.

A few tables that are not weights, and so not bounded by the weights' file, grow with the image.
"""


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
    """A VLAE with fresh weights, drawn from torch's global generator.

    image_shape: (channels, height, width).
    window: the decoder's receptive field, in the notation of ``Window.parse``.
    context_layers: layers that cover the window. 0 covers it with a single linear layer; more are
    stacked, as in the paper.
    code, latents: a ``"vector"`` of ``latents`` numbers, or ``latents`` ``"maps"`` of the size at
    which the encoder ends.
    flow_depth: steps of the autoregressive-flow prior; 0 is a standard normal prior.
    posterior_depth: steps of an inverse autoregressive flow after the encoder's diagonal Gaussian;
    0 is that Gaussian.
    flow_hidden, flow_layers, flow_mean_only: width and hidden layers of a step of either flow, and
    whether steps only shift.
    likelihood: ``"bernoulli"`` for binary images, ``"logistic"`` for 8-bit ones: a mixture of
    ``mixtures`` discretized logistics.
    encoder_channels, decoder_channels: width of the convolutions of each.
    blocks, image_blocks: residual blocks of encoder and decoder, at each size below the image's
    and at the image's own.
    decoder_maps: image-sized maps unfolded from z.
    decoder_features, decoder_blocks: width and layers of the per-pixel network.
    activation: ``"relu"``, or the paper's ``"elu"``.

    ``model.arguments`` holds all arguments, defaults included; ``load`` rebuilds a saved model from
    them. Raises ValueError on a window that does not parse or fit, and on impossible sizes.
    """
    arguments = dict(locals())
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            f"image_shape is {tuple(image_shape)}; it must be (channels, height, width), "
            "each at least 1"
        )
    for name, value in arguments.items():
        least = 0 if name in MAY_BE_ZERO else 1
        if isinstance(value, int) and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    for name, choices in CHOICES.items():
        if arguments[name] not in choices:
            raise ValueError(
                f"{name} is {arguments[name]!r}; it must be one of {', '.join(choices)}"
            )
    channels, height, width = image_shape
    shape, maps = (channels, height, width), code == "maps"
    smallest = scales(height, width)[-1]
    options = Options(
        channels=channels,
        mixtures=mixtures,
        code_shape=(latents, *smallest) if maps else latents,
        flow_depth=flow_depth,
        flow_hidden=flow_hidden,
        flow_layers=flow_layers,
        flow_mean_only=flow_mean_only,
    )
    # The order in which the parts draw their weights is part of what a seed means: decoder, prior,
    # posterior, encoder.
    trunk = Trunk(blocks, image_blocks, ACTIVATIONS[activation])
    decoder = Decoder(
        shape,
        latents,
        Window.parse(window),
        LIKELIHOODS[likelihood](options),
        channels=decoder_channels,
        maps=decoder_maps,
        features=decoder_features,
        pixel_layers=decoder_blocks,
        context_layers=context_layers,
        code_maps=maps,
        trunk=trunk,
    )
    prior = PRIORS["autoregressive_flow" if flow_depth else "standard_normal"](options)
    posterior = options.flow(posterior_depth, context=flow_hidden) if posterior_depth else None
    encoder = Encoder(shape, latents, encoder_channels, maps=maps, flow=posterior, trunk=trunk)
    model = VLAE(encoder, decoder, prior, latents * math.prod(smallest) if maps else latents)
    model.arguments = arguments
    return model


def describe(arguments: Mapping[str, object]) -> str:
    """A model in a few words, from its arguments: ``window 5x2, 32 latents, flow depth 2``."""
    window, latents, depth = (arguments[name] for name in ("window", "latents", "flow_depth"))
    return f"window {window}, {latents} latents, flow depth {depth}"


def save(model: VLAE, folder: str | Path) -> None:
    """Write a built model to ``folder``: its weights, and the arguments of ``build``.

    A model that was there is replaced at the end: whenever this is interrupted, ``load`` gives a
    model that was saved, or says that there is none. Raises ValueError on a model that ``load``
    would refuse: one that ``build`` did not make, was changed since, or has weights that are not
    finite.
    """
    if not model.arguments:
        raise ValueError("the model cannot be saved: it was not made by vlae.build")
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    if problem := _problem(
        model.arguments, {name: (value.dtype, value.shape) for name, value in weights.items()}
    ) or _not_finite(weights):
        raise ValueError(f"the model cannot be saved: {problem}")
    arguments = json.dumps(model.arguments, indent=2) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        new = Path(temporary)
        save_file(weights, new / WEIGHTS_FILE)
        (new / MODEL_FILE).write_text(arguments)
        for name in (WEIGHTS_FILE, MODEL_FILE):
            with open(new / name, "rb") as file:
                os.fsync(file.fileno())
        old = folder / MODEL_FILE
        if old.exists() and old.read_bytes() != arguments.encode():
            old.unlink()  # these arguments and the new weights must never be one model
        for name in (WEIGHTS_FILE, MODEL_FILE):
            os.replace(new / name, folder / name)


def load(model: str | Path) -> VLAE:
    """Rebuild a saved model, in evaluation mode, on the CPU, in its saved dtype.

    ``model`` is the name of a pretrained model (``vlae.pretrained.names()``), or a folder that
    ``save`` wrote; a folder with such a name is meant by a ``Path``, or by ``./NAME``.

    The files may come from anybody. Nothing is unpickled or executed, and no memory is allocated
    for the model before its arguments agree with the weights' file. The state of torch's global
    generator does not change.

    Raises FileNotFoundError if the folder holds no model, and ValueError, naming the file, on a
    file that ``save`` did not write, or a pretrained model's that is damaged.
    """
    is_pretrained = isinstance(model, str) and model in pretrained.names()
    folder = pretrained.folder(str(model)) if is_pretrained else Path(model)
    for name in (MODEL_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no saved model: {name} is missing; use a folder that vlae.save "
                f"wrote, or a name: {pretrained.listed()}"
            )
    arguments = _read_arguments(folder / MODEL_FILE)
    found = _read_shapes(folder / WEIGHTS_FILE)
    # Every layer has a weight, and every weight an element. These limits bound the time that the
    # check below takes by the size of the weights' file.
    num_tensors, num_elements = len(found), sum(math.prod(shape) for _, shape in found.values())
    for name, value in arguments.items():
        most = num_tensors if name in LAYERS else num_elements
        if isinstance(value, int) and value > most:
            raise ValueError(
                f"{folder / MODEL_FILE}: {name} is {value}, more than {WEIGHTS_FILE} has weights "
                "for"
            )
    try:
        problem = _problem(arguments, found)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / MODEL_FILE}: {error}") from None
    if problem:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not belong to {MODEL_FILE}: {problem}")
    weights = load_file(folder / WEIGHTS_FILE)
    if problem := _not_finite(weights):
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: {problem}")
    with torch.random.fork_rng(devices=[]):
        network = build(**arguments).to(next(iter(weights.values())).dtype)
    network.load_state_dict(weights)
    return network.eval()


def _problem(
    arguments: Mapping[str, Any], found: Mapping[str, tuple[torch.dtype, Sequence[int]]]
) -> str | None:
    """Why weights of these dtypes and shapes are not those of ``build(**arguments)``, if so."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # shapes only, without memory
        state = build(**arguments).state_dict()
    expected = {name: tuple(value.shape) for name, value in state.items()}
    shapes = {name: tuple(shape) for name, (_, shape) in found.items()}
    for name in sorted(expected | shapes):
        if expected.get(name) != shapes.get(name):
            return f"{name} has the shape {shapes.get(name)}, the model's is {expected.get(name)}"
    dtypes = {dtype: name for name, (dtype, _) in found.items()}
    if len(dtypes) > 1 or not dtypes.keys() <= set(DTYPES.values()):
        listed = " and ".join(f"{name} {dtype}" for dtype, name in dtypes.items())
        return f"its weights must be of one floating-point type, but are mixed ({listed})"
    return None


def _not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """A sentence that names the first weight that is not finite; None if all are."""
    names = (name for name, value in weights.items() if not value.isfinite().all())
    return next((f"{name} has values that are not finite" for name in names), None)


def _read_arguments(path: Path) -> dict[str, Any]:
    """The arguments of ``build`` from a file.

    Raises ValueError unless ``build`` has arguments of these names and types.
    """
    try:
        arguments = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no saved model: it is not JSON ({error})") from None
    if not isinstance(arguments, dict) or "image_shape" not in arguments:
        raise ValueError(f"{path} is no saved model: it does not hold the arguments of vlae.build")
    defaults = {name: each.default for name, each in inspect.signature(build).parameters.items()}
    for name, value in arguments.items():
        if name not in defaults:
            raise ValueError(f"{path}: vlae.build has no argument {name!r}")
        if name == "image_shape":
            fits = isinstance(value, list) and len(value) == 3
            fits = fits and all(type(each) is int for each in value)
            fits = fits and math.prod(value) <= MAX_VALUES
        else:
            fits = type(value) is type(defaults[name])
        if not fits:
            raise ValueError(f"{path}: {name} cannot be {value!r:.100}")
    return arguments


def _read_shapes(path: Path) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
    """The dtype and shape of every tensor in a safetensors file.

    Raises ValueError if it is no such file, or holds anything but floating-point numbers.
    """
    try:
        with safe_open(path, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    for name, (dtype, _) in kinds.items():
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is {dtype}; it must be one of {', '.join(DTYPES)}")
    return {name: (DTYPES[dtype], shape) for name, (dtype, shape) in kinds.items()}
