"""What the page asks: JSON from a stranger until it is read, into the types of this module."""

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.data.reader import Images
from pipeline.errors import UserError

MOST_DRAWS, MOST_STEPS, MOST_IMAGES = 64, 32, 200
"""The most drawings, steps of a walk, and images of the data set in one answer."""
FARTHEST = 1e3
"""The farthest that a latent is moved."""


class BadQuestion(UserError):
    """What was asked cannot be answered; the message says what to ask instead."""


@dataclass(frozen=True)
class Question:
    """The JSON object in the body of a request, whose values are checked as they are read."""

    values: Mapping[str, Any]

    @classmethod
    def read(cls, body: bytes) -> "Question":
        """Raises BadQuestion if it is no JSON object."""
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise BadQuestion("the request's body is not JSON") from None
        if not isinstance(values, dict):
            raise BadQuestion("the request's body is no JSON object")
        return cls(values)

    def integer(self, key: str, least: int, most: int) -> int:
        """A whole number in least..most."""
        value = self.values.get(key)
        if type(value) is not int or not least <= value <= most:
            raise BadQuestion(f"{key} must be a whole number in {least}..{most}")
        return value

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise BadQuestion(f"{key} must be a text that is not empty")
        return value

    def image(self, key: str, shape: tuple[int, int, int]) -> "int | Images":
        """An image: the number of one, or the pixels of one, (channels, height, width)."""
        value = self.values.get(key)
        if isinstance(value, dict) and value.keys() == {"sample"}:
            return Question(value).integer("sample", 0, 2**62)
        if isinstance(value, dict) and value.keys() == {"pixels"}:
            return pixels(value["pixels"], shape)
        raise BadQuestion(f'{key} must be {{"sample": NUMBER}} or {{"pixels": BASE64}}')

    def moved(self, latents: int) -> dict[int, float]:
        """How far each latent is moved, by its number."""
        value = self.values.get("moved", {})
        if not isinstance(value, dict) or len(value) > latents:
            raise BadQuestion("moved must be an object of latents and distances")
        found = {}
        for key, distance in value.items():
            number = int(key) if key.isascii() and key.isdecimal() and len(key) < 9 else latents
            if number >= latents:
                raise BadQuestion(f"moved must name latents 0 to {latents - 1}, not {key[:20]!r}")
            if type(distance) not in (int, float) or not abs(distance) <= FARTHEST:
                raise BadQuestion(f"a latent must be moved by at most {FARTHEST:.0f}")
            found[number] = float(distance)
        return found


def pixels(text: object, shape: tuple[int, int, int]) -> Images:
    """The pixels in base64, row by row with the channels last, as ``to_text`` writes them.

    Returns them with the channels first. Raises BadQuestion unless they are an image of ``shape``.
    """
    channels, height, width = shape
    try:
        data = base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except (binascii.Error, ValueError):
        raise BadQuestion("pixels must be base64") from None
    if len(data) != math.prod(shape):
        raise BadQuestion(
            f"pixels must be {math.prod(shape):,} bytes, {height} rows of {width} pixels of"
            f" {channels} channels, not {len(data):,} bytes"
        )
    found = np.frombuffer(data, np.uint8).reshape(height, width, channels)
    return found.transpose(2, 0, 1).copy()  # writable, as PyTorch wants it


def to_text(image: torch.Tensor) -> str:
    """An image for the page: base64 of its bytes, row by row with the channels last.

    uint8, or float in [0, 1]; (channels, height, width).
    """
    if image.dtype != torch.uint8:
        image = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return base64.b64encode(image.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()).decode()
