"""The documentation as a site: it is whole, its links lead somewhere, and it needs no network."""

import asyncio
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import vlae
from pipeline.commands import NAMES
from pipeline.help import options_with_defaults, presets_of, summary
from tests.browser import CHROMIUM, Page

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/notebooks/first-codes.ipynb"
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
"""What a browser fetches by itself; other links are followed by people."""
PHONE, DESK = (390, 844), (1280, 900)

pytestmark = pytest.mark.timeout(900)


class Parsed(HTMLParser):
    """A page: its title and anchors, its links, what it loads, its text without white space."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = set[str](), list[str](), list[str]()
        self.words, self.title, self.in_title = list[str](), "", False
        self.feed(path.read_text())
        self.text = "".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.in_title = self.in_title or tag == "h1"
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                (self.loaded if (tag, name) in LOADED else self.links).append(value)

    def handle_endtag(self, tag: str) -> None:
        self.in_title = self.in_title and tag != "h1"

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        self.title += data if self.in_title else ""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, every page with its notebook run."""
    folder = tmp_path_factory.mktemp("site")
    words = ["--quiet", "--fail-on-warning", "--keep-going", "docs", str(folder)]
    # A network that is asked for anything answers nothing: the proxy is a closed port.
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *words],
        cwd=ROOT,
        env={**os.environ, **proxies, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Parsed]:
    found = {path: Parsed(path) for path in sorted(site.rglob("*.html"))}
    assert len(found) > 30
    return found


def problem(pages: dict[Path, Parsed], page: Path, link: str) -> str | None:
    """What is wrong with a link of a page within the site; links to elsewhere are not followed."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not path.is_file():
        return f"{page.name}: {link}: there is no such file"
    # Search results and buttons of the theme use "#" for the page itself.
    if parts.fragment and path in pages and unquote(parts.fragment) not in pages[path].anchors:
        return f"{page.name}: {link}: there is no such heading"
    return None


def plain(text: str) -> str:
    """A text without white space and without the backticks of code."""
    return "".join(text.split()).replace("`", "")


def test_every_link_and_anchor_within_the_site_leads_somewhere(pages: dict[Path, Parsed]) -> None:
    problems = [
        wrong
        for path, page in pages.items()
        for link in (*page.links, *page.loaded)
        if (wrong := problem(pages, path, link))
    ]
    assert not problems
    assert sum(len(page.links) for page in pages.values()) > 1000


@pytest.mark.parametrize("link", ["idee.html", "idea.html#no-such-heading", "#no-such-heading"])
def test_a_link_that_leads_nowhere_is_found(pages: dict[Path, Parsed], link: str) -> None:
    assert problem(pages, next(path for path in pages if path.name == "data.html"), link)


def test_every_document_is_a_page(pages: dict[Path, Parsed]) -> None:
    titles = {page.title.rstrip("\u00b6") for page in pages.values()}
    written = [path.read_text().partition("\n")[0] for path in (ROOT / "docs").glob("*.md")]
    assert {line.removeprefix("# ") for line in written} <= titles
    assert {"Quick start", "Architecture, and how to change it", "Changelog"} <= titles


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Parsed]) -> None:
    assert not [url for page in pages.values() for url in page.loaded if "//" in url]
    for sheet in site.rglob("*.css"):
        text = sheet.read_text()
        assert "url(http" not in text
        assert "@import" not in text


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_a_command_says_what_its_help_says(
    site: Path, pages: dict[Path, Parsed], name: str
) -> None:
    text = pages[site / f"generated/options/{name}.html"].text
    assert plain(summary(name)) in text
    for head, meaning in {**presets_of(name), **options_with_defaults(name)}.items():
        assert plain(head) + plain(meaning) in text


def test_the_reference_has_every_public_name(site: Path, pages: dict[Path, Parsed]) -> None:
    anchors = pages[site / "generated/reference.html"].anchors
    assert {f"vlae.{name}" for name in vlae.__all__} <= anchors
    assert {"vlae.VLAE.forward", "pipeline.data.DataSet.batches"} <= anchors


def test_the_notebook_has_been_run_and_its_model_learns_what_is_global(
    site: Path, pages: dict[Path, Parsed]
) -> None:
    page = pages[site / "notebooks/first-codes.html"]
    assert "thesamecodes:True" in page.text
    assert sum(url.endswith(".png") for url in page.loaded) == 4
    rates = [
        float(page.text.split(f"window{window}:rate")[1].split("nats")[0])
        for window in ("0x0", "3x1")
    ]
    information = float(page.text.rpartition("known:global")[2].split("nats")[0])
    # With the window, the code has about the global information; without, much more.
    assert 0.8 * information < rates[1] < 0.75 * rates[0]


def test_the_notebook_is_kept_with_the_outputs_of_all_its_cells() -> None:
    cells = [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in str(cell["outputs"]) for cell in cells) == 4


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_pages_fit_desks_and_phones_and_load_only_files(
    tmp_path: Path, site: Path, pages: dict[Path, Parsed]
) -> None:
    async def look() -> tuple[list[str], list[str], int]:
        too_wide = []
        async with Page(tmp_path) as page:
            for width, height in (DESK, PHONE):
                await page.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=height,
                    deviceScaleFactor=1,
                    mobile=width == PHONE[0],
                )
                for path in pages:
                    await page.open(path.as_uri())
                    wide = await page.evaluate("document.documentElement.scrollWidth")
                    if wide > width:
                        too_wide.append(f"{path.name}: {wide} pixels on {width}")
            await page.open(f"{(site / 'search.html').as_uri()}?q=window")
            for _ in range(300):
                results = await page.evaluate("document.querySelectorAll('.search li').length")
                if results > 5:  # they come one by one
                    break
                await asyncio.sleep(0.1)
            assert not page.errors()
            return too_wide, page.requested(), results

    too_wide, requested, results = asyncio.run(look())
    assert not too_wide
    assert not [url for url in requested if not url.startswith("file://")]
    assert results > 5
