"""Checkpoints: one safetensors object each, named by its step and the checksum of its content.

Since it is a single object, a checkpoint is atomic on any storage. Since its name holds its
checksum, damage is visible: a checkpoint is valid if and only if its content hashes to its name.
Nothing is unpickled.
"""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from pipeline.errors import UserError
from pipeline.runs import CHECKPOINTS
from pipeline.storage.base import ObjectNotFound, Storage

logger = logging.getLogger(__name__)

KEY = re.compile(rf"{CHECKPOINTS}/(\d{{10}})-([0-9a-f]{{64}})\.safetensors")
"""A checkpoint's key: its step and its sha256."""


State: TypeAlias = dict[str, Any]
"""The state of a part of a run, as PyTorch's ``state_dict`` returns it."""


class Stateful(Protocol):
    """A part of a run, such as a module or an optimizer."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state_dict: State, /) -> object: ...


def snapshot(state: Mapping[str, Stateful]) -> dict[str, Tensor]:
    """Copy a state of several named parts to the host, to be saved while training continues.

    This waits for the device.
    """
    return {
        f"{part}/{name}": value
        for part, each in state.items()
        for name, value in _tensors(each).items()
    }


def save(storage: Storage, step: int, tensors: Mapping[str, Tensor], keep: int) -> None:
    """Publish the state after ``step`` steps, and delete all but the ``keep`` newest checkpoints.

    Checkpoints of later steps are neither counted nor deleted. A later one is either damaged, and
    the run was resumed from before it, or it was written by another process of the same run, and is
    just as good. Raises UserError, and publishes nothing, if a value is not finite.
    """
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(
                f"{storage.url}: {name} is not finite after step {step}, so no checkpoint was"
                " written; lower optim.learning_rate"
            )
    data = serialize(dict(tensors), {"step": json.dumps(step)})
    saved = f"{CHECKPOINTS}/{step:010d}-{hashlib.sha256(data).hexdigest()}.safetensors"
    storage.write(saved, data)
    others = [key for key in _newest_first(storage) if key != saved]
    older = [key for key in others if _step(key) < step]
    later = [key for key in others if _step(key) > step]
    storage.delete(set(others) - {*later, *older[: keep - 1]})


def resume(storage: Storage, state: Mapping[str, Stateful], listings: int = 5) -> int:
    """Load the newest valid checkpoint into ``state``; returns its step, or 0 if there is none.

    Checkpoints are listed again, up to ``listings`` times, if one is deleted meanwhile. Damaged
    checkpoints are skipped with a warning. Raises UserError if an earlier version of this program
    wrote the checkpoint, with another optimizer state.
    """
    for key in _newest_first(storage):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            try:
                storage.download(key, path)
            except ObjectNotFound:  # deleted since the listing: a newer one was written
                if listings > 1:
                    return resume(storage, state, listings - 1)
                continue
            if not _is_valid(key, path):
                logger.warning(
                    "checkpoint %s/%s is damaged; trying the one before it", storage.url, key
                )
                continue
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                step = int(json.loads(file.metadata()["step"]))
        for part, each in state.items():
            prefix = part + "/"
            values: State = {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            if isinstance(each, torch.optim.Optimizer):
                values = _optimizer_state(each, values, f"{storage.url}/{key}")
            each.load_state_dict(values)
        return step
    return 0


def newest_step(storage: Storage) -> int:
    """The step of the newest checkpoint, valid or damaged; 0 if there is none."""
    return max(map(_step, _newest_first(storage)), default=0)


def _tensors(part: Stateful) -> dict[str, Tensor]:
    """Copy the state of a part to the host, as named tensors.

    An optimizer's tensors are named by the number of their weight and their own name.
    """
    state = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):
        state = {
            f"{index}/{name}": value
            for index, each in state["state"].items()
            for name, value in each.items()
        }
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def _optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], url: str
) -> State:
    """An optimizer's state from the tensors that ``_tensors`` named.

    Its settings stay as configured. Raises UserError if the shapes are those of other weights,
    which the optimizer itself would not notice.
    """
    shapes = {
        str(index): weights.shape
        for index, weights in enumerate(optimizer.param_groups[0]["params"])
    }
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, field = name.split("/")
        if value.ndim and value.shape != shapes.get(index):
            raise UserError(
                f"cannot resume from checkpoint {url}: an earlier version of this program wrote it;"
                " train a new run with another name="
            )
        state.setdefault(int(index), {})[field] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _newest_first(storage: Storage) -> list[str]:
    """The keys of all checkpoints, newest first."""
    return sorted(
        (key for key in storage.list(f"{CHECKPOINTS}/") if KEY.fullmatch(key)), reverse=True
    )


def _step(key: str) -> int:
    """The step in a checkpoint's key."""
    match = KEY.fullmatch(key)
    assert match
    return int(match[1])


def _is_valid(key: str, path: Path) -> bool:
    """Whether the file's content hashes to the checkpoint's key."""
    match = KEY.fullmatch(key)
    assert match
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == match[2]
