"""``vlae.decode``: from codes to images, as ``reconstruct`` draws them."""

import importlib.metadata

import pytest
import torch

import vlae


@pytest.fixture
def model() -> vlae.VLAE:
    return vlae.build(image_shape=(1, 8, 8), latents=3, window="3x1", flow_hidden=16).eval()


def test_encoding_then_decoding_is_reconstructing(model: vlae.VLAE) -> None:
    x, generator = torch.rand(4, 1, 8, 8).round(), torch.Generator()
    expected = vlae.reconstruct(model, x, generator.manual_seed(1))
    noise = torch.randn(4, 3, generator=generator.manual_seed(1))
    with torch.no_grad():
        z = model.encoder(x).sample(noise)
    assert torch.equal(vlae.decode(model, z, generator), expected)


def test_without_a_generator_torchs_seed_decides(model: vlae.VLAE) -> None:
    z, x = torch.randn(2, 3), torch.rand(2, 1, 8, 8).round()
    for draw in (
        lambda: vlae.decode(model, z),
        lambda: vlae.sample(model, 2),
        lambda: vlae.reconstruct(model, x),
    ):
        torch.manual_seed(3)
        first, other = draw(), draw()
        torch.manual_seed(3)
        assert torch.equal(draw(), first)
        assert not torch.equal(other, first)


def test_codes_of_another_dtype_are_decoded_in_the_models(model: vlae.VLAE) -> None:
    codes = torch.randn(2, 3, dtype=torch.float64)
    drawn = vlae.decode(model, codes, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, vlae.decode(model, codes.float(), torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (1, 2, 3)])
def test_codes_of_another_shape_are_refused(model: vlae.VLAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"codes have the shape .*; it must be \(batch, 3\)"):
        vlae.decode(model, torch.zeros(shape))


def test_the_package_knows_its_version() -> None:
    assert vlae.__version__ == importlib.metadata.version("vlae-pipeline")
