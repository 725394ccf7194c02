"""Models from plain keyword arguments, and to and from a folder."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from vlae.decoder import Decoder
from vlae.encoder import Encoder
from vlae.model import VLAE
from vlae.prior import AutoregressiveFlow, StandardNormal
from vlae.window import Window

WEIGHTS_FILE, MODEL_FILE = "model.safetensors", "model.json"


def build(
    *,
    image_shape: tuple[int, int, int],
    window: str = "5x2",
    latents: int = 32,
    flow_depth: int = 2,
    flow_hidden: int = 256,
    encoder_channels: int = 16,
    decoder_channels: int = 16,
    decoder_maps: int = 16,
    decoder_features: int = 64,
    decoder_blocks: int = 2,
) -> VLAE:
    """A VLAE with fresh weights (drawn from torch's global generator).

    image_shape: (channels, height, width) of binary images. window: the decoder's receptive field, as ``Window.parse``
    reads it. flow_depth: steps of the autoregressive-flow prior; 0 is a standard normal prior. The rest are widths:
    ``decoder_features`` and ``decoder_blocks`` of the per-pixel network, ``decoder_maps`` the image-sized maps unfolded from z.

    The arguments, defaults included, are kept as ``model.arguments``, from which a saved model is rebuilt.

    Raises ValueError on a window that does not parse or fit, and on sizes that are impossible.
    """
    arguments = dict(locals())
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape is {tuple(image_shape)}; it must be (channels, height, width), each at least 1")
    for name, value in arguments.items():
        if isinstance(value, int) and value < (0 if name in ("flow_depth", "decoder_blocks") else 1):
            raise ValueError(f"{name} is {value}, which is too small")
    channels, height, width = image_shape
    shape = (channels, height, width)
    decoder = Decoder(shape, latents, Window.parse(window), decoder_channels, decoder_maps, decoder_features, decoder_blocks)
    prior = AutoregressiveFlow(latents, flow_depth, flow_hidden) if flow_depth else StandardNormal()
    model = VLAE(Encoder(shape, latents, encoder_channels), decoder, prior, latents)
    model.arguments = arguments
    return model


def save(model: VLAE, folder: str | Path) -> None:
    """Write a built model into ``folder``: its weights, and the arguments of ``build`` that made it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / MODEL_FILE).write_text(json.dumps(model.arguments, indent=2) + "\n")


def load(folder: str | Path) -> VLAE:
    """Rebuild a saved model from ``folder``, in evaluation mode, on the CPU. Nothing is unpickled.

    Raises FileNotFoundError if the folder holds no model.
    """
    folder = Path(folder)
    for name in (MODEL_FILE, WEIGHTS_FILE):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder} holds no saved model: {name} is missing; give a folder that vlae.save wrote")
    model = build(**json.loads((folder / MODEL_FILE).read_text()))
    model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return model.eval()
