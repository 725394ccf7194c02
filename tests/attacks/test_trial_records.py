"""A trial's record that somebody else wrote is data: nothing in it is resolved, no option added."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.commands import load
from pipeline.errors import UserError
from pipeline.search.trials import Trials
from pipeline.storage.folder import FolderStorage

POINT = {"model.window": "3x1", "model.latents": 2, "model.flow_depth": 0}
SEARCH = [
    "search.space={model:{window:[3x1,5x2],latents:[2],flow_depth:[0]}}",
    "search.num_trials=2",
    "search.constraints=[]",
]
RECORD: dict[str, Any] = {
    "number": 1,
    "point": POINT,
    "run": "x-window3x1",
    "status": "unfinished",
}


def test_an_honest_record_is_read(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    storage.write_json("trials/0001.json", RECORD)
    (trial,) = Trials.load(load("tune", SEARCH), storage).rows
    assert trial.point == POINT


@pytest.mark.parametrize(
    "point",
    [
        POINT | {"model.window": "${oc.env:HOME}"},
        POINT | {"storage.root": "${oc.env:AWS_SECRET_ACCESS_KEY}"},
        POINT | {"registry.uri": "http://elsewhere"},
        POINT | {"model.window": "7x4"},
        POINT | {"model.flow_depth": False},
        {},
        "3x1",
        None,
    ],
)
def test_a_point_that_is_none_of_the_search_is_refused(tmp_path: Path, point: Any) -> None:
    storage = FolderStorage(tmp_path)
    storage.write_json("trials/0001.json", RECORD | {"point": point})
    with pytest.raises(UserError, match=r"trials/0001.json is damaged or forged"):
        Trials.load(load("tune", SEARCH), storage)


@pytest.mark.parametrize("record", [[], 3, {"status": "finished"}, RECORD | {"status": "x"}])
def test_what_is_no_record_is_refused(tmp_path: Path, record: Any) -> None:
    storage = FolderStorage(tmp_path)
    storage.write_json("trials/0001.json", record)
    with pytest.raises(UserError, match=r"trials/0001.json is no record of a trial"):
        Trials.load(load("tune", SEARCH), storage)
