"""Small files that unpack to gigabytes wait for each other, or end in a sentence."""

import ast
import subprocess
import sys
import zlib

import pytest

from pipeline.data.images import MAX_PIXELS, BadImage, decode, measure

LIMITED = """
import io, resource, sys, threading
from PIL import Image
from pipeline.data import images
from pipeline.data.images import BadImage
file = io.BytesIO()
Image.new("RGBA", (4096, 4096), (0, 0, 0, 128)).save(file, "WEBP", lossless=True, quality=0)
content = file.getvalue()
assert len(content) < 1000
images.decode(content, 3, (16, 16))  # what stays loaded afterwards is not to be counted
found, begin = [None] * 8, threading.Event()

def work(number):
    begin.wait()
    try:
        found[number] = images.decode(content, 3, (16, 16))[8, 8].tolist()
    except BadImage as error:
        found[number] = str(error)

threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
begin.set()
for thread in threads: thread.join()
print(found)
"""


def under_a_limit(num_bytes: int) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(num_bytes)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={"PYTHONPATH": ":".join(sys.path), "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = ast.literal_eval(done.stdout)
    assert isinstance(found, list)
    return found


def test_images_that_unpack_to_gigabytes_together_are_decoded_in_turn() -> None:
    """Eight at once would take 3.1 GB; four do."""
    assert under_a_limit(2_500_000_000) == [[127, 127, 127]] * 8


def test_too_little_memory_is_a_sentence() -> None:
    found = under_a_limit(100_000_000)
    sentences = {"there is not enough memory to decode it", "could not create decoder object"}
    assert set(map(str, found)) <= sentences  # the second is WebP's


def bomb(width: int, height: int) -> bytes:
    """A PNG file whose header claims any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4)
        return len(content).to_bytes(4) + kind + content + check

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 6, 0, 0, 0])
    pixels = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize("side", [8193, 20_000, 2**31 - 1])
def test_more_pixels_than_are_allowed_are_refused_by_the_header(side: int) -> None:
    for read in (measure, lambda content: decode(content, 3, (16, 16))):
        with pytest.raises(
            BadImage, match=r"more (than the [\d,]+ allowed|pixels than are allowed)"
        ):
            read(bomb(side, MAX_PIXELS // 8192))
