"""Addresses of servers that cannot be right are refused before anything is asked of them."""

import pytest

from pipeline.commands import load
from pipeline.config.addresses import check_endpoint, host_and_port
from pipeline.errors import UserError
from pipeline.storage import open_storage


@pytest.mark.parametrize(
    "url",
    ["http://localhost:9000", "https://s3.example.com/", "http://[::1]:9000", "http://10.0.0.1"],
)
def test_the_address_of_a_server_is_taken(url: str) -> None:
    check_endpoint("key", url)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("localhost:9000", "http://localhost:9000 or https://localhost:9000"),
        ("s3.example.com", "http://HOST:PORT"),
        ("http://localhost:9000/bucket", "s3://BUCKET/PREFIX"),
        ("http://localhost:9000/?x", "s3://BUCKET/PREFIX"),
        ("htp://localhost:9000", "http://HOST:PORT"),
        ("s3://bucket", "http://HOST:PORT"),
        ("http:/localhost:9000", "http://HOST:PORT"),
        ("http://", "http://HOST:PORT"),
        ("http://local host:9000", "http://HOST:PORT"),
        ("http://localhost:port", "http://HOST:PORT"),
        ("http://localhost:99999", "http://HOST:PORT"),
        ("http://[::1:9000", "http://HOST:PORT"),
        ("http://a..b:9000", "http://HOST:PORT"),
    ],
)
def test_what_is_no_address_of_a_server_is_refused(
    url: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        load("train", [f"storage.endpoint_url='{url}'"])
    assert str(caught.value).startswith(f"storage.endpoint_url={url} is not the address of an S3")
    assert meant in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    with pytest.raises(UserError, match=r"^AWS_ENDPOINT_URL_S3=.* is not the address"):
        open_storage("s3://bucket/prefix")


def test_the_host_and_port_of_a_cluster_are_found() -> None:
    assert host_and_port("10.0.0.1:6379") == ("10.0.0.1", 6379)
    assert host_and_port("ray://head.example:10001") == ("head.example", 10001)
    assert host_and_port("[::1]:6379") == ("::1", 6379)
    for address in ("auto", "local", "10.0.0.1", "http://10.0.0.1:8265", "a:b:c"):
        assert host_and_port(address) is None
