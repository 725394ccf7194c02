"""The file of compressed images: whatever happens to it, nobody gets a wrong image."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlae
from pipeline.coding import blocks, container, lossy
from pipeline.coding.container import Frame, Header, Reader, Writer
from pipeline.errors import DamagedData, UserError

HEADER = Header(
    "0" * 64, "1" * 64, "strokes", "test", [1, 8, 8], None, None, 100, 2, 0, None, "abc", "torch 0"
)


def written(frames: list[Frame], header: Header = HEADER) -> bytes:
    file = io.BytesIO()
    writer = Writer(file, header)
    for frame in frames:
        writer.add(frame)
    writer.finish()
    return file.getvalue()


def read(content: bytes) -> tuple[Header, list[Frame]]:
    pieces: Iterator[bytes] = iter([content[i : i + 999] for i in range(0, len(content), 999)])
    reader = Reader(pieces, "images.vlae")
    return reader.header, list(reader.frames())


@pytest.fixture(scope="module")
def network() -> vlae.VLAE:
    torch.manual_seed(3)
    return vlae.build(
        image_shape=(1, 8, 8),
        window="3x2",
        latents=2,
        flow_hidden=8,
        encoder_channels=4,
        decoder_channels=4,
        decoder_maps=4,
        decoder_features=8,
    ).eval()


@pytest.fixture(scope="module")
def file(network: vlae.VLAE) -> bytes:
    """A file of 100 images in two blocks."""
    x = (torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    frames = []
    for number, part in enumerate(x.split(50)):
        block = blocks.encode(network, part, 0, number)
        names = container.pack_names([f"image {n}" for n in range(50)], list(range(50)))
        frames.append(Frame(number, 50, block.initial_words, block.pixels, names, block.payload))
    return written(frames)


def test_every_flipped_bit_of_a_file_of_100_images_is_named(file: bytes) -> None:
    read(file)
    for place in range(8 * len(file)):
        flipped = bytearray(file)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(UserError, match=r"^images\.vlae "):
            read(bytes(flipped))


def test_a_file_that_ends_early_or_late_is_named(file: bytes) -> None:
    for length in range(len(file)):
        with pytest.raises(DamagedData, match="cut short"):
            read(file[:length])
    with pytest.raises(DamagedData, match="its end"):
        read(file + b"\0")


def test_blocks_cannot_be_exchanged_within_a_file_or_between_files(file: bytes) -> None:
    _, (first, second) = read(file)
    key = container.checksum(HEADER.to_bytes()[: -container.CHECKSUM])
    start, end = HEADER.to_bytes(), container.end(2).to_bytes(key)
    a, b = first.to_bytes(key), second.to_bytes(key)
    assert start + a + b + end == file
    for wrong in (start + b + a + end, start + a + a + end, start + a + end):
        with pytest.raises(DamagedData, match=r"block [01]"):
            read(wrong)
    other = dataclasses.replace(HEADER, seed=1).to_bytes()
    with pytest.raises(DamagedData, match="block 0"):
        read(other + a + b + end)


@given(order=st.permutations(range(6)))
def test_blocks_that_come_in_any_order_are_written_in_theirs(order: list[int]) -> None:
    header = dataclasses.replace(HEADER, blocks=6)
    frames = [Frame(n, 1, 0, bytes(8), b"", bytes([n])) for n in range(6)]
    assert read(written([frames[n] for n in order], header)) == (header, frames)


def test_a_file_without_images_is_read(network: vlae.VLAE) -> None:
    header = dataclasses.replace(HEADER, images=0, blocks=0)
    assert read(written([], header)) == (header, [])
    block = blocks.encode(network, torch.zeros(0, 1, 8, 8), 0, 0)
    assert (len(block.payload), block.initial_bits) == (8, 64)
    assert blocks.decode(network, block, 0, 0, 0).shape == (0, 1, 8, 8)


def test_another_version_and_another_kind_of_file_are_refused() -> None:
    with pytest.raises(UserError, match="format version 99"):
        read(written([], dataclasses.replace(HEADER, version=99)))
    with pytest.raises(UserError, match="no file that `vlae compress` wrote"):
        read(b"\x89PNG\r\n\x1a\n" * 9)


def test_names_come_back_and_a_bomb_of_names_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = container.pack_names(["é/1.png"], [3])
    assert container.unpack_names(packed, 1) == (["é/1.png"], [3])
    assert container.unpack_names(b"", 2) == (None, [-1, -1])
    wrong = [b"no zlib", packed[:-3], container.pack_names(None, ["cat"])]  # type: ignore[list-item]
    for names in [*wrong, container.pack_names(["a", "b"], [1])]:
        with pytest.raises(DamagedData, match="cannot be read"):
            container.unpack_names(names, 1)
    with pytest.raises(DamagedData, match="cannot be read"):
        container.unpack_names(packed, 2)
    monkeypatch.setattr(container, "MAX_NAMES", 10)
    with pytest.raises(DamagedData, match="cannot be read"):
        container.unpack_names(packed, 1)


@pytest.mark.parametrize(
    "value",
    [
        {"images": "many"},
        {"bits": 60},
        {"split": "../.."},
        {"seed": -1},
        {"blocks": 101},
        {"image_shape": [8, 8]},
        {"images": 0},
    ],
    ids=str,
)
def test_a_header_with_impossible_values_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(DamagedData, match="its header"):
        read(written([], dataclasses.replace(HEADER, **value)))


@pytest.mark.parametrize("count", [1, 2, 37, 300])
def test_a_block_of_any_size_comes_back_and_holds_few_initial_bits(
    network: vlae.VLAE, count: int
) -> None:
    x = torch.randint(2, (count, 1, 8, 8)).float()
    block = blocks.encode(network, x, 7, 3)
    assert torch.equal(blocks.decode(network, block, count, 7, 3), x)
    # The codes of the first images take 2 latents of two dozen bits; the head of the stack 64.
    assert block.initial_bits <= 64 + 8 * 32


def test_a_damaged_block_with_a_right_checksum_is_no_wrong_image(network: vlae.VLAE) -> None:
    x = torch.randint(2, (20, 1, 8, 8)).float()
    block = blocks.encode(network, x, 0, 0)
    payload = bytearray(block.payload)
    payload[5] ^= 4
    wrong = [dataclasses.replace(block, payload=bytes(payload))]
    wrong += [dataclasses.replace(block, initial_words=block.initial_words + 1)]
    wrong += [dataclasses.replace(block, pixels=bytes(8))]
    for each in wrong:
        with pytest.raises(DamagedData, match="not those that were compressed"):
            blocks.decode(network, each, 20, 0, 0)
    for content in (block.payload[:-1], b"", block.payload + bytes(4)):
        with pytest.raises(DamagedData, match="no stack of bits"):
            blocks.decode(network, dataclasses.replace(block, payload=content), 20, 0, 0)
    with pytest.raises(DamagedData, match="not those that were compressed"):
        blocks.decode(network, block, 20, 1, 0)


@given(numbers=st.lists(st.integers(0, 2**11 - 1), max_size=30))
def test_packed_numbers_come_back_in_as_many_bits(numbers: list[int]) -> None:
    array = torch.tensor(numbers, dtype=torch.int64).numpy()
    packed = lossy.pack(array, 11)
    assert len(packed) == -(-11 * len(numbers) // 8)
    assert lossy.unpack(packed, len(numbers), 11).tolist() == numbers


@pytest.mark.parametrize("sent", [1, None])
def test_a_lossy_code_is_almost_a_sample_of_the_posterior(
    make_posterior: Callable[[], vlae.VLAE], sent: int | None
) -> None:
    """With enough candidates, its means and variances over seeds are those of the posterior."""
    network = make_posterior()
    x = torch.randint(2, (1, 1, 8, 8)).float()
    with torch.no_grad():
        posterior = network.encoder(x)
    drawn = []
    for seed in range(300):
        codes = lossy.candidates(network, 9, seed, sent)
        (number,) = lossy.unpack(lossy.encode(network, x, codes, seed), 1, 9)
        drawn.append(codes[number])
    z = torch.stack(drawn)
    assert z.shape[1] == (sent or network.latents)
    mean, scale = (each[0, :sent] for each in (posterior.mean, posterior.log_scale.exp()))
    assert (((z.mean(0) - mean) / scale).abs() < 5 / 300**0.5).all()
    assert ((z.std(0) / scale - 1).abs() < 0.25).all()


@pytest.fixture
def make_posterior(network: vlae.VLAE) -> Callable[[], vlae.VLAE]:
    """A model whose posterior lies off the prior, with a rate of a few bits."""

    def make() -> vlae.VLAE:
        with torch.no_grad():
            network.encoder.head.bias[:2] = torch.tensor([0.7, -0.5])
            network.encoder.head.bias[2:] = -2.0
        return network

    return make
