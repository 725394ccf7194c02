"""The explorer's server answers its own page alone, and nobody makes it read a file or fail."""

import asyncio
import http.client
import json
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.explorer import server
from tests.attacks.test_html import Elements
from tests.browser import CHROMIUM, Page
from tests.pipeline.explorer import served
from tests.servers import serving

IMAGE = {"image": {"sample": 1}}
QUESTIONS: dict[str, dict[str, Any]] = {
    "start": {},
    "progress": {},
    "images": {"start": 0, "count": 3},
    "find": {"text": "7", "after": -1},
    "code": {"model": 0, **IMAGE},
    "redraw": {"model": 0, **IMAGE, "seed": 0, "draws": 2, "shown": 1, "moved": {"0": 0.5}},
    "walk": {"model": 0, **IMAGE, "to": {"sample": 2}, "seed": 0, "steps": 3},
    "neighbours": {"model": 0, **IMAGE, "count": 2},
}
"""A question of each kind that is answered."""


@dataclass(frozen=True)
class Served:
    """A running explorer."""

    address: str
    secret: str
    process: int

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def send(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """The status, headers and body of the answer to a request with exactly these headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Host": f"127.0.0.1:{self.port}", **(headers or {})}
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                if value:
                    connection.putheader(name, value)
            connection.endheaders()
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before all was read
                connection.send(body)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def ask(self, what: str, question: object, **headers: str) -> tuple[int, Any]:
        """The status, and the answer to a question asked with the secret."""
        body = question if isinstance(question, bytes) else json.dumps(question).encode()
        headers = {"Authorization": f"Bearer {self.secret}"} | headers
        status, _, answer = self.send("POST", f"/api/{what}", headers, body)
        return status, json.loads(answer)


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("root")
    (model,) = served.models(root, served.write_tiles(root), {"one": []})
    with served.serving(f"model={model.reference}") as (address, secret, process):
        yield Served(address, secret, process.pid)


def test_its_own_page_is_answered(explorer: Served) -> None:
    own = {"Origin": explorer.address, "Sec-Fetch-Site": "same-origin"}
    for what, question in QUESTIONS.items():
        assert explorer.ask(what, question)[0] == 200
        assert explorer.ask(what, question, **own)[0] == 200
    local = {"Host": f"localhost:{explorer.port}", "Origin": f"http://localhost:{explorer.port}"}
    assert explorer.ask("start", {}, **local)[0] == 200


def test_it_listens_on_loopback_alone(explorer: Served) -> None:
    found = psutil.Process(explorer.process).net_connections()
    listening = [each.laddr for each in found if each.status == psutil.CONN_LISTEN]
    assert [(each.ip, each.port) for each in listening] == [("127.0.0.1", explorer.port)]


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "127.0.0.1.evil.example:{port}",
        "localhost.evil.example:{port}",
        "[::1]:{port}",
        "0.0.0.0:{port}",
        "evil.example@127.0.0.1:{port}",
    ],
)
def test_a_name_that_was_made_to_stand_for_this_address_is_refused(
    explorer: Served, host: str
) -> None:
    host = host.format(port=explorer.port)
    status, told = explorer.ask("start", {}, Host=host)
    assert (status, list(told)) == (403, ["error"])
    for path in server.FILES:
        assert explorer.send("GET", path, {"Host": host})[0] == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:{other}"},
        {"Origin": "http://localhost:{port}"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"},
    ],
    ids=str,
)
def test_other_origins_are_refused_even_with_the_secret(
    explorer: Served, headers: dict[str, str]
) -> None:
    headers = {
        name: value.format(port=explorer.port, other=explorer.port + 1)
        for name, value in headers.items()
    }
    for what, question in QUESTIONS.items():
        status, told = explorer.ask(what, question, **headers)
        assert (status, list(told)) == (403, ["error"])


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "{secret}",
        "Bearer {part}",
        "Bearer {secret}x",
        "Basic {secret}",
        "Bearer \xff",
    ],
)
def test_without_the_secret_nothing_is_told(explorer: Served, given: str) -> None:
    given = given.format(secret=explorer.secret, part=explorer.secret[:-1])
    for what, question in [*QUESTIONS.items(), ("absent", {})]:
        status, told = explorer.ask(what, question, Authorization=given)
        assert (status, list(told)) == (401, ["error"])
        status, _, _ = explorer.send("POST", f"/api/{what}?token={explorer.secret}")
        assert status == 401
    assert len(explorer.secret) >= 43, "256 bits"


def test_no_other_page_is_given_leave_to_ask(explorer: Served) -> None:
    asked = {
        "Origin": "http://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    for headers in (asked, {**asked, "Origin": explorer.address}):
        status, given, _ = explorer.send("OPTIONS", "/api/start", headers)
        assert status >= 400
        assert not [name for name in given if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "path",
    [
        "/../../../etc/passwd",
        "/page/explore.js",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc/passwd",
        "/explore.js/../../server.py",
        "/server.py",
        "//etc/passwd",
        "/explore.html",
        "/static/",
        "/api/../explore.py",
    ],
)
def test_no_file_but_the_pages_is_given(explorer: Served, path: str) -> None:
    status, _, body = explorer.send("GET", path)
    assert status == 404
    assert list(json.loads(body)) == ["error"]


@pytest.mark.parametrize(
    "image",
    [
        "/etc/passwd",
        {"sample": "/etc/passwd"},
        {"path": "/etc/passwd"},
        {"sample": "0"},
        {"sample": -1},
        {"sample": 70},
        {"sample": 2**80},
        {"sample": True},
        {"sample": 1.0},
        {"sample": 1, "pixels": ""},
        {"pixels": ""},
        {"pixels": "AAAA"},
        {"pixels": "?" * 480},
        {"pixels": "\ud800"},
        {"pixels": 5},
        None,
        [],
        3,
    ],
    ids=str,
)
def test_what_is_no_image_is_refused_in_a_sentence(explorer: Served, image: object) -> None:
    for what in ("code", "redraw", "walk", "neighbours"):
        status, told = explorer.ask(what, QUESTIONS[what] | {"image": image})
        assert (status, list(told)) == (400, ["error"])
        assert "image" in told["error"] or "pixels" in told["error"] or "sample" in told["error"]
        assert "Traceback" not in told["error"]


@pytest.mark.parametrize(
    "moved",
    [
        {"9": 1},
        {"-1": 1},
        {"z": 1},
        {"1.0": 1},
        {"\u0661": 1},
        {"0": 1e9},
        {"0": "1"},
        {"0": None},
        {"0": True},
        {"0": float("nan")},
        {"0": float("inf")},
        {str(n): 0 for n in range(500)},
        {"1" * 5000: 1},
        [],
        "0",
        0,
    ],
    ids=lambda moved: str(moved)[:20],
)
def test_latents_that_there_are_not_or_too_far_are_refused(explorer: Served, moved: object) -> None:
    status, told = explorer.ask("redraw", QUESTIONS["redraw"] | {"moved": moved})
    assert (status, list(told)) == (400, ["error"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"text"',
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"NaN",
        b'{"model": ' + b"9" * 5_000 + b"}",
    ],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_question_is_refused_in_a_sentence(explorer: Served, body: bytes) -> None:
    status, told = explorer.ask("code", body)
    assert status in (400, 413)
    assert list(told) == ["error"]


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(what=st.sampled_from([*QUESTIONS]), data=st.data())
def test_any_values_are_answered_or_refused_in_a_sentence(
    explorer: Served, what: str, data: st.DataObject
) -> None:
    question = dict(QUESTIONS[what])
    for key in data.draw(st.sets(st.sampled_from([*question, "other"]))):
        question[key] = data.draw(ANYTHING)
    status, told = explorer.ask(what, question)
    assert status in (200, 400), told
    assert (list(told) == ["error"]) == (status == 400)


@pytest.mark.parametrize("size", [1 << 20, 1 << 28])
def test_a_request_that_is_too_large_is_refused_before_it_is_read(
    explorer: Served, size: int
) -> None:
    headers = {"Authorization": f"Bearer {explorer.secret}", "Content-Length": str(size)}
    before = psutil.Process(explorer.process).memory_info().rss
    status, _, body = explorer.send("POST", "/api/code", headers, b"0" * (1 << 20))
    assert (status, list(json.loads(body))) == (413, ["error"])
    chunked = headers | {"Content-Length": "", "Transfer-Encoding": "chunked"}
    chunk = b"10000\r\n" + b"0" * 0x10000 + b"\r\n"
    assert explorer.send("POST", "/api/code", chunked, 16 * chunk)[0] == 413
    assert psutil.Process(explorer.process).memory_info().rss < before + (64 << 20)
    assert explorer.ask("progress", {})[0] == 200


def test_what_is_not_http_ends_nothing(explorer: Served) -> None:
    for text in (
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", explorer.port), timeout=60) as client:
            client.sendall(text)
            assert not re.match(rb"HTTP/1.1 2", client.recv(1 << 16))
    assert explorer.ask("progress", {})[0] == 200


def test_every_answer_has_the_policy_and_the_page_keeps_it(explorer: Served) -> None:
    answers = [explorer.send("GET", path) for path in [*server.FILES, "/absent"]]
    answers += [explorer.send("POST", "/api/start"), explorer.send("GET", "/", {"Host": "evil"})]
    for _, headers, _ in answers:
        assert headers["Content-Security-Policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"
    texts = {path: explorer.send("GET", path)[2].decode() for path in server.FILES}
    assert explorer.secret not in "".join(texts.values())
    parser = Elements()
    parser.feed(texts["/"])
    for tag, attributes in parser.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert (
            tag not in ("style", "iframe", "object", "base", "form") or "action" not in attributes
        )
        assert tag != "script" or attributes.get("src"), "no inline script"
        for name in ("src", "href"):
            assert attributes.get(name, "/").startswith("/")  # type: ignore[union-attr]
    for path, text in texts.items():
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path


@pytest.mark.skipif(
    CHROMIUM is None, reason="there is no browser on this machine: apt-get install chromium"
)
def test_a_page_of_another_origin_cannot_ask_or_frame_it_though_it_knows_the_secret(
    explorer: Served, tmp_path: Path
) -> None:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<!doctype html><title>evil</title>")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

    ask = f"""fetch("{explorer.address}/api/start", {{method: "POST", body: "{{}}", MODE
        headers: {{"Authorization": "Bearer {explorer.secret}"}}}})
        .then(answer => answer.text(), error => "refused: " + error)"""

    async def value(page: Page, script: str) -> Any:
        """What a promise gives."""
        answer = await page.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        return answer["result"]["value"]

    async def visit(port: int) -> None:
        async with Page(tmp_path / "browser") as page:
            await page.open(f"http://127.0.0.1:{port}/")
            assert (await value(page, ask.replace("MODE", ""))).startswith("refused: ")
            simple = ask.replace("MODE", 'mode: "no-cors",')
            assert (await value(page, simple)).startswith("refused: ")
            framed = f"""new Promise(done => {{
                const frame = document.createElement("iframe");
                frame.src = "{explorer.address}/#{explorer.secret}";
                frame.onload = () => done("loaded");
                document.body.append(frame);
            }})"""
            assert await value(page, framed) == "loaded"
            errors = json.dumps(page.errors())
            assert "frame-ancestors" in errors or "X-Frame-Options" in errors
            script = f"""new Promise(done => {{
                const script = document.createElement("script");
                script.src = "{explorer.address}/asking.js";
                script.onload = () => done("loaded");
                script.onerror = () => done("refused");
                document.body.append(script);
            }})"""
            assert await value(page, script) == "refused"

    pages = partial(Quiet, directory=tmp_path / "page")
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), pages)) as evil:
        asyncio.run(visit(evil.server_port))
