"""The explorer's page in a real browser, used as a person would."""

import asyncio
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import CHROMIUM, Page
from tests.pipeline.explorer import served

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no browser on this machine: apt-get install chromium"
)

LOOKS = "[...document.querySelectorAll({!r})].map(canvas => canvas.toDataURL())"
"""What canvases show, by their selector."""
DRAWN = ".drawn canvas, .pictures figure:not(.original) canvas"
SEEN, WALKED, NEAR = ".original canvas", "#walk canvas", "#near canvas"
SLIDER = ".card:first-child .latent:first-child input"


async def settle(page: Page) -> None:
    """Wait until the page has asked all that it wants to know."""
    busy = "document.querySelector('main').hidden || document.body.classList.contains('busy')"
    quiet, give_up = 0, time.monotonic() + 100
    while quiet < 3:
        assert time.monotonic() < give_up, page.errors()
        await asyncio.sleep(0.1)
        quiet = 0 if await page.evaluate(busy) else quiet + 1


async def looks(page: Page, selector: str) -> list[str]:
    found: list[str] = await page.evaluate(LOOKS.format(selector))
    assert found
    return found


async def text(page: Page, selector: str) -> str:
    return str(await page.evaluate(f"document.querySelector({selector!r}).textContent"))


async def check_width(page: Page) -> None:
    """No width of a window makes the page wider than it."""
    for width in (1280, 600):
        await page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_black_and_white_images_are_chosen_redrawn_moved_walked_and_drawn(tmp_path: Path) -> None:
    data = served.write_strokes(tmp_path)
    models = [model.reference for model in served.models(tmp_path, data)]

    async def visit(address: str, secret: str) -> None:
        async with Page(tmp_path / "browser") as page:
            await page.open(f"{address}/#{secret}")
            await settle(page)
            assert await page.evaluate("document.querySelectorAll('.card').length") == 2
            assert (
                "13 test images of data set strokes, 8 \u00d7 8, in black and white."
                in await text(page, "#about")
            )
            await check_width(page)
            resolution = ".card:first-child .note:not([hidden]) + .note:not([hidden])"
            give_up = time.monotonic() + 60
            while not await page.evaluate(f"!!document.querySelector({resolution!r})"):
                assert time.monotonic() < give_up, "no resolution is shown"
                await asyncio.sleep(0.1)
            assert (await text(page, resolution)).startswith("resolution: ")

            seen, drawn, walked, near = [
                await looks(page, each) for each in (SEEN, DRAWN, WALKED, NEAR)
            ]
            assert (len(seen), len(drawn), len(walked), len(near)) == (2, 10, 22, 24)
            await page.mouse("click", "#thumbs button:nth-child(5)")
            await settle(page)
            assert "image 4" in await text(page, "#first i")
            assert await looks(page, SEEN) != seen
            assert await looks(page, DRAWN) != drawn
            assert await looks(page, NEAR) != near

            drawn, moved = await looks(page, DRAWN), f"document.querySelector({SLIDER!r}).value"
            place = await page.evaluate(moved)
            await page.drag(SLIDER, [(0.5, 0.5), (0.8, 0.5), (0.98, 0.5), (0.98, 0.5)])
            await settle(page)
            assert float(await page.evaluate(moved)) > float(place) + 1
            changed = await looks(page, DRAWN)
            assert changed[:5] != drawn[:5]
            assert changed[5:] == drawn[5:], "a slider moves the latent of its own model"
            assert "mean of 32" in await text(
                page, "figcaption + canvas, figure:not(.original) figcaption"
            )
            await page.mouse("click", ".card:first-child h4 button")
            await settle(page)
            assert await looks(page, DRAWN) == drawn, "latents go back to where they were"
            await page.mouse("click", "#again")
            await settle(page)
            assert await looks(page, DRAWN) != drawn

            walked = await looks(page, WALKED)
            await page.mouse("click", "#second")
            await page.mouse("click", "#thumbs button:nth-child(9)")
            await settle(page)
            other = await looks(page, WALKED)
            assert other[0] == walked[0], "the walk begins at the same image"
            assert other[10] != walked[10]
            assert other[0] == (await looks(page, SEEN))[0]

            await page.mouse("click", "#first")
            await page.mouse("click", "#tab-draw")
            seen, near = await looks(page, SEEN), await looks(page, NEAR)
            await page.drag("#paper", [(0.2, 0.2), (0.5, 0.5), (0.8, 0.8), (0.8, 0.8)])
            await settle(page)
            assert await text(page, "#first i") == "your drawing"
            assert await looks(page, SEEN) != seen
            assert await looks(page, NEAR) != near
            await page.mouse("click", "#near button")
            await settle(page)
            assert (await text(page, "#first i")).startswith("image ")
            assert page.errors() == []

            await page.open(f"{address}/")
            give_up = time.monotonic() + 60
            while not await text(page, "#problem"):
                assert time.monotonic() < give_up
                await asyncio.sleep(0.1)
            assert await text(page, "#problem") == (
                "open the address that vlae explore printed last, all of it"
            )
            assert await page.evaluate("document.querySelector('main').hidden")
            assert all(url.startswith(f"{address}/") for url in page.requested())

    with served.serving(f"models=[{','.join(models)}]") as (address, secret, _):
        asyncio.run(visit(address, secret))


def test_colour_images_are_found_by_name_copied_painted_and_opened(tmp_path: Path) -> None:
    shape = (3, 64, 64)
    data = served.write_tiles(tmp_path, shape)
    (model,) = served.models(tmp_path, data, {"colour": ["model.window=2x1"]})
    picture = tmp_path / "red.png"
    Image.new("RGB", (40, 90), (250, 20, 10)).save(picture)
    (tmp_path / "text.png").write_text("no picture")
    average = """
    (copy => {
      copy.drawImage(document.querySelector('.original canvas'), 0, 0);
      const data = copy.getImageData(0, 0, 64, 64).data;
      return [0, 1, 2].map(c => data.filter((_, i) => i % 4 == c).reduce((a, b) => a + b) / 4096);
    })(document.createElement('canvas').getContext('2d', {willReadFrequently: true}))
    """

    async def visit(address: str, secret: str) -> None:
        async with Page(tmp_path / "browser") as page:
            await page.open(f"{address}/#{secret}")
            await settle(page)
            assert "64 \u00d7 64, in colour" in await text(page, "#about")
            await page.evaluate("document.getElementById('wanted').value = 'tile-57'")
            await page.mouse("click", "#find button")
            await settle(page)
            assert await text(page, "#first i") == "image 57, odd, A/tile-57.png"
            assert await text(page, "#range") == "40 \u2013 69 of 70"
            await page.evaluate("document.getElementById('wanted').value = 'zebra'")
            await page.mouse("click", "#find button")
            await settle(page)
            assert "none of the first 70 images has a name with 'zebra'" in await text(
                page, "#problem"
            )

            seen = await looks(page, SEEN)
            await page.mouse("click", "#tab-draw")
            await page.mouse("click", "#copy")
            await settle(page)
            assert await looks(page, SEEN) == seen, "the copy has every pixel of the original"
            await page.mouse("click", "#colours input:nth-child(6)")
            await page.drag("#paper", [(0.1, 0.5), (0.9, 0.5), (0.9, 0.5)])
            await settle(page)
            assert await looks(page, SEEN) != seen
            await page.choose_file("#file", picture)
            await settle(page)
            assert await page.evaluate(average) == [250, 20, 10]
            await page.choose_file("#file", tmp_path / "text.png")
            await settle(page)
            assert "text.png is no picture" in await text(page, "#problem")
            assert await page.evaluate(average) == [250, 20, 10]
            refused = [event for event in page.errors() if "400" in str(event)]
            assert page.errors() == refused, "but for the name that there is not, all went well"
            await check_width(page)

    with served.serving(f"model={model.reference}") as (address, secret, _):
        asyncio.run(visit(address, secret))
