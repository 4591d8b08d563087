"""Owns how Sphinx builds the documentation, from Markdown pages and docstrings; `make docs` calls it."""

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
autodoc_typehints = "none"  # the docstrings tell dtypes and shapes, which annotations do not
exclude_patterns = ["_build"]
