"""The pictures show what they say."""

import io

import pytest
import torch
from PIL import Image

from pipeline import pictures
from pipeline.pictures import GAP, LABEL_HEIGHT, MARGIN


@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_in_its_place(channels: int) -> None:
    images = torch.zeros(4, channels, 28, 28)
    images[3] = 1
    sheet = Image.open(io.BytesIO(pictures.samples(images, columns=2)))
    first, step = (MARGIN + 28, MARGIN + LABEL_HEIGHT + 28), 56 + GAP
    assert sheet.getpixel(first) == (0, 0, 0)
    assert sheet.getpixel((first[0] + step, first[1] + step)) == (255, 255, 255)
    assert sheet.getpixel((first[0] + step, first[1])) == (0, 0, 0)


def test_reconstructions_stand_below_their_originals() -> None:
    originals, drawn = torch.ones(3, 1, 28, 28), [torch.zeros(3, 1, 28, 28)] * 2
    sheet = Image.open(io.BytesIO(pictures.reconstructions(originals, drawn, columns=3)))
    column = [sheet.getpixel((MARGIN + 28, MARGIN + LABEL_HEIGHT + 28 + row * (56 + GAP))) for row in range(3)]
    assert column == [(255, 255, 255), (0, 0, 0), (0, 0, 0)]
