"""Checkpoints: one safetensors object each, named after its step and its own checksum.

One object makes a checkpoint atomic on any storage, and a name that holds the checksum makes damage visible: a checkpoint is
valid exactly if its content hashes to its name. Nothing is unpickled.
"""

import hashlib
import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

import vlae
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

CUT = len("checkpoints/") + 10
"""Where the step ends in a checkpoint's key."""
NAME = re.compile(r"checkpoints/(\d{10})-([0-9a-f]{64})\.safetensors")


def save(
    storage: Storage, step: int, model: nn.Module, ema: vlae.EMA[Any], optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Publish the state after ``step`` steps, then delete all but the ``keep`` newest checkpoints.

    One of a later step is deleted, too: the run was resumed from before it, since it is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for part, state in (("model", model.state_dict()), ("ema", ema.state_dict())):
        tensors |= {f"{part}/{name}": value for name, value in state.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    data = serialize({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {"step": json.dumps(step)})
    saved = f"checkpoints/{step:010d}-{hashlib.sha256(data).hexdigest()}.safetensors"
    storage.write(saved, data)
    older = [key for key in _published(storage) if key[:CUT] < saved[:CUT]]
    storage.delete(set(_published(storage)) - {saved, *older[: keep - 1]})


def resume(storage: Storage, model: nn.Module, ema: vlae.EMA[Any], optimizer: torch.optim.Optimizer) -> int:
    """Take over the newest valid checkpoint; returns its step, or 0 if there is none. Damaged ones are passed over, and logged."""
    for key in _published(storage):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            storage.download(key, path)
            if not _is_valid(key, path):
                logger.warning("checkpoint %s/%s is damaged; the one before it is used", storage.url, key)
                continue
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                step = int(json.loads(file.metadata()["step"]))
        model.load_state_dict(_part(tensors, "model"))
        ema.load_state_dict(_part(tensors, "ema"))
        state: dict[int, dict[str, Any]] = {}
        for name, value in _part(tensors, "optimizer").items():
            index, field = name.split("/")
            state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return step
    return 0


def _published(storage: Storage) -> list[str]:
    """The keys of all checkpoints, newest first."""
    return sorted((key for key in storage.list("checkpoints/") if NAME.fullmatch(key)), reverse=True)


def _is_valid(key: str, path: Path) -> bool:
    match = NAME.fullmatch(key)
    assert match
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == match[2]


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(part + "/"): value for name, value in tensors.items() if name.startswith(part + "/")}
