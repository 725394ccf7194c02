"""Checkpoints: one safetensors object each, named after its step and its own checksum.

One object makes a checkpoint atomic on any storage, and a name that holds the checksum makes damage
visible: a checkpoint is valid exactly if its content hashes to its name. Nothing is unpickled.
"""

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from pipeline.errors import UserError
from pipeline.storage.base import Storage

logger = logging.getLogger(__name__)

CUT = len("checkpoints/") + 10
"""Where the step ends in a checkpoint's key."""
NAME = re.compile(r"checkpoints/(\d{10})-([0-9a-f]{64})\.safetensors")


class Stateful(Protocol):
    """A part of a run's state: a module, an average of one, an optimizer, or what else goes on
    where it was.
    """

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def snapshot(state: Mapping[str, Stateful]) -> dict[str, Tensor]:
    """A copy, on the host, of a state of several named parts, to be saved while training goes on.
    This waits for the device.
    """
    return {
        f"{part}/{name}": value
        for part, each in state.items()
        for name, value in _tensors(each).items()
    }


def save(storage: Storage, step: int, tensors: Mapping[str, Tensor], keep: int) -> None:
    """Publish the snapshot of after ``step`` steps, then delete all but the ``keep`` newest
    checkpoints up to that step.

    One of a later step stays: the run was resumed from before it, since it is damaged, or else it
    is another process's, of the same run, and just as good. Raises UserError, and publishes
    nothing, if a number in it is not finite.
    """
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(
                f"{storage.url}: {name} is not finite after step {step}, and no checkpoint of it is"
                " kept; lower optim.learning_rate"
            )
    data = serialize(dict(tensors), {"step": json.dumps(step)})
    saved = f"checkpoints/{step:010d}-{hashlib.sha256(data).hexdigest()}.safetensors"
    storage.write(saved, data)
    published = [key for key in _published(storage) if key != saved]
    older = [key for key in published if key[:CUT] < saved[:CUT]]
    later = [key for key in published if key[:CUT] > saved[:CUT]]
    storage.delete(set(published) - {*later, *older[: keep - 1]})


def resume(storage: Storage, state: Mapping[str, Stateful]) -> int:
    """Take over the newest valid checkpoint; returns its step, or 0 if there is none. Damaged ones
    are passed over, and logged.

    Raises UserError if it is one of an earlier version, with a state that the optimizer does not
    have.
    """
    for key in _published(storage):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            storage.download(key, path)
            if not _is_valid(key, path):
                logger.warning(
                    "checkpoint %s/%s is damaged; the one before it is used", storage.url, key
                )
                continue
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                step = int(json.loads(file.metadata()["step"]))
        for part, each in state.items():
            prefix = part + "/"
            values: dict[str, Any] = {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            if isinstance(each, torch.optim.Optimizer):
                values = _nested(each, values, f"{storage.url}/{key}")
            each.load_state_dict(values)
        return step
    return 0


def newest_step(storage: Storage) -> int:
    """The step of the newest checkpoint, be it whole or not; 0 if there is none."""
    return max((int(key[:CUT].rpartition("/")[2]) for key in _published(storage)), default=0)


def _tensors(part: Stateful) -> dict[str, Tensor]:
    """The state of a part on the host, each tensor by its name; an optimizer's by the number of its
    weight and its name.
    """
    state = part.state_dict()
    if isinstance(part, torch.optim.Optimizer):
        state = {
            f"{index}/{name}": value
            for index, each in state["state"].items()
            for name, value in each.items()
        }
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def _nested(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], url: str
) -> dict[str, Any]:
    """An optimizer's state, the other way round. Its settings are those of the configuration.

    Raises UserError if it is that of other weights, which the optimizer would not notice.
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
                f"checkpoint {url} cannot be gone on from: an earlier version of this program wrote"
                " it; train anew with another name="
            )
        state.setdefault(int(index), {})[field] = value
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _published(storage: Storage) -> list[str]:
    """The keys of all checkpoints, newest first."""
    return sorted(
        (key for key in storage.list("checkpoints/") if NAME.fullmatch(key)), reverse=True
    )


def _is_valid(key: str, path: Path) -> bool:
    match = NAME.fullmatch(key)
    assert match
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == match[2]
