"""``vlae train``: what its progress bar shows."""

import re
from pathlib import Path

import pytest
import torch

from pipeline.commands.models.train import progress
from pipeline.runs import Run
from pipeline.training import checkpoint
from pipeline.training.metrics import MetricLog
from tests.pipeline import strokes


def test_the_progress_bar_of_a_resumed_run_begins_at_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = strokes.train_config(str(tmp_path), "name=resumed", "train.images=240")
    storage = Run.of(config).storage
    checkpoint.save(storage, 10, {"weights": torch.zeros(1)}, keep=1)
    with MetricLog(storage, 10, writes=True) as log, progress(config):
        for step in (11, 12):
            measured = {"images": 8 * step, "train/code_length": 50.0, "train/rate": 5.0}
            log.add(step, measured)
        log.flush()
    shown = capsys.readouterr().err.splitlines()
    assert re.search(r"resumed: +33%.*80\.0/240", shown[0])
    assert re.search(r"resumed: +40%.*96\.0/240 .*code length 50.00 nats, rate 5.00", shown[-1])
