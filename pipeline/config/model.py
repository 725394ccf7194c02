"""The options of a model."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from pipeline.config.options import option, require, to_dict
from pipeline.config.sections import Binarization
from pipeline.errors import UserError
from vlae.window import NOTATION, Window

if TYPE_CHECKING:
    from vlae import VLAE


class Code(Enum):
    vector = "vector"
    maps = "maps"


class ActivationName(Enum):
    relu = "relu"
    elu = "elu"


WIDEST, DEEPEST = 1 << 20, 1 << 8
"""Limits of widths and of numbers of layers. ``ModelOptions.build`` limits the model as a whole."""
ORDINARY = 1 << 27
"""A model is only measured if its three largest numbers multiply to more: measuring takes seconds,
for PyTorch loads much that it does not need otherwise.
"""


@dataclass
class ModelOptions:
    window: str = option(f"the decoder's receptive field: {NOTATION}")
    latents: int = option("size of the code z, or how many maps it has", at_least=1, below=WIDEST)
    code: Code = option(
        "vector, or maps: z keeps positions, at the size at which the encoder ends",
        Code.vector,
    )
    flow_depth: int = option(
        "steps of the autoregressive-flow prior; 0 is a standard normal prior",
        at_least=0,
        below=DEEPEST,
    )
    posterior_depth: int = option(
        "steps of an inverse autoregressive flow in the posterior; 0 is a diagonal Gaussian",
        0,
        at_least=0,
        below=DEEPEST,
    )
    flow_hidden: int = option(
        "width of each step's MADE, in the prior and the posterior", at_least=1, below=WIDEST
    )
    flow_layers: int = option("hidden layers of each step's MADE", 2, at_least=1, below=DEEPEST)
    flow_mean_only: bool = option("steps only shift, as the paper's do, and do not scale", False)
    mixtures: int = option(
        "components of the likelihood of 256 values, a mixture of discretized logistics",
        5,
        at_least=1,
        below=WIDEST,
    )
    encoder_channels: int = option(
        "width of the encoder; twice that below half the image's size", at_least=1, below=WIDEST
    )
    decoder_channels: int = option(
        "width of the network that unfolds z; twice that at its smallest", at_least=1, below=WIDEST
    )
    blocks: int = option(
        "residual blocks at each size below the image's, in the encoder and the decoder",
        1,
        at_least=0,
        below=DEEPEST,
    )
    image_blocks: int = option(
        "residual blocks at the image's own size, in the encoder and the decoder",
        0,
        at_least=0,
        below=DEEPEST,
    )
    decoder_maps: int = option("image-sized maps that z unfolds to", at_least=1, below=WIDEST)
    decoder_features: int = option("width of the per-pixel network", at_least=1, below=WIDEST)
    decoder_blocks: int = option("layers of the per-pixel network", at_least=0, below=DEEPEST)
    context_layers: int = option(
        "0 looks at the window with one linear layer; more stack it from so many, as the paper"
        " does",
        0,
        at_least=0,
        below=DEEPEST,
    )
    activation: ActivationName = option(
        "relu, or the paper's elu, which is slower", ActivationName.relu
    )

    def check(self) -> None:
        self.check_window(self.window, "model.window")
        self.check_flow(self.latents, self.flow_depth, "model.latents")

    def check_flow(self, latents: int, depth: int, key: str) -> None:
        """Raise UserError, naming ``key``, if flows of so many steps over so many latents need
        wider steps.
        """
        # A step has a hidden unit for every latent that another may depend on; where it also sees a
        # context, for every latent.
        least = latents if self.posterior_depth or self.code is Code.maps else latents - 1
        require(
            max(depth, self.posterior_depth) == 0 or self.flow_hidden >= least,
            f"model.flow_hidden={self.flow_hidden} is too narrow for {key} of {latents}: it must be"
            f" at least {least}",
        )

    def check_window(self, text: str, key: str) -> None:
        """Raise UserError, naming ``key``, unless this is a window that the model can have."""
        try:
            window = Window.parse(text)
            if self.context_layers:
                window.check_stacks()
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None

    def build(self, image_shape: tuple[int, int, int], binarization: Binarization) -> "VLAE":
        """The model, with fresh weights; its likelihood is the one that the images call for.

        Raises ValueError as ``vlae.build`` does, and on a model whose weights alone would take more
        than this machine's memory, before it takes any.
        """
        import vlae  # here, since it loads PyTorch, which a check of the options does without

        likelihood = "logistic" if binarization is Binarization.none else "bernoulli"
        arguments = {"image_shape": image_shape, "likelihood": likelihood, **to_dict(self)}
        numbers = sorted(value for value in arguments.values() if type(value) is int)
        if math.prod(numbers[-3:]) > ORDINARY:
            _check_size(arguments)
        return vlae.build(**arguments)


def _check_size(arguments: dict[str, Any]) -> None:
    """Raise ValueError if a model's weights alone take more than this machine's memory."""
    import torch

    import vlae
    from pipeline.machine import MEMORY

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):  # takes no memory
            shapes = vlae.build(**arguments).state_dict()
    except RuntimeError as error:  # a shape that no tensor can have
        raise ValueError(f"no model can be that large ({error})") from None
    size = sum(4 * value.numel() for value in shapes.values())
    if size > MEMORY:
        largest = max(shapes, key=lambda name: shapes[name].numel())
        raise ValueError(
            f"its weights take {size / 1e9:,.0f} GB, more than this machine's"
            f" {MEMORY / 1e9:,.0f} GB of memory; the largest is {largest}, of the shape"
            f" {tuple(shapes[largest].shape)}"
        )


LARGE = 64
"""The least height and width in pixels of images that ``model=auto`` gives a code of maps."""


def preset_for(image_shape: tuple[int, int, int], binarization: Binarization) -> str:
    """The preset in ``configs/model`` that ``model=auto`` stands for, for images of this shape."""
    if min(image_shape[1:]) >= LARGE:
        return "large"
    if binarization is not Binarization.none:
        return "fast"
    return "colour" if image_shape[0] == 3 else "grey"
