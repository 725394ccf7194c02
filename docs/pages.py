"""Pages of the site that are made from other files: a Sphinx extension.

They are written to ``docs/generated``, which git ignores: the quick start from the README, the
architecture from CONTRIBUTING, the options of each command from their declarations, and the Python
reference from docstrings.
"""

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import vlae
from pipeline.commands import GROUPS, NAMES
from pipeline.help import (
    HEADINGS,
    groups_of,
    options_with_defaults,
    presets_of,
    summary,
    usage,
)

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
ADOPTED = {
    "README.md": ("quickstart", "Quick start"),
    "CONTRIBUTING.md": ("architecture", "Architecture, and how to change it"),
    "CHANGELOG.md": ("changelog", "Changelog"),
    "docs/search.md": ("searching", "Searching"),  # Sphinx's page of search results is search.html
}
"""Files that are pages of the site under other names: these, and their titles there."""
LOADER = {
    "pipeline.data": ("DataSet",),
    "pipeline.data.loader": ("Batches", "InOrder"),
    "pipeline.data.reader": ("ReadOptions",),
    "pipeline.data.cache": ("ShardCache",),
}
"""What users of the loader see, by module."""


def adopted(file: str, title: str) -> str:
    """The page made from a file of ``ADOPTED``."""
    text = relinked((ROOT / file).read_text(), (ROOT / file).parent, GENERATED)
    return re.sub(r"\A# .*", f"# {title}", text)


def relinked(text: str, here: Path, there: Path) -> str:
    """Markdown of one folder with its links as a page in another folder of the site needs them."""

    def link(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(here / match[1]))
        if path.is_relative_to(ROOT) and str(path.relative_to(ROOT)) in ADOPTED:
            path = GENERATED / f"{ADOPTED[str(path.relative_to(ROOT))][0]}.md"
        return f"]({os.path.relpath(path, there)}{match[2] or ''})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)", link, text)


def relink(app: Sphinx, page: str, source: list[str]) -> None:
    """Let the links of a page lead to the pages of the site. Notebooks are JSON with such links."""
    folder = (DOCS / page).parent
    if not folder.is_relative_to(GENERATED):
        source[0] = relinked(source[0], folder, folder)


def commands() -> str:
    """All commands in their groups, each with its sentence."""
    lines = ["# Commands and options", ""]
    lines += ["What `vlae COMMAND --help` prints, one page for each command.", ""]
    for group, names in GROUPS.items():
        lines += [f"## {HEADINGS[group].rstrip(':').capitalize()}", ""]
        for name in names:
            lines += [f"[vlae {name}](options/{name}.md)", f": {escaped(summary(name))}", ""]
    pages = [f"options/{name}" for name in NAMES]
    return "\n".join([*lines, "```{toctree}", ":hidden:", "", *pages, "```", ""])


def command(name: str) -> str:
    """The help page of a command."""
    lines = [f"# vlae {name}", "", escaped(summary(name)), "", "```text", usage(name), "```", ""]
    for title, entries in (
        ("Ready-made groups of options", groups_of(name)),
        ("Model presets", presets_of(name)),
        ("Options", options_with_defaults(name)),
    ):
        if entries:
            lines += [f"## {title}", ""]
        for head, text in entries.items():
            lines += [f"`{head}`", f": {escaped(text)}", ""]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Plain text as Markdown; what stands in backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_\[\]<>#|$~{}])", r"\\\1", part)
        for part in parts
    )


def reference() -> str:
    """The public names of the model library and of the loader, by module."""
    lines = ["# Python reference", "", str(vlae.__doc__).replace("``", "`"), ""]
    for package, modules in (("vlae", vlae.MODULES), ("", LOADER)):
        for module, names in modules.items():
            full = f"{package}.{module}" if package else module
            lines += [f"## {full}", ""]
            for name in names:
                value = getattr(importlib.import_module(full), name)
                kind = "autoclass" if isinstance(value, type) else "autofunction"
                lines += ["```{eval-rst}", f".. {kind}:: {package or module}.{name}", "```", ""]
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    **{
        name: lambda file=file, title=title: adopted(file, title)
        for file, (name, title) in ADOPTED.items()
    },
    "commands": commands,
    "reference": reference,
    **{f"options/{name}": lambda name=name: command(name) for name in NAMES},
}


def write(app: Sphinx, config: object) -> None:
    """Write the generated pages; those that stay the same are not touched."""
    for name, page in PAGES.items():
        path, text = GENERATED / f"{name}.md", page()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def math(self: Any, node: nodes.Element) -> None:
    """A formula as MathML, which browsers draw without a script."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    self.body.append(f"<div class='math'>{formula}</div>" if block else formula)
    raise nodes.SkipNode


ARGUMENTS = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*): ")
"""How a paragraph of a docstring begins that explains arguments, one after the other."""


def docstring(*arguments: Any) -> None:
    """Our docstrings as reStructuredText: explained arguments are a list, and the bars of q(z|x)
    are no substitutions.
    """
    lines: list[str] = arguments[-1]
    listed, before = False, ""
    for number, line in enumerate(lines):
        new = ARGUMENTS.match(line)
        listed = bool(line) and (listed or (not before and new is not None and number > 0))
        before = line
        if ".. math" not in line:
            parts = re.split(r"(``.*?``)", line)
            line = "".join(
                part if part.startswith("``") else part.replace("|", r"\|") for part in parts
            )
        if listed and new:
            line = ARGUMENTS.sub(r"* **\1**: ", line, count=1)
        elif listed:
            line = "  " + line
        lines[number] = line


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("config-inited", write)
    app.connect("source-read", relink)
    app.connect("autodoc-process-docstring", docstring)
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
