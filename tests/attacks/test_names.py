"""Names become parts of paths and addresses: one rule holds for all, before anything runs."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import cli
from pipeline.commands import load
from pipeline.errors import UserError
from pipeline.values import is_name

ODD = ["../../x", "..", ".hidden", "-x", "a/b", "a\\b", "/etc/x", "s3://b/x", "a b", "é", "x" * 201]
NAMED = [
    ("shard", "dataset.name", []),
    ("index", "dataset.name", ["index.train=/data/tars"]),
    ("data", "dataset.name", ["action=inspect"]),
    ("train", "dataset.name", []),
    ("train", "name", []),
    ("tune", "dataset.name", []),
    ("tune", "name", []),
    ("tune", "model_name", []),
    ("registry", "name", ["action=show"]),
]


@pytest.mark.parametrize(("command", "key", "others"), NAMED)
def test_what_is_no_name_is_refused_by_the_same_sentence(
    command: str, key: str, others: list[str], tmp_path: Path
) -> None:
    for odd in ODD:
        with pytest.raises(UserError) as refused:
            load(command, [*others, f"storage.root={tmp_path}/root", f"{key}='{odd}'"])
        assert str(refused.value).startswith(f"{key}={odd} is no name; use ")


@pytest.mark.parametrize(
    "words",
    [
        ["shard", "dataset=folder", "dataset.path=icons", "dataset.name=../../x"],
        ["train", "dataset.name=../../x"],
        ["train", "name=../../x"],
        ["tune", "model_name=../x"],
    ],
    ids=str,
)
def test_a_path_for_a_name_writes_and_reads_nothing(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert "is no name; use " in printed.err
    assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.rglob("*")] == ["work"]


@given(st.text(max_size=20))
def test_a_name_is_one_plain_part_of_a_path(text: str) -> None:
    if is_name(text):
        assert Path("/a", text).resolve() == Path("/a") / text
        assert Path(text).parts == (text,)
        assert text.isascii()
        assert not set(text) & set("/\\ \n%?#:@$'\"")
