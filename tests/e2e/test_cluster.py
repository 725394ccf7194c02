"""The cluster file for plain hosts, on two of them: `ray up` over ssh, then jobs."""

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.faults import namespaces
from tests.faults.namespaces import Laptop

if reason := namespaces.lacking():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[namespaces.Network]:
    with namespaces.network(tmp_path_factory.mktemp("hosts"), 2) as network:
        yield network


@pytest.fixture(scope="module")
def laptop(
    network: namespaces.Network, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Laptop]:
    with namespaces.ray_up(network, tmp_path_factory.mktemp("laptop")) as laptop:
        yield laptop


def test_ray_up_makes_one_cluster_of_all_hosts_without_their_hands(
    laptop: Laptop, network: namespaces.Network
) -> None:
    while namespaces.num_hosts(laptop) < 2:  # pytest's time limit ends what does not come
        time.sleep(1)
    for host in network.hosts:
        token = host.home / ".ray/auth_token"
        assert token.read_text() == (laptop.home / ".ray/auth_token").read_text()
        assert not token.stat().st_mode & 0o077
        assert not (host.home / "vlae-pipeline/tests").exists()


def test_a_job_is_submitted_watched_and_stopped(laptop: Laptop) -> None:
    laptop.ray(
        "job",
        "submit",
        "--submission-id",
        "long",
        "--working-dir",
        ".",
        "--no-wait",
        "--",
        "python",
        "-c",
        "import pipeline.data.order, time; print('it runs', flush=True); time.sleep(1000)",
    )
    while "it runs" not in laptop.ray("job", "logs", "long"):
        time.sleep(0.5)
    assert "RUNNING" in laptop.ray("job", "status", "long")
    laptop.ray("job", "stop", "long")
    assert "was stopped" in laptop.ray("job", "status", "long")


def test_nobody_gets_in_without_the_token(laptop: Laptop) -> None:
    stranger = Laptop(laptop.home, laptop.environment | {"RAY_AUTH_TOKEN": "0" * 64})
    with pytest.raises(subprocess.CalledProcessError) as refused:
        stranger.ray("job", "list")
    assert "authenti" in refused.value.stdout.lower()
