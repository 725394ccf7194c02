"""What ``--help`` shows is true, every command has its module, and a user's mistake ends before Ray
starts.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli, help
from pipeline.commands import NAMES, find, load
from pipeline.config.options import describe
from tests.pipeline import strokes

COMMANDS = {name: find(name).config for name in NAMES}
NEEDED = {
    **{
        command: ["model=somewhere"]
        for command in NAMES
        if any(key == "model" for key, _ in describe(COMMANDS[command]))
    },
    "registry": ["action=list"],
    "data": ["action=inspect"],
    "decompress": ["model=somewhere", "file=images.vlae"],
    "index": ["dataset.name=theirs", "index.train=s3://bucket/{0..9}.tar"],
}


def console(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[int, str, str]:
    """How ``vlae WORDS`` ends: its exit code, and what it printed."""
    monkeypatch.setattr("sys.argv", ["vlae", *words])
    with pytest.raises(SystemExit) as ended:
        cli.console()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_the_overview_explains_every_command(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = console(monkeypatch, capsys, *words)
    assert (code, err) == (0, "")
    for command, schema in COMMANDS.items():
        assert re.search(
            rf"^  {command} +{re.escape(' '.join(schema.__doc__.split()))}$", out, re.MULTILINE
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_the_defaults_that_help_shows_are_the_defaults(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = console(monkeypatch, capsys, command, "some=thing", "--help")
    assert (code, err) == (0, "")
    lines = out.partition("\noptions:\n")[2].splitlines()
    shown = [line.strip() for line in lines if re.match(r"  [a-z]", line)]
    # The end of a default output folder is the model's name.
    shown = [re.sub(rf"(outputs/{command})/NAME$", r"\1/somewhere", line) for line in shown]
    keys = [key for key, _ in describe(COMMANDS[command])]
    assert [line.partition("=")[0] for line in shown] == keys
    needed = NEEDED.get(command, [])
    defaults = load(command, needed)
    given = load(command, [line for line in shown if not line.endswith("=")] + needed)
    for key in keys:
        expected, found = defaults, given
        for name in key.split("."):
            expected, found = getattr(expected, name), getattr(found, name)
        assert found == (
            pytest.approx(expected, rel=1e-3) if isinstance(expected, float) else expected
        ), key


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_choices_of_every_group(command: str) -> None:
    page = help.help_page(command)
    for group in ("dataset", "model", "train", "search"):
        if f"  {group}=" in page.partition("\noptions:")[0]:
            for path in Path(str(cli.__file__)).parents[1].glob(f"configs/{group}/*.yaml"):
                assert re.search(rf"  {group}= .*\b{path.stem}\b", page)


@pytest.mark.parametrize("words", [*([name, "--help"] for name in COMMANDS), []], ids=str)
def test_the_package_is_the_command_line_too(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pipeline", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("pipeline", run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.startswith(
        f"usage: vlae {words[0]} " if words else "Variational"
    )


@pytest.mark.parametrize(
    "words",
    [["train", "--help"], ["--help"]],
    ids=str,
)
def test_help_may_be_cut_short_by_its_reader(words: list[str]) -> None:
    command = [sys.executable, "-m", "pipeline", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `head` does when it has seen enough
        assert "Traceback" not in process.stderr.read()


MISTAKES = {
    "a data set that is not there": ["train", "model=tiny", "dataset.name=absent"],
    "no data set for a search": ["tune", "model=tiny", "dataset.name=absent"],
    "no files to shard": ["shard", "dataset=idx", "dataset.name=absent", "dataset.path=absent"],
    "a window larger than the image": [
        "train",
        "dataset.name=strokes",
        "model=tiny",
        "model.window=9x2",
    ],
    "one such window among many": [
        "tune",
        "dataset.name=strokes",
        "model=tiny",
        "search.space.model.window=[3x1,2x9]",
    ],
    "a batch larger than the data set": [
        "train",
        "dataset.name=strokes",
        "model=tiny",
        "train.global_batch=104",
    ],
    "a misspelt option": ["train", "model.windw=3x1"],
    "more workers than streams": ["train", "cluster.num_workers=9"],
}

SCRIPT = """
import contextlib, io, json, sys
from pipeline import cli

outcomes = {}
for name, words in json.load(sys.stdin).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as ended:
            code = ended.code
    ray = sys.modules.get("ray")
    started = ray is not None and ray.is_initialized()
    outcomes[name] = [code, out.getvalue(), err.getvalue(), started]
json.dump(outcomes, sys.stdout)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[object]]:
    """How each mistake ends, in one process of its own: here, other tests may have started Ray."""
    root = tmp_path_factory.mktemp("root")
    strokes.write(strokes.data_storage(str(root)))
    cases = {name: [*words, f"storage.root={root}"] for name, words in MISTAKES.items()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_before_ray_starts(
    name: str, outcomes: dict[str, list[object]]
) -> None:
    code, out, err, ray_started = outcomes[name]
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", str(err))
    assert ray_started is False
