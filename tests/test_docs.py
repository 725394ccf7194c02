"""Command lines that the documents and cluster files show are understood; what they name exists.

Each is checked as far as it can be without a network: a ``vlae`` command by loading its
configuration as the command line does, a ``make`` command by its targets, a link by its file and
anchor.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import commands
from pipeline.errors import UserError

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CLUSTER_FILES = sorted((ROOT / "infra").glob("*.yaml"))

COMMANDS = commands.NAMES
ACTIONS = {name: actions for name in COMMANDS if (actions := commands.find(name).actions)}
PROGRAMS = {"vlae", "make", "python", "ray", "kubectl", "docker", ".venv/bin/python"}
SEPARATORS = {"&&", "||", "|", ";", ">"}
PLACEHOLDERS = {"COMMAND": "train", "NAME": "name", "FOLDER": "folder", "ROOT": "root"}
NEEDED = {
    **{
        name: ["model=somewhere"]
        for name in (
            "evaluate",
            "encode",
            "compress",
            "reconstruct",
            "sample",
            "explore",
            "export",
            "neighbours",
        )
    },
    "data": ["action=inspect"],
    "registry": ["action=list"],
    "decompress": ["model=somewhere", "file=images.vlae"],
    "index": ["dataset.name=theirs", "index.train=s3://bucket/{0..9}.tar"],
}
"""Options that a command must be given: sentences that only mention a command leave them out."""
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?:infra|benchmarks|pipeline|vlae|tests|configs|docs)/[\w./-]*")


def load(command: str, words: list[str]) -> object:
    """The configuration of a command, from its words after the action. Raises UserError."""
    return commands.load(command, words)


@dataclass(frozen=True)
class Shown:
    """A command line, and the document that shows it."""

    document: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


# --- collecting --------------------------------------------------------------------------------


def parts_of(markdown: str) -> tuple[list[str], list[str]]:
    """The lines of the fenced blocks, continued lines joined, and the inline code spans."""
    blocks = [code for language, code in FENCED.findall(markdown) if not language]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = FENCED.sub("", markdown)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return lines, spans


def strings_of(value: Any) -> Iterator[str]:
    """The strings in a YAML value, whatever holds them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_of(inner)


def command_lines(path: Path) -> list[Shown]:
    """The command lines that a document or a cluster file shows."""
    text = path.read_text()
    if path.suffix == ".md":
        lines, spans = parts_of(text)
    else:
        comments = [line.lstrip().removeprefix("#") for line in text.splitlines() if "#" in line]
        lines = [*strings_of(yaml.safe_load(text)), *(line.strip() for line in comments)]
        spans = parts_of("\n".join(comments))[1]
    found = [line for line in [*lines, *spans] if " " in line and line.split()[0] in PROGRAMS]
    return [Shown(str(path.relative_to(ROOT)), " ".join(line.split())) for line in found]


SHOWN = list(dict.fromkeys(s for path in [*DOCUMENTS, *CLUSTER_FILES] for s in command_lines(path)))


# --- checking ----------------------------------------------------------------------------------


def simple_commands(line: str) -> Iterator[list[str]]:
    """The commands of a line of shell: those between its separators, and what follows ``--``."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line, comments=True)]
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in SEPARATORS and not (word == "--" and command):
            command.append(word)
            continue
        if command:
            yield command
        command = []


def vlae_words(command: list[str]) -> list[str] | None:
    """The words after ``vlae`` or ``python -m pipeline``; none if it is another program."""
    if command[0] == "vlae":
        return command[1:]
    if Path(command[0]).name == "python" and command[1:3] == ["-m", "pipeline"]:
        return command[3:]
    assert not (command[1:2] == ["-m"] and command[2].startswith("pipeline.")), "an old address"
    return None


def check_vlae(words: list[str]) -> None:
    """Load the configuration of a command. Raises AssertionError or UserError."""
    command, *rest = words
    if command == "--help":
        return
    assert command in COMMANDS, f"there is no command {command}"
    action: list[str] = []
    if command in ACTIONS and rest:
        assert rest[0] in ACTIONS[command]
        action = [f"action={rest.pop(0)}"]
    options = ["yes=true" if word == "--yes" else word for word in rest if word != "..."]
    if "--help" in options:
        return
    load(command, [*action, *(options or NEEDED.get(command, []))])


def check_make(words: list[str]) -> None:
    """Raise AssertionError unless each target and variable is one of the Makefile's."""
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    variables = re.findall(r"^(\w+) \?=", makefile, re.MULTILINE)
    if words[:1] == ["--directory"]:
        words = words[2:]
    assert words
    for word in words:
        name, sign, _ = word.partition("=")
        if sign:
            assert name in variables, f"the Makefile has no variable {name}"
        else:
            assert name in targets, f"the Makefile has no target {name}"


def check_script(path: str, words: list[str]) -> None:
    """Raise AssertionError unless the script exists and has the options it is given."""
    text = (ROOT / path).read_text()
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in text, f"{path} has no option {word}"


def check(line: str) -> None:
    """Raise AssertionError or UserError if a command line cannot work."""
    for command in simple_commands(line):
        for word in command:
            if PATH.fullmatch(word):
                assert (ROOT / word).exists(), f"there is no {word}"
        words = vlae_words(command)
        if words is not None:
            check_vlae(words)
        elif command[0] == "make":
            check_make(command[1:])
        elif Path(command[0]).name == "python" and command[1].startswith(("benchmarks/", "infra/")):
            check_script(command[1], command[2:])


def anchors(markdown: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_link(path: Path, target: str) -> None:
    """Raise AssertionError unless a link of a document leads to a file, and to a heading in it."""
    file, _, anchor = target.partition("#")
    linked = path.parent / file if file else path
    assert linked.exists(), f"there is no {file}"
    assert not anchor or anchor in anchors(linked.read_text()), f"{file} has no heading {anchor}"


# --- tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", SHOWN, ids=str)
def test_a_command_line_is_understood(shown: Shown) -> None:
    check(shown.text)


def test_the_documents_show_every_command_and_job() -> None:
    found = {words[0] for shown in SHOWN for each in simple_commands(shown.text)
             if (words := vlae_words(each))}  # fmt: skip
    assert set(COMMANDS) <= found
    jobs = [
        shown for shown in SHOWN if shown.text.startswith("ray job submit") and "--" in shown.text
    ]
    assert len(jobs) >= 3
    assert any(shown.document == "infra/rayjob.yaml" for shown in SHOWN)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for target in targets:
        if "://" not in target:
            check_link(path, target)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    for span in parts_of(path.read_text())[1]:
        is_path = PATH.fullmatch(span) or re.fullmatch(r"[\w/]+/\w+\.py", span)
        if is_path and "NAME" not in span:
            assert any((root / span).exists() for root in (ROOT, ROOT / "pipeline")), span


@pytest.mark.parametrize(
    "line",
    [
        "vlae train model.windw=7x4",
        "vlae train model.window=7by4",
        "vlae trian model.window=7x4",
        "vlae train dataset=minst",
        "vlae evaluate split=test",
        "vlae registry promte name=vlae-mnist",
        "vlae serve-store -- vlae train trian.images=5",
        "python -m pipeline.train dataset=mnist",
        "make tset",
        "make chaos SEDE=1",
        "make install && make search_demo",
        "ray up infra/locale.yaml",
        "ray job submit --runtime-env infra/job.yaml -- python -m pipeline train cluster.workers=2",
        ".venv/bin/python benchmarks/loader.py --round 3",
    ],
)
def test_a_mistake_in_a_command_line_is_found(line: str) -> None:
    with pytest.raises((AssertionError, UserError)):
        check(line)


@pytest.mark.parametrize("target", ["docs/modell.md", "docs/model.md#preset", "#presets"])
def test_a_link_that_leads_nowhere_is_found(target: str) -> None:
    with pytest.raises(AssertionError):
        check_link(ROOT / "README.md", target)
