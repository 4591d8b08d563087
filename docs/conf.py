"""Settings of Sphinx, which `make docs` runs on the Markdown pages and docstrings."""

from typing import Any

import lion8bit

project = "lion8bit"
author = "the lion8bit authors"
release = version = lion8bit.__version__
html_title = f"lion8bit {release}"
html_theme = "furo"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
default_role = "literal"  # single backquotes in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings have dtypes and shapes, annotations do not
exclude_patterns = ["_build"]


def show_equations(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes indented paragraphs of a module's docstring literal blocks: they are equations, also in `--help`."""
    if what != "module":
        return
    indented = [line.startswith("  ") for line in lines]
    for number in range(len(lines) - 1, 0, -1):
        if indented[number] and not lines[number - 1] and not indented[number - 2]:
            lines[number:number] = ["::", ""]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", show_equations)
