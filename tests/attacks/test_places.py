"""Addresses in a manifest that somebody else wrote lead nowhere that the user did not name."""

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import places
from pipeline.commands.images import index
from pipeline.data import DataSet
from pipeline.data.loader import EvalLoader
from pipeline.errors import UserError
from pipeline.storage import open_storage
from pipeline.storage.base import Storage
from tests.attacks.test_forged_manifests import forge
from tests.pipeline.commands.test_index import config_for, put
from tests.pipeline.conftest import write
from tests.servers import serving


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    place = open_storage(str(tmp_path / "data"))
    write(place)
    return place


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """The address of a server inside the user's network, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked


def point_at(storage: Storage, address: str, place: str) -> None:
    """Forge the first shard's address, and the place that is said to have been indexed."""

    def change(content: dict[str, object]) -> None:
        content["splits"]["train"][0]["name"] = address  # type: ignore[index]
        content["places"] = [place]

    forge(storage, change)


def test_a_foreign_manifest_reads_no_local_file_and_asks_no_server(
    storage: Storage, requests: tuple[str, list[str]], tmp_path: Path
) -> None:
    server, asked = requests
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.tar").write_text("secret")
    for place in ("/etc", str(tmp_path / "secret"), server, f"{server}/admin", "s3://other"):
        point_at(storage, f"{place}/x.tar", place)
        with pytest.raises(UserError) as refused:
            DataSet.load(storage)
        assert f"elsewhere, below {place}, where no vlae index of yours" in str(refused.value)
        assert f"VLAE_PLACES={place}" in str(refused.value)
    assert asked == []


def test_an_address_outside_the_stated_places_is_damage(storage: Storage) -> None:
    for address in (
        "/etc/passwd",
        "/data/tars/../../etc/passwd",
        "/data/tarsx/0.tar",
        "http://127.0.0.1/x.tar",
        "/data/tars//0.tar",
        "file:///data/tars/0.tar",
        "/data/tars/%00\n/0.tar",
    ):
        point_at(storage, address, "/data/tars")
        with pytest.raises(UserError, match=r"manifest\.json is damaged \("):
            DataSet.load(storage)


@pytest.mark.parametrize(
    "address",
    [
        "https://host/a/%2e%2e/b.tar",
        "https://host/a/%2E%2e%2Fb.tar",
        "https://user:password@host/a.tar",
        "https://host/a?b.tar",
        "https:///a.tar",
        "s3://",
        "s3:///a.tar",
        "s3://bucket/../other/a.tar",
        "ftp://host/a.tar",
        "gopher://127.0.0.1/a.tar",
        "//host/a.tar",
        "/",
        "a.tar",
        "/a\\..\\b",
        None,
        7,
    ],
    ids=str,
)
def test_what_is_no_plain_address_is_not_followed(address: object) -> None:
    assert not places.is_address(address)


def test_plain_addresses_and_keys_are_told_apart() -> None:
    for address in ("/data/a.tar", "s3://bucket/a/b.tar", "https://host:8080/a b/c%20d.tar"):
        assert places.is_address(address)
        assert not places.is_key(address)
    for key in ("a.tar", "train/00000-1f3a5b7c.tar", "a/é 1.tar"):
        assert places.is_key(key)
        assert not places.is_address(key)


def test_a_place_is_followed_if_it_holds_the_manifest_or_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places.check("s3://bucket/sets/x", ["s3://bucket/tars"])
    places.check("https://host/sets/x", ["https://host/tars"])
    monkeypatch.setenv("VLAE_PLACES", "/data/tars s3://public/laion")
    places.check("/root/datasets/x", ["/data/tars", "/data/tars/more", "s3://public/laion/7"])
    for place in ("/data", "/data/tars2", "s3://public", "s3://public/laion-x", "http://host/x"):
        with pytest.raises(UserError, match="below "):
            places.check("https://host/sets/x", [place])


@pytest.mark.usefixtures("ray_cluster")
def test_what_the_user_indexed_is_followed_and_the_same_manifest_is_not_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    storage = open_storage(str(tmp_path / "data"))
    put(storage)
    index.run(config_for(storage, f"{storage.url}/shards"))
    assert (tmp_path / "config/vlae/places").read_text() == f"{storage.url}/shards\n"
    data = DataSet.load(storage.child("manifest"))
    assert data.manifest.places == (f"{storage.url}/shards",)
    assert sum(len(batch.labels) for batch in EvalLoader(data, split="test", batch_size=9)) == 20

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody"))
    with pytest.raises(UserError, match=f"VLAE_PLACES={storage.url}/shards"):
        DataSet.load(storage.child("manifest"))
    monkeypatch.setenv("VLAE_PLACES", str(tmp_path))
    assert DataSet.load(storage.child("manifest")) == data


CODE = (
    "import os, ray\n"
    "from pipeline.cluster import connect\n"
    "from pipeline.config.sections import ClusterOptions, StorageOptions\n"
    "connect(ClusterOptions(), StorageOptions())\n"
    "read = ray.remote(num_cpus=0)(lambda: os.environ['VLAE_PLACES'])\n"
    "print(ray.get(read.remote()))\n"
)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_follow_what_the_user_of_the_command_follows(tmp_path: Path) -> None:
    (tmp_path / "vlae").mkdir()
    (tmp_path / "vlae" / "places").write_text("/data/tars\ns3://public\n")
    ended = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "VLAE_PLACES": "https://host/x"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ended.stdout.split() == ["/data/tars", "s3://public", "https://host/x"]
