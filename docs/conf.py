"""Build the documentation: pages in Markdown, an API from the docstrings, pictures and help drawn from the code."""

import contextlib
import io
import os
import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["COLUMNS"] = "88"  # the command line's help is as wide as the terminal

import draw  # noqa: E402

from snapcore.lab.cli import app as command_line  # noqa: E402
from snapcore.lab.cli import run as run_command  # noqa: E402

project = "snapcore"
author = copyright = "the snapcore authors"
version = release = installed_version("snapcore")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "literal"  # `name` in a docstring, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"snapcore {version}"
html_static_path = ["_static"]

MADE = HERE / "_build" / "made"
"""Where the pages find what is made anew for every build."""


def make_pictures_and_help(_: Any) -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    for name, picture in draw.pictures().items():
        (MADE / name).write_text(picture, encoding="utf-8")
    for command in command_line.registered_commands:
        name = command.callback.__name__
        with contextlib.redirect_stdout(io.StringIO()) as text:
            run_command([name, "--help"])
        (MADE / f"help-{name}.txt").write_text(text.getvalue().strip() + "\n", encoding="utf-8")


def read_as_markdown(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Turn a docstring's Markdown table into reStructuredText's, and keep |x| the absolute value of x."""
    table = [number for number, line in enumerate(lines) if line.startswith("|")]
    if table:
        rows = [[cell.strip() for cell in lines[number].strip("|").split("|")] for number in table]
        cells = ["   * - " + "\n     - ".join(row) for row in rows if not row[0].startswith("---")]
        text = "\n".join([".. list-table::", "   :header-rows: 1", "", *cells, ""])
        lines[table[0] : table[-1] + 1] = text.split("\n")
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = re.sub(r"\|(?=\w)", r"\|", line)


def setup(app: Any) -> None:
    app.connect("builder-inited", make_pictures_and_help)
    app.connect("autodoc-process-docstring", read_as_markdown, priority=100)  # before napoleon
