"""A password in an option would end up in configurations, logs and the registry: it is refused."""

import pytest

from pipeline.commands import load
from pipeline.errors import UserError
from pipeline.storage import open_storage

SECRET = "hunter2"


@pytest.mark.parametrize(
    "override",
    [
        f"registry.uri=http://me:{SECRET}@server:5000",
        f"registry.uri=postgresql://me:{SECRET}@server/mlflow",
        f"storage.endpoint_url=https://key:{SECRET}@server:9000",
        f"storage.root=s3://key:{SECRET}@bucket/prefix",
        f"dataset.url=https://{SECRET}@server/data",
        f"dataset.path='https://server/x.tar?X-Amz-Signature={SECRET}'",
    ],
)
def test_an_address_with_a_password_is_refused_and_not_repeated(override: str) -> None:
    with pytest.raises(UserError, match="contains a password or a signature") as raised:
        load("train", [override])
    assert override.partition("=")[0] in str(raised.value)
    assert "AWS_ACCESS_KEY_ID" in str(raised.value)
    assert SECRET not in str(raised.value)


def test_a_password_in_the_environments_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://key:{SECRET}@127.0.0.1:9000")
    with pytest.raises(UserError, match="contains a password") as raised:
        open_storage("s3://bucket/prefix")
    assert SECRET not in str(raised.value)


def test_an_at_sign_in_a_key_is_no_password() -> None:
    assert load("train", ["storage.root=s3://bucket/me@work"]).storage.root.endswith("me@work")
