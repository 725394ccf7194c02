"""A run's model is read as it was written, or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.runs import Run
from pipeline.storage import open_storage, resume
from pipeline.storage.base import Storage
from pipeline.storage.server import ObjectStorageServer
from tests.faults.storage import Exchange, FaultyServer, corrupt
from tests.pipeline.models import prepare_run


def test_weights_that_arrive_altered_are_read_again(
    storage_server: ObjectStorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "BACKOFF", 0.01)
    monkeypatch.setattr(resume, "_has_damage", False)
    run = prepare_run(open_storage("s3://tests/altered"), 1)

    def fault(exchange: Exchange) -> None:
        if exchange.path.endswith(".safetensors") and exchange.turn < 5:
            corrupt(exchange)
        else:
            exchange.answer()

    proxy = FaultyServer(storage_server.port, fault)
    try:
        found = Run(open_storage(run.url, proxy.url)).open()
    finally:
        proxy.server_close()
    kept = run.open()
    assert found.weights == kept.weights
    for one, other in zip(found.network.parameters(), kept.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_damaged_weights_are_named(storage: Storage, tmp_path: Path) -> None:
    run = prepare_run(storage, 1)
    weights = bytearray(run.storage.read("model/model.safetensors"))
    weights[-5] ^= 1  # a weight's lowest bits: without a checksum, nobody would see it
    run.storage.write("model/model.safetensors", bytes(weights))
    with pytest.raises(
        UserError, match=rf"{run.url}/model/model.safetensors is damaged: its sha256"
    ):
        run.open()


OPENED = """
import sys
from pipeline.config.sections import RegistryOptions, StorageOptions
from pipeline.registry.models import open_model
open_model(sys.argv[1], RegistryOptions(), StorageOptions())
import torch, vlae
with torch.device("meta"):
    vlae.build(image_shape=(3, 32, 32), code="maps", latents=4, flow_depth=2, posterior_depth=1)
"""
LISTED = "import sys, pipeline.registry.versions"


@pytest.mark.parametrize(
    ("script", "heavy"),
    [(OPENED, ["mlflow", "ray", "sympy", "torch._dynamo"]), (LISTED, ["torch", "ray"])],
    ids=["a model is opened", "versions are listed"],
)
def test_what_is_not_needed_is_not_loaded(tmp_path: Path, script: str, heavy: list[str]) -> None:
    run = prepare_run(open_storage(str(tmp_path)), 1)
    found = f"print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", f"{script}\n{found}", run.url]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
