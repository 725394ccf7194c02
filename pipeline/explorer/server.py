"""The server of the page: on loopback alone, for the browser that was given its address.

Who may ask is decided here, and only here:

- the socket listens on 127.0.0.1;
- a request must name this server in its ``Host`` header, so that no other name can be made to
  stand for this address (DNS rebinding);
- a browser says in ``Origin`` and ``Sec-Fetch-Site`` whose page a request comes from, and must say
  this server's own;
- an answer is given only for the secret in the printed address. It stands behind the ``#``, which
  browsers send to nobody; the page's script puts it into a header.

The page itself is the same for everybody and tells nothing. Its content security policy lets it
load nothing from elsewhere, and run no script but its own.
"""

import asyncio
import hmac
import importlib.resources
import logging
import math
import secrets
import signal
import webbrowser
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from aiohttp import web

from pipeline.errors import UserError
from pipeline.explorer.asked import Question
from pipeline.explorer.session import Session
from pipeline.machine import device, num_threads

logger = logging.getLogger(__name__)
SILENT = logging.Logger("aiohttp.server", logging.CRITICAL + 1)

HOST = "127.0.0.1"
GRACE = 1.0
"""Seconds that answers may still take once the server is told to stop."""
FILES = {
    "/": ("explore.html", "text/html"),
    "/explore.css": ("explore.css", "text/css"),
    "/explore.js": ("explore.js", "text/javascript"),
    "/asking.js": ("asking.js", "text/javascript"),
    "/card.js": ("card.js", "text/javascript"),
    "/drawing.js": ("drawing.js", "text/javascript"),
    "/elements.js": ("elements.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""The page's files, by their path: no other file can be asked for."""
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
"""Headers of every answer."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Answers a session's questions over HTTP."""

    def __init__(self, session: Session) -> None:
        self.session, self.secret, self.port = session, secrets.token_urlsafe(32), 0
        self._pool = ThreadPoolExecutor(num_threads(device()))
        page = importlib.resources.files("pipeline.explorer") / "page"
        self._files = {
            path: ((page / name).read_bytes(), kind) for path, (name, kind) in FILES.items()
        }

    @property
    def address(self) -> str:
        """The address that opens the page, with its secret."""
        return f"http://{HOST}:{self.port}/#{self.secret}"

    async def run(self, port: int, ready: Callable[[], object]) -> None:
        """Serve until SIGINT or SIGTERM; ``ready`` is called once the port is open.

        Meanwhile learn about the session's images. Raises UserError if the port is taken.
        """
        # A question holds at most two images in base64 and a number for each latent.
        latents = max(model.network.latents for model in self.session.models)
        most = 4 * math.prod(self.session.shape) + 64 * latents + (1 << 16)
        app = web.Application(middlewares=[self._guard], client_max_size=most)
        app.on_response_prepare.append(self._add_headers)
        for path in self._files:
            app.router.add_get(path, self._file)
        app.router.add_post("/api/{name}", self._answer)
        # What is not HTTP is refused by aiohttp, which would log it with a traceback.
        runner = web.AppRunner(app, access_log=None, logger=SILENT, shutdown_timeout=GRACE)
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        await runner.setup()
        learning = None
        try:
            try:
                await web.TCPSite(runner, HOST, port).start()
            except OSError as error:
                raise UserError(
                    f"cannot listen on port {port} ({error.strerror}); give port=0 for any free"
                    " port"
                ) from None
            self.port = runner.addresses[0][1]
            learning = asyncio.create_task(self._learn())
            ready()
            await stopped.wait()
        finally:
            self.session.stop()
            if learning:
                learning.cancel()
            await runner.cleanup()
            self._pool.shutdown(cancel_futures=True)

    async def _learn(self) -> None:
        """Encode the session's images, and measure resolutions, beside the answers.

        Batches to encode stand in line with the questions. The resolution, which takes longer, has
        a thread of its own.
        """
        loop = asyncio.get_running_loop()
        while await loop.run_in_executor(self._pool, self.session.encode_next):
            pass
        await asyncio.to_thread(self.session.measure_resolutions)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what does not come from this page, and turn errors into sentences."""
        names = (f"{HOST}:{self.port}", f"localhost:{self.port}")
        if request.headers.get("Host") not in names:
            return _refusal(403, f"this server answers only as {names[0]}")
        origin = request.headers.get("Origin", f"http://{request.headers['Host']}")
        site = request.headers.get("Sec-Fetch-Site", "none")
        followed = request.headers.get("Sec-Fetch-Mode") == "navigate" and request.method == "GET"
        is_own = site in ("same-origin", "none") or followed
        if origin != f"http://{request.headers['Host']}" or not is_own:
            return _refusal(403, "this server answers only its own page")
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return _refusal(413, "the request is larger than any question about these images")
        except web.HTTPException as error:
            return _refusal(error.status, f"{request.method} {request.path}: {error.reason}")
        except UserError as error:
            return _refusal(400, str(error))
        except Exception:
            logger.exception("cannot answer %s %s", request.method, request.path)
            return _refusal(500, "vlae explore failed to answer; its terminal says why")

    async def _file(self, request: web.Request) -> web.Response:
        body, kind = self._files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _answer(self, request: web.Request) -> web.Response:
        """The answer to a question, as JSON. Raises UserError and web.HTTPException."""
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {self.secret}".encode()):
            return _refusal(401, "open the address that vlae explore printed last, all of it")
        answer = self.session.answers.get(request.match_info["name"])
        if answer is None:
            raise web.HTTPNotFound
        question = Question.read(await request.read())
        loop = asyncio.get_running_loop()
        return web.json_response(await loop.run_in_executor(self._pool, answer, question))

    @staticmethod
    async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)


def serve(session: Session, port: int, browser: bool) -> None:
    """Serve the page until Ctrl-C, and print its address. Raises UserError if the port is taken."""
    server = Server(session)

    def ready() -> None:
        print(f"explore at {server.address}")
        print("Ctrl-C stops it", flush=True)
        if browser:
            with suppress(webbrowser.Error):
                webbrowser.open(server.address)

    asyncio.run(server.run(port, ready))
    print("explorer stopped")


def _refusal(status: int, sentence: str) -> web.Response:
    return web.json_response({"error": sentence}, status=status)
