"""A real browser without a window: Chromium, driven by its DevTools protocol."""

import asyncio
import itertools
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
    "--window-size=1200,900",
    "about:blank",
]


class Page:
    """One page of a browser of its own. A context manager; ``events`` holds what the browser told
    of it, as the protocol names it.
    """

    def __init__(self, folder: Path) -> None:
        """``folder``: where the browser keeps its profile."""
        self.folder, self.numbers, self.events = folder, itertools.count(), list[dict[str, Any]]()

    async def __aenter__(self) -> Self:
        assert CHROMIUM
        self.process = subprocess.Popen(
            [CHROMIUM, f"--user-data-dir={self.folder}", *OPTIONS], stderr=subprocess.DEVNULL
        )
        told, give_up = self.folder / "DevToolsActivePort", time.monotonic() + 60
        while not (told.exists() and "\n" in told.read_text()):
            assert self.process.poll() is None
            assert time.monotonic() < give_up, "the browser does not start"
            await asyncio.sleep(0.1)
        self.client = aiohttp.ClientSession()
        async with self.client.get(
            f"http://127.0.0.1:{told.read_text().splitlines()[0]}/json"
        ) as answer:
            address = next(
                each["webSocketDebuggerUrl"]
                for each in await answer.json()
                if each["type"] == "page"
            )
        self.socket = await self.client.ws_connect(address, max_msg_size=0)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.client.close()
        self.process.terminate()
        self.process.wait(60)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something; returns its answer."""
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            told = await self.socket.receive_json(timeout=60)
            if told.get("id") == number:
                assert "error" not in told, told
                return dict(told["result"])
            self.events.append(told)

    async def open(self, url: str) -> None:
        """Go to a page, and wait until all of it is there."""
        await self.call("Page.navigate", url=url)
        while await self.evaluate("document.readyState") != "complete":
            await asyncio.sleep(0.1)

    async def evaluate(self, script: str) -> Any:
        """The value of a piece of JavaScript."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def mouse(self, kind: str, selector: str) -> None:
        """Move the mouse to the middle of an element ("mouseMoved"), or press and release it there
        ("click").
        """
        box = (
            "(b => [b.x + b.width / 2, b.y + b.height /"
            f" 2])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        await self.evaluate(
            f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})"
        )
        x, y = await self.evaluate(box)
        for each in ("mousePressed", "mouseReleased") if kind == "click" else (kind,):
            button = {"button": "left", "clickCount": 1} if kind == "click" else {}
            await self.call("Input.dispatchMouseEvent", type=each, x=x, y=y, **button)

    async def drag(self, selector: str, way: list[tuple[float, float]]) -> None:
        """Draw with the mouse over an element: places as shares of its width and height."""
        box = f"document.querySelector({selector!r})"
        await self.evaluate(f"{box}.scrollIntoView({{block: 'center'}})")
        sides = f"(b => [b.x, b.y, b.width, b.height])({box}.getBoundingClientRect())"
        left, top, width, height = await self.evaluate(sides)
        kinds = ["mousePressed", *["mouseMoved"] * (len(way) - 2), "mouseReleased"]
        for kind, (x, y) in zip(kinds, way, strict=True):
            await self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=left + x * width,
                y=top + y * height,
                button="left",
                buttons=1,
                clickCount=1,
            )

    async def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an element that asks for one."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        found = await self.call("DOM.querySelector", nodeId=root, selector=selector)
        await self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=found["nodeId"])

    def errors(self) -> list[dict[str, Any]]:
        """What was written to the console, and exceptions."""
        return [
            event
            for event in self.events
            if event["method"]
            in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        ]

    def requested(self) -> list[str]:
        """The addresses of all that was loaded, but for what the page itself holds."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "about:"))]
