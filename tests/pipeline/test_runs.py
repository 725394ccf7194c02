"""A run's model is read as it was written, or not at all."""

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
